"""Autoencoders of every sort, there and back: the decoder undoes what the stream scales, as diffusers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fine_dist.artifacts.autoencoder import Decoder
from fine_dist.artifacts.load import load_model
from fine_dist.artifacts.model_facts import model_facts_of
from fine_dist.core.errors import ArtifactError, ConfigError, DataError
from fine_dist.data.manifest import Manifest
from fine_dist.data.stream import read_all
from fine_dist.encode import EncodeConfig, run
from tests.commands.conftest import FAST, command, refused

SIDE = 16


def kl(**config: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        **config,
    )


def deep_compression() -> Any:
    from diffusers import AutoencoderDC

    return AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.4,
    )


def tiny() -> Any:
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )


def representation() -> Any:
    from diffusers import AutoencoderRAE

    return AutoencoderRAE(
        encoder_type="mae",
        encoder_hidden_size=64,
        encoder_patch_size=4,
        encoder_num_hidden_layers=1,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        patch_size=4,
        encoder_input_size=SIDE,
        image_size=SIDE,
        latents_mean=torch.full((64, 1, 1), 0.1),
        latents_std=torch.full((64, 1, 1), 2.0),
    )


MEAN, STD = [0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 0.25]
CLASSES: dict[str, Any] = {
    "scaled": lambda: kl(scaling_factor=0.5),
    "shifted": lambda: kl(scaling_factor=0.36, shift_factor=0.12),
    "by channel": lambda: kl(scaling_factor=0.5, latents_mean=MEAN, latents_std=STD),
    "AutoencoderDC": deep_compression,
    "AutoencoderTiny": tiny,
    "AutoencoderRAE": representation,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Twelve pictures of two classes, of the size that is encoded: nothing is resampled."""
    root = tmp_path_factory.mktemp("images")
    for label in ("a", "b"):
        (root / label).mkdir()
        for i in range(6):
            rng = np.random.default_rng(10 * ord(label) + i)
            Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(root / label / f"{i}.png")
    return root


def encode(images: Path, vae: Path, out: Path, **fields: Any) -> Manifest:
    settings = {"kind": "moments", "dtype": "float32", "codec": "vae", "image_size": SIDE, **fields}
    run(EncodeConfig(source=str(images), out=str(out), vae=str(vae), **settings))
    return Manifest.parse((out / "train" / "manifest.json").read_bytes(), "")


def saved(name: str, folder: Path) -> Any:
    torch.manual_seed(0)
    vae = CLASSES[name]()
    vae.save_pretrained(folder)
    return vae.eval()


def pictures(images: Path) -> torch.Tensor:
    files = sorted(images.glob("*/*.png"))
    return torch.stack([torch.from_numpy(np.asarray(Image.open(path))).permute(2, 0, 1) for path in files])


@torch.no_grad()
def reconstructed(name: str, vae: Any, images: Path) -> torch.Tensor:
    """Images [N, 3, H, W] after encoding and decoding, by diffusers alone, 0 to 255."""
    x = pictures(images).float() / 255
    if name == "AutoencoderRAE":  # its images are 0 to 1
        return vae.decode(vae.encode(x).latent).sample * 255
    found = vae.encode(2 * x - 1)
    z = found.latent_dist.mean if hasattr(found, "latent_dist") else getattr(found, "latent", None)
    z = found.latents if z is None else z
    return (vae.decode(z).sample + 1) * 127.5


@pytest.mark.parametrize("name", CLASSES)
def test_what_encode_and_the_stream_make_of_images_the_decoder_turns_back_as_diffusers_does(name, images, tmp_path):
    vae = saved(name, tmp_path / "vae")
    kind = "moments" if isinstance(vae, type(kl())) else "sample"
    manifest = encode(images, tmp_path / "vae", tmp_path / "out", kind=kind)
    latents, _ = read_all(str(tmp_path / "out" / "train"))
    decoder = Decoder(tmp_path / "vae", scaling_factor=manifest.scale, shift_factor=manifest.shift, batch=5)
    found, expected = decoder.decode(latents).float(), reconstructed(name, vae, images).clamp(0, 255)
    assert found.shape == (12, 3, SIDE, SIDE) and expected.std() > 1
    distance = torch.cdist(found.flatten(1), expected.flatten(1), p=float("inf"))
    assert (distance.min(1).values <= 0.52).all()  # rounded to a level; shards are in an order of their own
    assert sorted(distance.argmin(1).tolist()) == list(range(12))


