import os
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from mir_lightning.probing.choices.items import open_image
from mir_lightning.probing.images import UnreadableImageError, read_image
from mir_lightning.probing.pairs import Pair, readable_pairs

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("16 bits.png", (RAMP * 65535).astype(np.uint16)),
        ("32 bits.tiff", (RAMP * 65535).astype(np.int32)),
        ("signed.tiff", (RAMP * 2000 - 1000).astype(np.int32)),
        ("unit.tiff", RAMP.astype(np.float32)),
        ("bytes.tiff", (RAMP * 255).astype(np.float32)),
        ("large.tiff", (RAMP * 1e4).astype(np.float32)),
    ],
)
def test_deep_pictures_are_scaled_by_their_range(tmp_path, name, values):
    Image.fromarray(values).save(tmp_path / name)
    read = np.asarray(read_image(tmp_path / name))
    assert read.shape == (64, 64, 3)
    np.testing.assert_allclose(read[..., 0], RAMP * 255, atol=1)
    np.testing.assert_array_equal(read, np.asarray(open_image(tmp_path / name)))


def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10] = 255  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    read = np.asarray(read_image(tmp_path / "turned.png"))
    assert read.shape == (40, 20, 3)
    assert (read[:, 10:] == 255).all()
    assert (read[:, :10] == 0).all()


def test_only_regular_files_are_opened(tmp_path):
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for place in (pipe, tmp_path):
        with pytest.raises(UnreadableImageError, match=f"{place}: .* must be a regular file"):
            read_image(place)
    kept, unreadable = readable_pairs([Pair((pipe,), ("text",))])
    assert (kept, unreadable) == ([], [f"{pipe}: {pipe} must be a regular file."])


def test_formats_that_run_a_program_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "script.eps")
    with pytest.raises(UnreadableImageError, match=r"script\.eps: cannot identify image file"):
        read_image(tmp_path / "script.eps")


def test_values_that_are_no_numbers(tmp_path):
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    with pytest.raises(UnreadableImageError, match=r"nan\.tiff: holds NaN or inf"):
        read_image(tmp_path / "nan.tiff")


def test_contents_are_named_as_asked():
    with pytest.raises(UnreadableImageError, match="row 3: cannot identify"):
        read_image(BytesIO(b"no picture"), name="row 3")
