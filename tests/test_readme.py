"""README's commands do what it says, at small sizes: a tiny checkpoint in DiT's layout, latents and autoencoder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from fine_dist.__main__ import main as fine_dist
from fine_dist.artifacts.dit_pt import write_dit
from fine_dist.data.shards import write_shards
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT
from tests.conftest import in_process

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = {
    "DiT-XL-2-256x256.pt": "tiny.pt",
    "stabilityai/sd-vae-ft-ema": "vae",
    "--depths 8 14 20": "--depths 2 4",
    "8 14 18 22": "2 3",
    "--steps 30000": "--steps 4 --batch 8",
    "L14": "L2",
}
"""What the recipe says, and what stands for it here."""


def blocks(heading: str) -> list[str]:
    """The commands of the first shell block under a heading, joined over continued lines, without comments."""
    section = README.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    text = re.search(r"```sh\n(.*?)```", section, re.S)[1].replace("\\\n", " ")
    return [line.partition("  #")[0].strip() for line in text.splitlines() if line.strip()]


def run(line: str) -> tuple[int, str]:
    """A command line of README: its exit code and what it said."""
    words = shlex.split(line)
    assert words[0] == "fine-dist"
    done = in_process(fine_dist, words[1:])
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A user's folder: a checkpoint of 4 layers, latents of 4x8x8 and an autoencoder that decodes them to 16 pixels."""
    from diffusers import AutoencoderKL

    root = tmp_path_factory.mktemp("user")
    torch.manual_seed(0)
    arch = Arch(hidden_size=48, num_layers=4, num_heads=4, patch_size=2, in_channels=4, input_size=8, num_classes=5)
    model = DiT(arch)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05)
    write_dit(root / "tiny.pt", arch, model.state_dict())
    rng = np.random.default_rng(0)
    write_shards(
        root / "data" / "imagenet256" / "train",
        rng.standard_normal((64, 4, 8, 8)).astype(np.float32),
        rng.integers(0, 5, 64),
        num_classes=5,
        shard_samples=8,
        codec="stabilityai/sd-vae-ft-ema",
    )
    AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=4,
        scaling_factor=1.0,
    ).save_pretrained(root / "vae")
    return root


@pytest.mark.distributed
def test_the_recipe_from_a_public_checkpoint_runs_as_printed(folder, monkeypatch):
    monkeypatch.chdir(folder)
    said = {}
    for line in blocks("From a public checkpoint to small models"):
        for there, here in SMALL.items():
            line = line.replace(there, here)
        command = line.split()[1]
        if command == "condense":
            line += " --hints.num-heads 4"  # a width that is none of DiT's; the message asks for this flag
        if command == "init":
            line += " --steps 3 --batch 8"
        if command == "sample":
            line += " --sampler.steps 4 --per-class 1"
        code, said[command] = run(line)
        assert code == 0 and "Traceback" not in said[command], f"{line}\n{said[command]}"
    assert list(said) == ["condense", "init", "sample", "export"]
    assert "decomposed" in said["condense"] and "runs/condense" in said["condense"]
    assert "L2-s0-lr0.01" in said["init"] and "L4-s0-lr0.01" in said["init"]
    assert (folder / "runs" / "samples" / "compare.png").is_file() and (folder / "models" / "l14").is_dir()


def test_a_width_without_known_heads_is_answered_with_the_flag(folder, monkeypatch):
    monkeypatch.chdir(folder)
    line = "fine-dist condense --ancestor tiny.pt --data.shards data/imagenet256/train --dry-run"
    code, said = run(line)
    assert code == 2 and "--hints.num-heads" in said, said


def test_readme_is_short_and_names_only_commands_and_files_that_are_there():
    words = len(re.sub(r"```.*?```", "", README, flags=re.S).split())
    assert words <= 1200, f"README has {words} words"
    from fine_dist.__main__ import COMMANDS

    for command in re.findall(r"fine-dist ([a-z][a-z-]*)", README):
        assert command in COMMANDS or command == "COMMAND", command
    for path in re.findall(r"(?:configs|slurm)/[\w./-]+", README):
        assert (ROOT / path).exists() or path == "slurm/site.sh", path
