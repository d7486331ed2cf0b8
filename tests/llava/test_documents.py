import json
from io import BytesIO

import pytest
from PIL import Image

from mir_lightning.llava.data.batches import ConversationCollator
from mir_lightning.llava.data.documents import Documents
from mir_lightning.llava.data.prompts import PlainPrompt
from mir_lightning.llava.data.source import Samples


def _png(colour):
    Image.new("RGB", (8, 8), colour).save(buffer := BytesIO(), "png")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    for colour in ("red", "blue"):
        (tmp_path / f"{colour}.png").write_bytes(_png(colour))
    return tmp_path


def _write(folder, *documents):
    (file := folder / "documents.jsonl").write_text("\n".join(json.dumps(document) for document in documents))
    return file


MIXED = {"images": [None, "red.png", None, "blue.png"], "texts": ["It begins.", None, "Red was that.", None]}


def _colours(sample):
    return [image.getpixel((0, 0)) for image in sample.images]


def test_pictures_stand_where_they_stood(folder, tiny_processor):
    documents = Documents([_write(folder, MIXED, {"text": "Words alone."})], folder)
    mixed, alone = (documents[index] for index in range(len(documents)))
    assert mixed.turns == ("It begins.\n<image>\nRed was that.\n<image>",)
    assert _colours(mixed) == [(255, 0, 0), (0, 0, 255)]
    assert (alone.turns, alone.images) == (("Words alone.",), ())
    batch = ConversationCollator(tiny_processor, PlainPrompt())([mixed, alone])
    tokenizer, mark = tiny_processor.tokenizer, tiny_processor.image_token
    written = [
        tokenizer.decode(row[mask.bool()])
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert written == [f"It begins.\n{mark * 10}\nRed was that.\n{mark * 10}\n", "Words alone.\n"]
    learned = [tokenizer.decode(row[row >= 0]) for row in batch["labels"]]
    assert learned == ["It begins.\n\nRed was that.\n\n", "Words alone.\n"]


@pytest.mark.parametrize("kind", ["bytes", "struct", "image", "path"])
def test_parquet_as_obelics_and_as_hugging_face_store_it(folder, kind):
    datasets = pytest.importorskip("datasets")
    pictures = {
        "bytes": [_png("red"), _png("blue")],
        "struct": [{"bytes": _png("red"), "path": None}, {"bytes": _png("blue"), "path": None}],
        "image": [Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")],
        "path": ["red.png", "blue.png"],
    }[kind]
    rows = {
        "images": [[None, pictures[0], None, pictures[1]], [pictures[1], None]],
        "texts": [MIXED["texts"], [None, "Blue."]],
        "metadata": ["{}", "{}"],
    }
    kinds = {"images": datasets.List(datasets.Image()), "texts": datasets.List(datasets.Value("string"))}
    features = datasets.Features({**kinds, "metadata": datasets.Value("string")}) if kind == "image" else None
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "a.parquet")
    documents = Documents([folder / "a.parquet", _write(folder, MIXED)], folder)
    assert len(documents) == 3
    assert [document.turns for document in (documents[0], documents[1])] == [
        ("It begins.\n<image>\nRed was that.\n<image>",),
        ("<image>\nBlue.",),
    ]
    assert _colours(documents[0]) == _colours(documents[2]) == [(255, 0, 0), (0, 0, 255)]
    with pytest.raises(ValueError, match=r"a\.parquet, document 0 has 2 pictures, more than max_images=1"):
        Documents([folder / "a.parquet"], folder, max_images=1)


def test_plain_texts_in_parquet(folder):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["One.", "Two."], "url": ["", ""]}).to_parquet(folder / "c4.parquet")
    assert Documents([folder / "c4.parquet"])[1].turns == ("Two.",)


def test_more_pictures_than_the_limit(folder):
    many = {"images": ["red.png"] * 17 + [None], "texts": [None] * 17 + ["Red."]}
    with pytest.raises(ValueError, match=r"documents\.jsonl, document 1 has 17 pictures, more than max_images=16"):
        Documents([_write(folder, MIXED, many)], folder)
    assert len(Documents([_write(folder, many)], folder, max_images=17)[0].images) == 17


@pytest.mark.parametrize(
    ("document", "trouble"),
    [
        ([], "it is list"),
        ({"caption": "x"}, "its keys are caption"),
        ({"images": ["red.png"], "texts": []}, "its keys are images, texts"),
        ({"images": ["red.png"], "texts": ["both"]}, "at place 0 it has 'red.png' and 'both'"),
        ({"images": [None], "texts": [None]}, "at place 0 it has None and None"),
        ({"images": [None], "texts": [3]}, "at place 0 it has None and 3"),
        ({"images": ["red.png"], "texts": [None]}, "has no text to learn"),
        ({"text": " "}, "has no text to learn"),
        ({"text": "an <image> here"}, "its text holds '<image>'"),
        ({"images": [None, 7], "texts": ["a", None]}, r"pictures must be paths, got \[7\]"),
    ],
)
def test_documents_that_do_not_fit_are_named(folder, document, trouble):
    with pytest.raises(ValueError, match=rf"documents\.jsonl, document 1.*{trouble}"):
        Documents([_write(folder, MIXED, document)], folder)


def test_files_that_do_not_fit(folder):
    datasets = pytest.importorskip("datasets")
    (folder / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"documents are a \.jsonl or \.parquet file"):
        Documents([folder / "a.txt"])
    datasets.Dataset.from_dict({"caption": ["One."]}).to_parquet(folder / "b.parquet")
    with pytest.raises(ValueError, match="has columns caption"):
        Documents([folder / "b.parquet"])
    with pytest.raises(ValueError, match="max_images must be at least 1, got 0"):
        Documents([], max_images=0)


def test_what_cannot_be_read_is_left_out(folder):
    datasets = pytest.importorskip("datasets")
    rows = {"images": [["red.png"], ["gone.png", None], [None]], "texts": [["x"], [None, "a"], ["b"]]}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "a.parquet")
    sample = Samples(Documents([folder / "a.parquet"], folder), range(3))[0]
    assert sample.turns == ("b",)
    assert "a.parquet, document 0" in sample.unreadable[0]
    assert "No such file" in sample.unreadable[1]
    with pytest.raises(ValueError, match="lies outside"):
        Documents([_write(folder, {"images": ["../x.png", None], "texts": [None, "a"]})], folder)[0]
