import json

import pytest
from PIL import Image

from mir_lightning.llava.data.records import Records, image_path, read_records
from mir_lightning.llava.data.source import Samples
from mir_lightning.llava.data.table import Table
from mir_lightning.probing.images import UnreadableImageError, read_image


def _record(index, image, **changes):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"Number {index}."}]
    return {"id": f"r{index}", "image": image, "conversations": turns, **changes}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    picture = Image.effect_noise((40, 30), 90).convert("RGB")
    picture.save(folder / "good.png")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("RGBA").save(folder / "transparent.png")
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:500])
    (folder / "text.jpg").write_text("not a picture")
    Image.new("1", (20_000, 6_000)).save(folder / "bomb.png")
    return folder


@pytest.mark.parametrize("name", ["good.png", "cmyk.jpg", "palette.png", "transparent.png"])
def test_other_kinds_of_pictures_become_rgb(images, name):
    picture = read_image(images / name)
    assert (picture.mode, picture.size) == ("RGB", (40, 30))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("pixel.png", "1 x 1 pixels, too small"),
        ("empty.jpg", "cannot identify"),
        ("cut.png", "truncated|broken"),
        ("text.jpg", "cannot identify"),
        ("bomb.png", "20000 x 6000 pixels, above 100,000,000"),
        ("missing.png", "No such file"),
    ],
)
def test_what_cannot_be_used_is_named(images, name, why):
    with pytest.raises(UnreadableImageError, match=rf"{name}: .*({why})"):
        read_image(images / name)


def test_the_next_sample_takes_the_place_of_an_unreadable_one(images, tmp_path):
    names = ["cut.png", "missing.png", "good.png", "empty.jpg"]
    (tmp_path / "data.json").write_text(json.dumps([_record(i, name) for i, name in enumerate(names)]))
    dataset = Samples(Records([tmp_path / "data.json"], images), range(4))
    sample = dataset[0]
    assert sample.turns == ("<image>\nWhat?", "Number 2.")
    assert [line.split(":")[0].rsplit("/", 1)[1] for line in sample.unreadable] == ["cut.png", "missing.png"]
    assert dataset[3].turns[1] == "Number 2."
    assert dataset[2].unreadable == ()
    (tmp_path / "bad.json").write_text(json.dumps([_record(i, "cut.png") for i in range(3)]))
    with pytest.raises(UnreadableImageError, match="ten samples in a row cannot be read"):
        Samples(Records([tmp_path / "bad.json"], images), range(3))[0]


def test_records_of_both_kinds_of_files(tmp_path):
    records = [_record(0, "a.png"), _record(1, ["a.png", "b.png"])]
    text = {"id": "t", "conversations": [{"from": "human", "value": "Hello"}]}
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.JSONL").write_text("\n".join(json.dumps(r) for r in [*records, text]) + "\n\n")
    dataset = Records([tmp_path / "a.json", tmp_path / "b.JSONL"], tmp_path)
    assert [record.images for record in dataset.records[2:]] == [("a.png",), ("a.png", "b.png"), ()]
    assert len(dataset) == len(dataset.lengths()) == 5
    assert dataset.lengths()[4] == -5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", r"data.json is not JSON"),
        ("{}", r"must hold a list of records, it holds dict"),
        ("[1]", r"data.json, record 0: must be an object, it is int"),
        (json.dumps([_record(0, 7)]), r'record 0 \(id .r0.\): "image" must be a path or a list of paths, it is 7'),
        (json.dumps([_record(0, "a", conversations=[])]), r'"conversations" must be a list of turns'),
        (json.dumps([_record(0, "a", conversations=[{"from": "gpt", "value": ""}])]), r"turn 0 must be"),
        (json.dumps([_record(0, [])]), r"1 <image> placeholders for 0 images"),
    ],
)
def test_malformed_files_name_file_and_record(tmp_path, content, message):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "data.json")


def test_malformed_lines_are_named(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps(_record(0, "a")) + "\n{\n")
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2 is not JSON"):
        read_records(tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match=r"is a \.json or \.jsonl file"):
        read_records(tmp_path / "data.csv")


