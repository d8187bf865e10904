"""Images through real autoencoders: moments, samples, mirror images, and what is no autoencoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from fine_dist.core.errors import ConfigError, DataError
from fine_dist.data.image_decoding import center_crop
from fine_dist.data.manifest import Manifest
from fine_dist.data.settings import DataConfig
from fine_dist.data.stream import LatentStream, read_all
from fine_dist.encode import main, run
from tests.data.picturing import config


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A tiny AutoencoderKL with random weights: 32 px to 4x8x8, saved as diffusers saves one."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.5,
    )
    path = tmp_path_factory.mktemp("vae")
    model.save_pretrained(path)
    return path, model.eval()


def reference(model, folder: Path) -> dict[tuple[bytes, int], torch.Tensor]:
    """Means and deviations of every image, one at a time, by its pixels."""
    found = {}
    for label, name in enumerate(sorted(path.name for path in folder.iterdir())):
        for path in (folder / name).iterdir():
            if path.suffix != ".txt":
                pixels = torch.from_numpy(center_crop(Image.open(path), 32)).float()[None] / 127.5 - 1
                with torch.no_grad():
                    dist = model.encode(pixels).latent_dist
                found[path.name, label] = torch.cat([dist.mean, dist.std], 1)[0]
    return found


def test_moments_are_the_autoencoder_s_and_the_stream_scales_them(folder, vae, tmp_path):
    path, model = vae
    run(config(folder, tmp_path, codec="vae", vae=str(path), kind="moments", dtype="float32"))
    latents, labels = read_all(str(tmp_path / "train"))
    manifest = Manifest.parse((tmp_path / "train" / "manifest.json").read_bytes(), "")
    assert manifest.latent_shape == (4, 8, 8) and manifest.stored_shape == (8, 8, 8)
    assert manifest.scaling_factor == 0.5 and manifest.codec == str(path)
    wanted = torch.stack([moments[:4] * 0.5 for moments in reference(model, folder).values()])
    assert len(labels) == len(wanted) == 25
    distance = torch.cdist(latents.flatten(1), wanted.flatten(1))
    # batches of 4 against batches of 1: sums in another order, 1e-6 of values around 1, 256 of them
    assert (distance.min(1).values < 1e-3).all() and sorted(distance.argmin(1).tolist()) == list(range(25))


def test_samples_are_within_the_autoencoder_s_distribution_and_do_not_depend_on_who_drew_them(folder, vae, tmp_path):
    path, model = vae
    run(config(folder, tmp_path / "a", codec="vae", vae=str(path), dtype="float32"))
    run(config(folder, tmp_path / "m", codec="vae", vae=str(path), dtype="float32", kind="moments"))
    run(config(folder, tmp_path / "b", codec="vae", vae=str(path), dtype="float32", workers=1))
    latents, _ = read_all(str(tmp_path / "a" / "train"))
    mean, _ = read_all(str(tmp_path / "m" / "train"))
    stds = torch.stack([moments[4:] for moments in reference(model, folder).values()])
    noise = (latents - mean) / 0.5
    # 6,400 draws with deviation std: their root mean square is std's, to 1 / sqrt(2 * 6400) = 0.9%
    assert abs(noise.square().mean().sqrt() / stds.square().mean().sqrt() - 1) < 0.05
    assert torch.equal(latents, read_all(str(tmp_path / "b" / "train"))[0])


def test_mirror_images_are_entries_of_their_own(folder, vae, tmp_path):
    path, _ = vae
    run(config(folder, tmp_path / "pixels", flips=True, dtype="float32"))
    latents, labels = read_all(str(tmp_path / "pixels" / "train"))
    assert latents.shape[0] == 50 and torch.equal(labels[::2], labels[1::2])
    assert torch.equal(latents[::2].flip(-1), latents[1::2])
    run(config(folder, tmp_path / "vae", flips=True, codec="vae", vae=str(path), kind="moments", limit=6))
    manifest = Manifest.parse((tmp_path / "vae" / "train" / "manifest.json").read_bytes(), "")
    assert manifest.flips and manifest.count == 12 and manifest.shards[0].count == 8


def test_an_autoencoder_that_is_not_there_or_does_not_fit_says_so(folder, vae, tmp_path):
    path, _ = vae
    with pytest.raises(DataError, match="no autoencoder can be loaded"):
        run(config(folder, tmp_path, codec="vae", vae=str(tmp_path)))
    with pytest.raises(DataError, match="down-samples by 4; use a multiple of 4, such as 28"):
        run(config(folder, tmp_path, codec="vae", vae=str(path), image_size=30))


def test_a_transformer_where_an_autoencoder_is_needed_is_named_as_what_it_is(folder, tmp_path, capsys):
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(num_layers=1, num_attention_heads=2, attention_head_dim=8, sample_size=8)
    model.save_pretrained(tmp_path / "dit")
    argv = ["--source", str(folder), "--out", str(tmp_path / "out"), "--codec", "vae", "--vae", str(tmp_path / "dit")]
    assert main([*argv, "--launcher", "here"]) == 2
    assert "it is a DiTTransformer2DModel, and an autoencoder is needed" in capsys.readouterr().err


def test_a_shifted_autoencoder_s_latents_are_shifted_then_scaled(folder, vae, tmp_path):
    path, model = vae
    run(config(folder, tmp_path / "plain", codec="vae", vae=str(path), kind="moments", dtype="float32"))
    model.register_to_config(shift_factor=0.25)
    model.save_pretrained(tmp_path / "shifted")
    model.register_to_config(shift_factor=None)
    for kind in ("moments", "sample"):
        out = tmp_path / kind
        run(config(folder, out, codec="vae", vae=str(tmp_path / "shifted"), kind=kind, dtype="float32"))
        assert Manifest.parse((out / "train" / "manifest.json").read_bytes(), "").shift_factor == 0.25
    plain, _ = read_all(str(tmp_path / "plain" / "train"))
    shifted, _ = read_all(str(tmp_path / "moments" / "train"))
    torch.testing.assert_close(shifted, plain - 0.25 * 0.5)  # (x - shift) * scale, with scale 0.5

    def batch(shards: Path) -> torch.Tensor:
        with LatentStream(DataConfig(shards=str(shards / "train")), seed=0, global_batch=8) as stream:
            return next(stream.batches()).latents

    # the same noise moves both, so the samples differ by the shift alone
    torch.testing.assert_close(batch(tmp_path / "moments"), batch(tmp_path / "plain") - 0.25 * 0.5)
    assert batch(tmp_path / "sample").shape == (8, 4, 8, 8)


def test_an_autoencoder_of_another_class_gives_its_own_channels_and_sides(folder, tmp_path):
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    model = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.4,
    )
    model.save_pretrained(tmp_path / "dc")
    run(config(folder, tmp_path / "out", codec="vae", vae=str(tmp_path / "dc"), dtype="float32"))
    manifest = Manifest.parse((tmp_path / "out" / "train" / "manifest.json").read_bytes(), "")
    assert manifest.latent_shape == (8, 8, 8) and manifest.scaling_factor == pytest.approx(0.4)
    latents = read_all(str(tmp_path / "out" / "train"))[0] / 0.4
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.tensor(manifest.channel_mean), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        latents.std((0, 2, 3), correction=0), torch.tensor(manifest.channel_std), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ConfigError, match="has no moments"):
        run(config(folder, tmp_path / "m", codec="vae", vae=str(tmp_path / "dc"), kind="moments"))
