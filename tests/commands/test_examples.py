"""The examples are run as they are: own pictures through a tiny random autoencoder, and the tour's cells."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def load_script(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("labelled", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_own_pictures_become_a_family_and_a_picture(labelled, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(24):
        folder = tmp_path / "photos" / ("cats" if i % 2 else "dogs") if labelled else tmp_path / "photos"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 17, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=4,
        scaling_factor=0.5,
    ).save_pretrained(tmp_path / "vae")
    script = load_script(ROOT / "examples" / "own_images" / "run.py")
    words = ["photos", "--vae", "vae", "--size", "16", "--arch", "DiT-S/2-L2", "--depths", "1", "--steps", "4"]
    words += ["--init-steps", "2", "--batch", "4", "--count", "4", "--sampler-steps", "2", "--held-out-fraction", "0.2"]
    assert script.main(words) == 0
    out = tmp_path / "runs" / "own_images"
    manifest = json.loads((out / "data" / "train" / "manifest.json").read_text())
    names = ["cats", "dogs"] if labelled else ["all"]
    assert manifest["class_names"] == names and manifest["latent_shape"] == [4, 8, 8]
    held_out = json.loads((out / "data" / "held_out" / "manifest.json").read_text())
    assert manifest["count"] + held_out["count"] == 24 and 4 <= held_out["count"] <= 8
    assert np.load(out / "samples" / "samples.npy").shape == (4, 4, 8, 8)
    assert Image.open(out / "samples" / "samples.png").size[0] > 4 * 64
    index = json.loads((out / "pipeline" / "model_index.json").read_text())
    assert index["id2label"] == {str(i): name for i, name in enumerate(names)} and (out / "pipeline" / "vae").is_dir()


def test_the_tour_runs_cell_by_cell(tmp_path, monkeypatch):
    notebook = json.loads((ROOT / "examples" / "tour.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5 and not any(cell.get("outputs") for cell in notebook["cells"])
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in cells:
        exec(compile(cell, "tour.ipynb", "exec"), names)
    assert (tmp_path / "runs" / "tour" / "samples.png").exists()
    assert (tmp_path / "runs" / "tour" / "dense" / "manifest.json").exists()
    assert names["model"].arch.num_layers == 4 and names["learngene"].about["method"]["name"] == "fine"
