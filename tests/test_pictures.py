"""Images as anyone may have made them, wherever they are read."""

import numpy as np
import pytest
import torch
from PIL import Image

from dyconvert.analysis.images import read_images
from dyconvert.pictures import PictureError, picture_files, read_picture

RAMP = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".pgm"])
def test_grey_images_of_16_bits(suffix, tmp_path):
    file = tmp_path / f"ramp{suffix}"
    Image.fromarray(RAMP).save(file)
    for mode in ("L", "RGB"):
        found = np.asarray(read_picture(file, mode))
        assert np.abs(found.reshape(8, 8, -1)[..., 0].astype(int) - (RAMP >> 8)).max() <= 1


def test_calibration_and_report_images_of_16_bits(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(RAMP).save(tmp_path / "a" / "ramp.png")
    images = read_images(str(tmp_path), (1, 8, 8), [0.0], [1.0])
    [(batch, _)] = images.batches(4)
    assert torch.allclose(batch[0, 0], torch.from_numpy(RAMP.astype(np.float32)) / 65535, atol=1 / 100)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_no_known_range(mode, tmp_path):
    Image.new(mode, (4, 4)).save(tmp_path / "x.tiff")
    with pytest.raises(PictureError, match="range isn't known"):
        read_picture(tmp_path / "x.tiff", "RGB")


def test_links_in_circles(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.fromarray(RAMP).save(tmp_path / name / "x.png")
    (tmp_path / "a" / "loop").symlink_to("..")
    (tmp_path / "a" / "again").symlink_to("../a")
    (tmp_path / "b" / "up").symlink_to("/")
    assert len([file for file in picture_files(tmp_path) if str(file).startswith(str(tmp_path))]) == 2