def test_channels_have_their_own_scale_and_shift_in_the_stream(images, tmp_path):
    saved("by channel", tmp_path / "vae")
    scales = {kind: encode(images, tmp_path / "vae", tmp_path / kind, kind=kind) for kind in ("moments", "sample")}
    for manifest in scales.values():
        assert manifest.channel_scale == pytest.approx([0.5 / value for value in STD])
        assert manifest.channel_shift == pytest.approx(MEAN)
    whole, _ = read_all(str(tmp_path / "moments" / "train"))
    stored = torch.tensor(scales["moments"].channel_mean)
    expected = (stored - torch.tensor(MEAN)) * 0.5 / torch.tensor(STD)  # as a pipeline of diffusers computes it
    torch.testing.assert_close(whole.mean((0, 2, 3)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["moments", "sample"])
def test_normalized_channels_have_mean_0_and_deviation_1_and_held_out_ones_the_same_scale(kind, images, tmp_path):
    vae = saved("shifted", tmp_path / "vae")
    fields = {"kind": kind, "held_out_fraction": 0.34, "normalize_channels": True}
    train = encode(images, tmp_path / "vae", tmp_path / "out", **fields)
    held_out = Manifest.parse((tmp_path / "out" / "held_out" / "manifest.json").read_bytes(), "")
    assert train.channel_scale == held_out.channel_scale and train.channel_shift == held_out.channel_shift
    assert train.channel_mean != held_out.channel_mean
    latents, _ = read_all(str(tmp_path / "out" / "train"))
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(4), atol=1e-4, rtol=0)
    decoder = Decoder(tmp_path / "vae", scaling_factor=train.scale, shift_factor=train.shift)
    mean = torch.tensor(train.channel_mean)[:, None, None].expand(1, 4, SIDE // 2, SIDE // 2)
    with torch.no_grad():
        flat = ((vae.decode(mean).sample + 1) * 127.5).clamp(0, 255)
    assert (decoder.decode(torch.zeros(1, 4, SIDE // 2, SIDE // 2)).float() - flat).abs().max() <= 0.51


def test_a_model_remembers_the_scale_of_its_latents_and_is_sampled_with_it(images, tmp_path, capsys):
    saved("shifted", tmp_path / "vae")
    train = encode(images, tmp_path / "vae", tmp_path / "out", normalize_channels=True)
    shape = ["--arch.hidden-size", "32", "--arch.num-layers", "2", "--arch.num-heads", "4"]
    argv = ["train", *shape, *FAST, "--data.shards", str(tmp_path / "out" / "train"), "--vae", str(tmp_path / "vae")]
    assert command([*argv, "--run-dir", str(tmp_path / "t")]) == 0
    facts = model_facts_of(load_model(tmp_path / "t")[1])
    assert facts.scaling_factor == pytest.approx(train.channel_scale)
    assert facts.shift_factor == pytest.approx(train.channel_shift)
    draw = ["sample", "--model", str(tmp_path / "t"), "--vae", str(tmp_path / "vae"), "--sampler.steps", "2"]
    assert command([*draw, "--per-class", "1", "--formats", "npz", "npy", "--run-dir", str(tmp_path / "s")]) == 0
    latents = torch.from_numpy(np.load(tmp_path / "s" / "samples.npy"))
    expected = Decoder(tmp_path / "vae", scaling_factor=train.scale, shift_factor=train.shift).decode(latents)
    drawn = torch.from_numpy(np.load(tmp_path / "s" / "samples.npz")["arr_0"]).permute(0, 3, 1, 2)
    assert (drawn.int() - expected.int()).abs().max() <= 1
    export = ["export", "--model", str(tmp_path / "t"), "--to", "diffusers", "--vae", str(tmp_path / "vae")]
    assert "scale for each channel" in refused([*export, "--out", str(tmp_path / "x")], capsys)


def test_an_autoencoder_without_the_shift_of_the_latents_is_one_line(images, tmp_path):
    saved("shifted", tmp_path / "shifted")
    kl(scaling_factor=0.36).save_pretrained(tmp_path / "plain")
    manifest = encode(images, tmp_path / "shifted", tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"its shift_factor is none, and the latents .* shifted by 0.12: it is not"):
        Decoder(tmp_path / "plain", scaling_factor=manifest.scale, shift_factor=manifest.shift)
    with pytest.raises(ArtifactError, match=r"shift_factor is 0.12, and the latents .* shifted by 0: it is not"):
        Decoder(tmp_path / "shifted", scaling_factor=0.36, shift_factor=0.0)
    saved("by channel", tmp_path / "channels")
    with pytest.raises(ArtifactError, match="scaling_factor is one for each channel"):
        Decoder(tmp_path / "channels", scaling_factor=0.5)
    with pytest.raises(ArtifactError, match=r"is 0.12, and the latents .* shifted by one for each"):
        Decoder(tmp_path / "shifted", scaling_factor=0.36, shift_factor=(0.1, 0.2, 0.3, 0.4))


def test_a_ddpm_pipeline_that_would_not_undo_a_shift_is_not_written(tmp_path):
    from fine_dist.artifacts.diffusers_export import write_diffusers
    from fine_dist.diffusion.settings import DiffusionConfig
    from fine_dist.model.dit import DiT
    from tests.conftest import tiny_arch

    saved("shifted", tmp_path / "vae")
    arch = tiny_arch(in_channels=4, num_layers=1)
    state = DiT(arch).state_dict()
    with pytest.raises(ConfigError, match=r"a shift of 0.12, which the exported pipeline would not undo"):
        write_diffusers(tmp_path / "x", arch, state, vae=tmp_path / "vae")
    report = write_diffusers(
        tmp_path / "y", arch, state, vae=tmp_path / "vae", diffusion=DiffusionConfig(process="flow")
    )
    assert report.pipeline and not (tmp_path / "x").exists()


def test_what_cannot_be_normalized_or_read_is_one_line(images, tmp_path, capsys):
    saved("scaled", tmp_path / "vae")
    with pytest.raises(ConfigError, match=r"split held_out is scaled by the statistics of .*encode the split train"):
        encode(images, tmp_path / "vae", tmp_path / "out", split="held_out", normalize_channels=True)
    flat = tmp_path / "flat" / "a"
    flat.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(flat / "0.png")
    with pytest.raises(DataError, match="normalize_channels: channel 0 has the same value everywhere"):
        run(EncodeConfig(source=str(flat.parent), out=str(tmp_path / "f"), image_size=8, normalize_channels=True))
    encode(images, tmp_path / "vae", tmp_path / "ok", normalize_channels=True)
    path = tmp_path / "ok" / "train" / "manifest.json"
    made = json.loads(path.read_text())
    path.write_text(json.dumps({**made, "channel_shift": made["channel_shift"][:2]}))
    with pytest.raises(DataError, match="channel_scale and channel_shift have 4 and 2 numbers, and latents 4 channels"):
        read_all(str(tmp_path / "ok" / "train"))
