import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from mir_lightning.files import check_json, read_json, read_json_lines, read_text, save_tensors


def test_json_with_and_without_a_byte_order_mark(tmp_path):
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "a.json").write_bytes(mark + '{"a": "é"}'.encode())
        assert read_json(tmp_path / "a.json") == {"a": "é"}
        (tmp_path / "a.jsonl").write_bytes(mark + '"a\u2028b"\r\n\n{"c": 1}'.encode())
        assert list(read_json_lines(tmp_path / "a.jsonl")) == [(1, "a\u2028b"), (3, {"c": 1})]


def test_errors_name_file_and_line(tmp_path):
    for content in (b"{", b"\xff\xfe\xfd", b"", b"[" * 100_000):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.json is not JSON: "):
            read_json(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text("1\n\n{\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3 is not JSON: "):
        list(read_json_lines(tmp_path / "a.jsonl"))


def test_a_text_of_another_encoding_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffé".encode())
    assert read_text(tmp_path / "a.txt") == "é"
    for encoding in ("utf-16", "latin-1"):
        (tmp_path / "a.txt").write_text("é", encoding)
        with pytest.raises(ValueError, match=r"a\.txt is not UTF-8: "):
            read_text(tmp_path / "a.txt")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("read", [read_text, read_json, lambda path: list(read_json_lines(path))])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, make, read):
    make(tmp_path / "a")
    with pytest.raises(ValueError, match="a must be a regular file"):
        read(tmp_path / "a")


SCHEMA = {"name": str, "count": int, "share": float, "pairs": [[float, float]], "inner": {"texts": [str]}}
GOOD = {"name": "a", "count": 1, "share": 0, "pairs": [[1, 2.5]], "inner": {"texts": ["b"], "more": None}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 1}, "f: name must be a text, got 1."),
        ({"name": None}, "f: name must be a text, got None."),
        ({"count": 1.0}, "f: count must be a whole number, got 1.0."),
        ({"count": True}, "f: count must be a whole number, got True."),
        ({"share": float("nan")}, "f: share must be a number within 1e.300, got nan."),
        ({"share": 10**400}, "f: share must be a number within 1e.300, got 10{59}."),
        ({"share": "0.1"}, "f: share must be a number within 1e.300, got '0.1'."),
        ({"pairs": []}, r"f: pairs must be a list of one or more, got \[\]."),
        ({"pairs": {}}, "f: pairs must be a list of one or more, got {}."),
        ({"pairs": [[1, 2], [1]]}, r"f: pairs\[1\] must be a list of 2, got \[1\]."),
        ({"pairs": [[1, float("inf")]]}, r"f: pairs\[0\]\[1\] must be a number within 1e.300, got inf."),
        ({"inner": 3}, "f: inner must be an object, got 3."),
        ({"inner": {}}, "f: inner.texts must be a list of one or more, got None."),
    ],
)
def test_a_schema_names_the_field(change, message):
    check_json("f", GOOD, SCHEMA)
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_json("f", GOOD | change, SCHEMA)
    with pytest.raises(ValueError, match=r"^f: it must be an object, got 5\.$"):
        check_json("f", 5, SCHEMA)


def test_saved_tensors_have_the_mode_of_any_new_file(tmp_path):
    old = os.umask(0o027)
    try:
        save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"note": "x"})
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.ones(2))
