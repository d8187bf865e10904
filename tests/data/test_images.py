"""Images of all kinds become the pixels that a person sees; what is no image is counted and named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fine_dist.data.image_decoding import center_crop, to_rgb
from fine_dist.data.stream import read_all
from fine_dist.encode import EncodeConfig, main, run

RAMP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)


def opened(tmp_path: Path, image: Image.Image, name: str, **options) -> Image.Image:
    image.save(tmp_path / name, **options)
    return Image.open(tmp_path / name)


@pytest.mark.parametrize("name", ["ramp.png", "ramp.tif"])
def test_16_bit_grey_keeps_its_course_from_black_to_white(tmp_path, name):
    found = np.asarray(to_rgb(opened(tmp_path, Image.fromarray(RAMP), name)))
    assert np.abs(found[..., 0] - RAMP / 257).max() <= 0.5  # rounding to 8 bits, and nothing clipped
    assert (found[..., 0] == found[..., 1]).all() and (found[..., 0] == found[..., 2]).all()


def test_a_16_bit_image_gives_the_latents_of_its_8_bit_copy(tmp_path):
    smooth = np.linspace(0, 255, 40 * 40).reshape(40, 40).astype(np.uint8)
    deep = Image.fromarray(smooth.astype(np.uint16) * 257)
    assert np.array_equal(center_crop(opened(tmp_path, deep, "a.png"), 32), center_crop(Image.fromarray(smooth), 32))


def test_floats_have_white_at_one_and_other_ranges_are_refused(tmp_path):
    floats = opened(tmp_path, Image.fromarray((RAMP / 65535).astype(np.float32)), "f.tif")
    assert np.abs(np.asarray(to_rgb(floats))[..., 0] - RAMP / 257).max() <= 0.5
    with pytest.raises(ValueError, match="legal: 0 to 1"):
        to_rgb(Image.fromarray(np.full((4, 4), 300.0, np.float32)))
    with pytest.raises(ValueError, match="legal: 0 to 65535"):
        to_rgb(Image.fromarray(np.full((4, 4), 70000, np.int32)))


def half_clear() -> Image.Image:
    """Left half red and opaque; right half green, and as clear as glass; the last column half so."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = (255, 0, 0, 255)
    pixels[:, 4:] = (0, 255, 0, 0)
    pixels[:, 7, 3] = 128
    return Image.fromarray(pixels)


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 200, 30)])
def test_what_is_transparent_shows_the_background(tmp_path, background):
    found = np.asarray(to_rgb(opened(tmp_path, half_clear(), "a.png"), background)).astype(int)
    assert (found[:, :4] == (255, 0, 0)).all()
    assert (found[:, 4:7] == background).all()
    expected = np.array(background) * 127 / 255 + np.array((0, 255, 0)) * 128 / 255
    assert np.abs(found[:, 7] - expected).max() <= 1  # 8-bit arithmetic


@pytest.mark.parametrize("mode", ["LA", "P", "L", "RGB"])
def test_transparency_of_every_kind_is_seen(tmp_path, mode):
    grey = Image.fromarray(np.where(np.arange(64).reshape(8, 8) % 8 < 4, 0, 200).astype(np.uint8))
    clear = Image.fromarray(np.where(np.arange(64).reshape(8, 8) % 8 < 4, 255, 0).astype(np.uint8))
    options = {}
    if mode == "LA":
        image = Image.merge("LA", (grey, clear))
    else:
        image = grey.convert(mode)
        options = {"transparency": {"P": 200, "L": 200, "RGB": (200, 200, 200)}[mode]}
    found = np.asarray(to_rgb(opened(tmp_path, image, "a.png", **options)))
    assert (found[:, :4] == 0).all() and (found[:, 4:] == 255).all()


def test_everything_in_a_folder_is_encoded_or_counted_and_named(tmp_path, capsys):
    (tmp_path / "in" / "owl" / "deep").mkdir(parents=True)
    picture = Image.fromarray(np.arange(40 * 40 * 3, dtype=np.uint8).reshape(40, 40, 3))
    kinds = ["jpg", "jpeg", "png", "gif", "tif", "tiff", "webp", "bmp", "ppm", "PNG", "JPG", "TIF"]
    for number, kind in enumerate(kinds):
        picture.save(tmp_path / "in" / "owl" / f"{number}.{kind}")
    (tmp_path / "in" / "owl" / "notes.txt").write_text("no image")
    (tmp_path / "in" / "owl" / "thumbs.db").write_bytes(b"\0\1")
    (tmp_path / "in" / "README").write_text("no image either")
    argv = ["--source", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--image-size", "16", "--batch", "5"]
    assert main([*argv, "--launcher", "here"]) == 0
    said = capsys.readouterr().out
    assert f"{len(kinds)} samples" in said and "4 files left out (no images)" in said
    for name in ("README", "owl/notes.txt", "owl/thumbs.db", "owl/deep/"):
        assert name in said
    manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert manifest["num_left_out"] == 4 and "owl/notes.txt" in manifest["left_out"] and manifest["count"] == 12
    assert main(["--inspect", str(tmp_path / "out" / "train")]) == 0
    assert "4 files left out" in capsys.readouterr().out


def test_the_background_is_a_setting_of_what_was_encoded(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    half_clear().save(tmp_path / "in" / "a" / "0.png")
    means = {}
    for name, background in (("white", (255, 255, 255)), ("black", (0, 0, 0))):
        config = EncodeConfig(
            source=str(tmp_path / "in"), out=str(tmp_path / name), image_size=8, background=background
        )
        latents, _ = read_all(str(run(config) / "train"))
        means[name] = float(latents[0, :, :, 4:7].mean())
    assert means == {"white": 1.0, "black": -1.0}


def test_a_file_that_runs_a_program_to_be_read_is_no_image(tmp_path, capsys):
    (tmp_path / "in" / "a").mkdir(parents=True)
    half_clear().convert("RGB").save(tmp_path / "in" / "a" / "0.png")
    # Pillow hands PostScript, whatever the file is called, to Ghostscript
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) print\n%%EOF\n"
    (tmp_path / "in" / "a" / "1.png").write_bytes(postscript)
    argv = ["--source", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--image-size", "8", "--launcher", "here"]
    assert main([*argv, "--max-bad-fraction", "0.9"]) == 0
    manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert [bad["source"] for bad in manifest["bad"]] == ["a/1.png"] and manifest["count"] == 1
