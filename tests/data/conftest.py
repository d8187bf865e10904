"""A folder of images that several files encode."""

from __future__ import annotations

import pytest

from tests.data.picturing import picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of 12, 9 and 4 images of several kinds, sizes and modes, and a file that is none."""
    root = tmp_path_factory.mktemp("images")
    for label, (name, count) in enumerate([("n01_cat", 12), ("n02_dog", 9), ("n03_owl", 4)]):
        (root / name).mkdir()
        for i in range(count):
            image = picture(100 * label + i, 40 + 7 * i, 50 + 3 * i)
            kind = ("JPEG", "png", "jpg")[i % 3]
            if i == 2:
                image = image.convert("L")
            if i == 4:
                image, kind = image.convert("RGBA"), "png"
            image.save(root / name / f"{i}.{kind}", "PNG" if kind == "png" else "JPEG")
        (root / name / "notes.txt").write_text("no image")
    return root
