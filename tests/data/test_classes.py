"""Class folders become labels as their owner means them: hidden files, links, splits, and photos on their side."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fine_dist.core.errors import ConfigError, DataError
from fine_dist.data.image_decoding import center_crop
from fine_dist.data.images import FolderImages
from fine_dist.data.manifest import Manifest
from fine_dist.data.settings import DataConfig
from fine_dist.encode import main, run
from fine_dist.model.arch import Arch
from fine_dist.stages.build import check_held_out
from tests.data.picturing import config, picture


def class_folder(root, name, count):
    (root / name).mkdir(parents=True)
    for i in range(count):
        picture(i, 40, 40).save(root / name / f"{i}.png")


@pytest.fixture
def pets(tmp_path):
    root = tmp_path / "pets"
    class_folder(root, "cat", 12)
    class_folder(root, "dog", 3)
    return root


def manifest_of(out, split="train"):
    return Manifest.parse((out / split / "manifest.json").read_bytes(), split)


def test_hidden_files_and_folders_are_neither_classes_nor_images(pets, tmp_path):
    (pets / ".ipynb_checkpoints").mkdir()
    (pets / ".ipynb_checkpoints" / "0.png").write_bytes((pets / "cat" / "0.png").read_bytes())
    (pets / "cat" / "._0.png").write_bytes(b"\0\5\26\7")
    run(config(pets, tmp_path / "out"))
    manifest = manifest_of(tmp_path / "out")
    assert manifest.class_names == ("cat", "dog") and manifest.count == 15
    assert not manifest.bad and set(manifest.left_out) == {".ipynb_checkpoints/", "cat/._0.png"}


def test_a_class_that_is_a_link_is_a_class(pets, tmp_path):
    class_folder(tmp_path / "elsewhere", "owl", 2)
    (pets / "owl").symlink_to(tmp_path / "elsewhere" / "owl")
    source = FolderImages(str(pets), image_size=8, per_unit=99, seed=0)
    assert source.class_names == ("cat", "dog", "owl") and sum(item.label == 2 for item in source.items(0)) == 2


def test_a_fraction_of_every_class_is_held_out_and_nothing_is_in_both_splits(pets, tmp_path):
    class_folder(pets, "owl", 1)
    found = {}
    for part in ("train", "held_out"):
        source = FolderImages(str(pets), image_size=8, per_unit=99, seed=0, part=part, fraction=0.25)
        found[part] = {item.source for item in source.items(0)}
    assert not found["train"] & found["held_out"] and len(found["train"] | found["held_out"]) == 16
    assert {name.partition("/")[0] for name in found["held_out"]} == {"cat", "dog"}  # one owl is kept for training
    assert sum(name.startswith("cat") for name in found["held_out"]) == 3

    run(config(pets, tmp_path / "out", held_out_fraction=0.25))
    assert manifest_of(tmp_path / "out").count == 12 and manifest_of(tmp_path / "out", "held_out").count == 4
    assert manifest_of(tmp_path / "out", "held_out").class_names == ("cat", "dog", "owl")


def test_a_fraction_is_refused_where_there_is_no_folder_to_divide(pets, tmp_path):
    for fields in ({"source": "digits"}, {"held_out": str(pets)}):
        with pytest.raises(ConfigError, match="held_out_fraction: it divides a folder"):
            run(config(pets, tmp_path / "out", **{"held_out_fraction": 0.1, **fields}))


@pytest.mark.parametrize("separately", [False, True])
def test_splits_of_different_classes_are_refused(pets, tmp_path, separately):
    other = tmp_path / "other"
    class_folder(other, "dog", 2)
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"label 0 is '(cat|dog)' in .* and '(cat|dog)' in"):
        if separately:
            run(config(pets, out, split="train"))
            run(config(other, out, split="held_out"))
        else:
            run(config(pets, out, held_out=str(other)))
    (other / "cat").mkdir()  # an empty class folder keeps its label
    run(config(other, tmp_path / "b", held_out=str(pets)))
    assert manifest_of(tmp_path / "b").class_names == ("cat", "dog")


def test_a_photo_that_lies_on_its_side_is_turned_as_its_exif_says(tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30], pixels[:, 30:] = (255, 0, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise: what is left comes to the top
    Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "x.jpg") as image:
        found = center_crop(image, 16)
    assert found[0, :6].mean() > 200 and found[2, :6].mean() < 50
    assert found[0, 10:].mean() < 50 and found[2, 10:].mean() > 200


def test_a_fifo_among_the_images_is_left_out_and_waited_for_by_nobody(pets, tmp_path):
    import os

    os.mkfifo(pets / "cat" / "pipe.png")
    assert (
        main(["--source", str(pets), "--out", str(tmp_path / "out"), "--image-size", "16", "--launcher", "here"]) == 0
    )
    assert manifest_of(tmp_path / "out").left_out == ("cat/pipe.png",)


def test_training_refuses_held_out_shards_of_other_classes(pets, tmp_path):
    other = tmp_path / "other"
    class_folder(other, "dog", 4)
    run(config(pets, tmp_path / "a", image_size=8))
    run(config(other, tmp_path / "b", image_size=8))
    arch = Arch(hidden_size=32, num_layers=1, num_heads=2, patch_size=2, in_channels=3, input_size=8, num_classes=2)
    check_held_out(DataConfig(shards=str(tmp_path / "a/train"), held_out=str(tmp_path / "a/train")), arch)
    with pytest.raises(DataError, match=r"label 0 is 'cat' in .* and 'dog' in"):
        check_held_out(DataConfig(shards=str(tmp_path / "a/train"), held_out=str(tmp_path / "b/train")), arch)


def test_images_without_class_folders_are_one_class(tmp_path):
    root = tmp_path / "photos"
    class_folder(root, "x", 4)
    for path in (root / "x").iterdir():
        path.rename(root / path.name)
    (root / "x").rmdir()
    run(config(root, tmp_path / "out", held_out_fraction=0.25))
    assert manifest_of(tmp_path / "out").class_names == ("all",) and manifest_of(tmp_path / "out").count == 3
