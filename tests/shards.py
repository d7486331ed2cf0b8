"""Small shards in LitData's format, written as the docs say."""

import io

from PIL import Image

UNREADABLE = 17


def record(index):
    """A LLaVA-format record with the bytes of its picture; one has none that can be read, one no picture."""
    stream = io.BytesIO()
    Image.new("RGB", (20, 20), (index, 2 * index, 3 * index)).save(stream, "PNG")
    human = {"from": "human", "value": "<image>\nWhat number?"}
    gpt = {"from": "gpt", "value": f"Number {index} in a text of some length."}
    image = b"cut off" if index == UNREADABLE else stream.getvalue()
    return {"id": str(index), "image": image, "conversations": [human, gpt]}


def write_shards(folder, samples=40):
    """``samples`` records, about seven a shard."""
    import litdata

    litdata.optimize(fn=record, inputs=list(range(samples)), output_dir=str(folder), chunk_size=7, num_workers=1)
    return folder
