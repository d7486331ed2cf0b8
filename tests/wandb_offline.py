"""Read a W&B offline run back: a LevelDB log of protobuf records."""

import json
from pathlib import Path

import wandb
from wandb.proto import wandb_internal_pb2

_BLOCK, _HEADER = 32768, 7


def _records(data):
    """Join the fragments of each record: type 1 is whole, 2 to 4 are first, middle and last."""
    position, pending = _HEADER, b""  # the file opens with a 7-byte ident
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        pending += data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        if kind in (1, 4):  # full, or last
            yield pending
            pending = b""


def read_offline_run(logger):
    """``(history rows, media folder, config)`` of a finished ``WandbLogger(offline=True)``."""
    folder = Path(logger.experiment.dir).parent
    wandb.finish()
    wandb.teardown()  # waits for the service process, which may still hold the file's last block
    (file,) = folder.glob("*.wandb")
    rows, config = [], {}
    for data in _records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
        if record.HasField("config"):
            config |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.config.update}
    return rows, folder / "files" / "media", config
