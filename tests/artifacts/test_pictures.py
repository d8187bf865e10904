"""Latents to pictures, pictures to disk: a VAE that fits, streams that overlap, stores that know what is missing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fine_dist.artifacts.autoencoder import Decoder, decode_batches
from fine_dist.core.errors import ArtifactError, DataError
from fine_dist.diffusion.samplers import SampledBatch
from fine_dist.sampling.image_store import ImageStore


def latents(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_pictures_are_the_vaes_own_decoding_of_unscaled_latents(vae):
    from diffusers import AutoencoderKL

    pictures = Decoder(vae, scaling_factor=0.5, batch=2).decode(latents())
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(vae).eval().decode(latents() / 0.5).sample
    assert pictures.shape == (5, 3, 16, 16) and pictures.dtype == torch.uint8
    assert (pictures.float() - ((expected + 1) * 127.5).clamp(0, 255)).abs().max() <= 0.51  # rounded


def test_half_precision_gives_nearly_the_same_pictures(vae):
    full, half = (Decoder(vae, precision=p).decode(latents()).float() for p in ("fp32", "bf16"))
    assert 0 < (full - half).abs().max() < 16  # bf16 keeps 8 bits of each activation


def test_a_vae_that_did_not_make_the_latents_is_refused(vae, tmp_path):
    with pytest.raises(ArtifactError, match=r"0.5, and the latents .* by 0.18215"):
        Decoder(vae, scaling_factor=0.18215)
    with pytest.raises(ArtifactError, match="no autoencoder can be loaded"):
        Decoder(tmp_path)
    with pytest.raises(DataError, match=r"the VAE decodes \[B, 4, h, w\]"):
        Decoder(vae).decode(torch.zeros(1, 3, 8, 8))


def test_the_next_batch_is_drawn_while_one_is_decoded_and_order_is_kept(vae):
    decoder, drawn = Decoder(vae), []

    def batches():
        for i in range(3):
            drawn.append(i)
            yield SampledBatch(torch.tensor([i]), torch.tensor([0]), latents()[i : i + 1])

    seen = []
    for batch, pictures in decode_batches(batches(), decoder):
        seen.append((int(batch.indices), len(drawn)))
        assert torch.equal(pictures, decoder.decode(batch.latents))
    assert seen == [(0, 2), (1, 3), (2, 3)]


def test_an_error_in_decoding_reaches_the_caller(vae):
    with pytest.raises(DataError, match="the VAE decodes"):
        list(
            decode_batches([SampledBatch(torch.tensor([0]), torch.tensor([0]), torch.zeros(1, 3, 8, 8))], Decoder(vae))
        )


# --- the store -------------------------------------------------------------------------------------------------------


def images(count: int = 10) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def open_store(folder, **identity) -> ImageStore:
    return ImageStore(folder, 10, (4, 6), 3, {"model": "abc", "seed": 0, **identity})


def test_what_a_killed_process_left_is_made_by_the_next_and_becomes_one_npz(tmp_path):
    x = images()
    with open_store(tmp_path / "s") as store:
        store.write(torch.tensor([7, 2, 3]), x[[7, 2, 3]])
        assert store.missing().tolist() == [0, 1, 4, 5, 6, 8, 9]
        with pytest.raises(DataError, match="7 of 10 images are missing"):
            store.to_npz(tmp_path / "s.npz")
    for rank in (0, 1):
        with open_store(tmp_path / "s") as store:
            mine = store.missing(rank, 2)
            assert mine.tolist() == [[0, 4, 6, 8], [1, 5, 9]][rank]
            store.write(mine, x[mine])
    with open_store(tmp_path / "s") as store:
        assert len(store.missing()) == 0
        store.to_npz(tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as found:
        assert np.array_equal(found["arr_0"], x.permute(0, 2, 3, 1))


def test_images_of_something_else_are_not_mixed_in(tmp_path):
    open_store(tmp_path / "s").close()
    with pytest.raises(DataError, match=r"seed: 0 there, 1 now"):
        open_store(tmp_path / "s", seed=1)
    with pytest.raises(DataError, match="count: 10 there, 11 now"):
        ImageStore(tmp_path / "s", 11, (4, 6), 3, {"model": "abc", "seed": 0})
    with open_store(tmp_path / "s") as store, pytest.raises(DataError, match="not uint8"):
        store.write(torch.tensor([0]), torch.zeros(1, 3, 5, 6, dtype=torch.uint8))
    (tmp_path / "s" / "store.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        open_store(tmp_path / "s")