@pytest.mark.parametrize("image", ["../secret.png", "/etc/secret.png", "a/../../b.png"])
def test_pictures_stay_in_their_folder(tmp_path, image):
    (tmp_path / "data.json").write_text(json.dumps([_record(0, image)]))
    with pytest.raises(ValueError, match="lies outside the image folder"):
        Records([tmp_path / "data.json"], tmp_path)


def test_hugging_face_datasets(tmp_path, images):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [str(images / "good.png"), str(images / "cut.png")], "caption": ["Good.", "Cut."]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "arrow")
    (tmp_path / "parquet").mkdir()
    contents = [{"bytes": (images / name).read_bytes(), "path": None} for name in ("good.png", "cut.png")]
    datasets.Dataset.from_dict({"image": contents, "caption": rows["caption"]}).to_parquet(
        tmp_path / "parquet/0.parquet"
    )
    for folder in ("arrow", "parquet"):
        dataset = Table(tmp_path / folder, "image", "caption")
        assert dataset[0].images[0].size == (40, 30)
        assert dataset[0].turns[1] == "Good."
        with pytest.raises(UnreadableImageError, match="row 1"):
            dataset[1]
    with pytest.raises(ValueError, match="has columns image, caption, not 'text'"):
        Table(tmp_path / "arrow", "image", "text")


def test_lines_end_at_line_feeds_only_and_a_mark_at_the_start_is_no_text(tmp_path):
    """JSON may hold the line and paragraph separators of Unicode as they are."""
    answer = "A kite.\u2028A field.\x85And\u2029more."
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": answer}]
    record = {"id": "a", "image": "a.png", "conversations": turns}
    text = json.dumps(record, ensure_ascii=False)
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n{text}\n".encode())
    read = read_records(tmp_path / "x.jsonl")
    assert [r.turns[1] for r in read] == [answer] * 2


def test_pictures_inside_their_folder_are_found_however_they_are_named(tmp_path, images):
    outside = tmp_path / "outside" / "deep"
    outside.mkdir(parents=True)
    (outside.parent / "secret.png").write_bytes((images / "good.png").read_bytes())
    (images / "link").symlink_to(outside)  # a folder that lies elsewhere
    (outside / "there.png").write_bytes((images / "good.png").read_bytes())
    for inside in (str(images / "good.png"), "link/there.png", "./good.png"):
        assert image_path(images, inside).is_file()
    with pytest.raises(ValueError, match="lies outside the image folder"):
        image_path(images, "link/../secret.png")


def test_cells_of_a_table(tmp_path, images):
    datasets = pytest.importorskip("datasets")
    good = str(images / "good.png")
    rows = {"image": [good, good, None], "caption": ["Good.", None, "No picture."]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "null")
    samples = Samples(Table(tmp_path / "null"), [0, 1, 2])
    assert samples[1].unreadable == (f"{tmp_path / 'null'}, row 1: caption is empty", *samples[2].unreadable)
    assert "row 2: image is empty" in samples[2].unreadable[0]
    lists = datasets.Dataset.from_dict({"image": [good], "caption": [["One.", "Two."]]})
    lists.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "lists")
    with pytest.raises(ValueError, match=r"column 'caption' holds .* not one text a row"):
        Table(tmp_path / "lists")
    several = datasets.Dataset.from_dict({"image": [[good, good]], "caption": ["Two."]})
    several.save_to_disk(tmp_path / "several")
    with pytest.raises(ValueError, match=r"column 'image' holds .* not one picture a row"):
        Table(tmp_path / "several")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_encodings_are_read_or_named(tmp_path, encoding):
    text = json.dumps([_record(0, "a.png")], ensure_ascii=False)
    (tmp_path / "a.json").write_bytes(text.encode(encoding))
    assert read_records(tmp_path / "a.json")[0].images == ("a.png",)
    (tmp_path / "a.jsonl").write_bytes(
        text[1:-1].encode("latin-1" if encoding == "utf-8-sig" else encoding) + b"\xff\n"
    )
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1 is not JSON"):
        read_records(tmp_path / "a.jsonl")
