"""What a training run relies on when it reads a LatentStream."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from fine_dist.core.errors import DataError
from fine_dist.data.settings import DataConfig
from fine_dist.data.shards import write_shards
from fine_dist.data.stream import LatentStream, read_all
from fine_dist.model.arch import Arch
from fine_dist.testing import run_distributed
from tests.data.making import UNEVEN, make, make_foreign, numbers, sample, stream, take

TOTAL = sum(UNEVEN)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make(folder)
    return folder


def gathered(folder, world_size: int, steps: int, start: int = 0, **fields) -> torch.Tensor:
    """Global batches [steps, B] put together from what each rank reads."""
    ranks = [take(stream(folder, rank=r, world_size=world_size, **fields), steps, start) for r in range(world_size)]
    for step in range(steps):
        positions = torch.cat([rank[step].positions for rank in ranks])
        assert positions.tolist() == list(range(12)) and {rank[step].step for rank in ranks} == {start + step}
    return torch.cat([numbers(rank) for rank in ranks], dim=1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_order_of_global_batches_is_the_same_for_any_number_of_processes_and_workers(shards, world_size, workers):
    expected = numbers(take(stream(shards), 50))
    assert torch.equal(gathered(shards, world_size, 50, workers=workers), expected)


def test_every_sample_comes_exactly_as_often_as_epochs_have_passed(shards):
    # 12 epochs are a whole number of batches of 12, whatever the number of samples
    seen = Counter(gathered(shards, 2, TOTAL, workers=1).flatten().tolist())
    assert seen == Counter({number: 12 for number in range(TOTAL)})


def read_ids(folder: str, steps: int) -> list[list[int]]:
    """Run on each rank."""
    import os

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return numbers(take(stream(folder, rank=rank, world_size=world_size, workers=1), steps)).tolist()


@pytest.mark.distributed
def test_real_processes_read_the_parts_of_one_order(shards):
    parts = run_distributed(read_ids, 2, str(shards), 30)
    expected = numbers(take(stream(shards), 30))
    assert torch.equal(torch.cat([torch.tensor(part) for part in parts], dim=1), expected)


def test_resuming_in_the_middle_of_an_epoch_gives_the_next_100_batches_of_an_uninterrupted_read(shards):
    whole = take(stream(shards), 111)
    again = take(stream(shards, workers=2), 100, start=11)
    for one, other in zip(whole[11:], again):
        assert (one.step, one.epoch) == (other.step, other.epoch)
        assert torch.equal(one.latents, other.latents) and torch.equal(one.labels, other.labels)


def test_resuming_at_a_thousand_shards_is_ready_in_seconds(tmp_path):
    make(tmp_path, [2] * 1000)
    started = time.perf_counter()
    (batch,) = take(stream(tmp_path, global_batch=64, streams=64, window=8), 1, start=28)
    # 28 x 64 is 90% of the epoch; measured: 0.1 s on a quiet machine
    assert time.perf_counter() - started < 5 and batch.epoch == 0


def test_an_epoch_s_tail_shares_a_batch_with_the_next_epoch_s_head(shards):
    batches = take(stream(shards), 40)
    first = numbers(batches).flatten()[: 18 * 12]
    assert [batch.epoch for batch in batches] == [step * 12 // TOTAL for step in range(40)]
    assert len(set(first.tolist())) == 18 * 12  # 220 = 18 x 12 + 4: no sample twice before the epoch's tail
    assert TOTAL == 220


def test_another_seed_is_another_order(shards):
    assert not torch.equal(numbers(take(stream(shards, seed=4), 10)), numbers(take(stream(shards), 10)))


def test_one_shard_serves_many_processes(tmp_path):
    make(tmp_path, [30])
    expected = numbers(take(stream(tmp_path, streams=64), 10))
    assert torch.equal(gathered(tmp_path, 4, 10, streams=64), expected)
    assert sorted(expected.flatten()[:24].tolist()) != list(range(24))


def test_a_data_set_smaller_than_a_batch_repeats_within_it(tmp_path):
    make(tmp_path, [5])
    seen = Counter(numbers(take(stream(tmp_path), 5)).flatten().tolist())
    assert seen == Counter({number: 12 for number in range(5)})


def test_a_batch_that_cannot_be_divided_over_the_processes_is_refused_with_the_remedy(shards):
    with pytest.raises(DataError, match="12 cannot be divided over 5 processes; use a multiple of 5, such as 10"):
        stream(shards, world_size=5)


def test_shards_that_do_not_fit_the_model_are_refused_before_any_step(shards):
    arch = Arch(in_channels=4, input_size=8, num_classes=10)
    with pytest.raises(DataError, match="latents are 1x4x4, but the model takes 4x8x8"):
        stream(shards, expect=arch)
    with pytest.raises(DataError, match="10 classes, but the model has 3"):
        stream(shards, expect=Arch(in_channels=1, input_size=4, num_classes=3))
    stream(shards, expect=Arch(in_channels=1, input_size=4, num_classes=10)).close()


def test_latents_are_scaled_once(tmp_path):
    latents = np.random.default_rng(0).standard_normal((20, 4, 8, 8)).astype(np.float16)
    write_shards(tmp_path, latents, np.zeros(20), num_classes=1, scaling_factor=0.18215, shard_samples=7)
    expected = torch.from_numpy(latents).float() * 0.18215
    found, labels = read_all(str(tmp_path))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    (batch,) = take(stream(tmp_path, global_batch=20), 1)
    order = [int((expected == latent).flatten(1).all(1).nonzero()[0]) for latent in batch.latents]
    assert sorted(order) == list(range(20)) and labels.tolist() == [0] * 20
    assert read_all(str(tmp_path), limit=9)[0].shape == (9, 4, 8, 8)


def test_a_part_of_shards_that_are_sorted_by_class_is_of_all_classes(tmp_path):
    labels = np.repeat(np.arange(10), 20)
    write_shards(tmp_path, np.zeros((200, 1, 2, 2)), labels, num_classes=10, shard_samples=32)
    found = read_all(str(tmp_path), limit=100)[1]
    assert found.unique().tolist() == list(range(10))
    assert torch.equal(found, read_all(str(tmp_path), limit=100)[1])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_batch_has_the_shards_dtype_and_becomes_float32_bit_for_bit_wherever_it_is_cut(tmp_path, dtype):
    latents = np.random.default_rng(0).standard_normal((24, 4, 8, 8)).astype(dtype)
    write_shards(tmp_path, latents, np.arange(24), num_classes=24, scaling_factor=0.18215, dtype=dtype)
    (batch,) = take(stream(tmp_path, global_batch=24), 1)
    assert batch.stored.dtype == getattr(torch, dtype)
    assert torch.equal(batch.stored, torch.from_numpy(latents)[batch.labels])
    # one float32 product a number: what the reader itself once gave, and what any device gives
    expected = torch.from_numpy(latents.astype(np.float32) * np.float32(0.18215))[batch.labels]
    assert torch.equal(batch.latents, expected)
    assert torch.equal(batch.part(5, 7).latents, expected[5:12])


def test_losses_are_the_same_whether_latents_come_as_stored_or_as_float32(tmp_path):
    from fine_dist.diffusion.objective import Objective
    from fine_dist.diffusion.settings import DiffusionConfig

    latents = np.random.default_rng(0).standard_normal((24, 4, 8, 8)) / 0.18215
    write_shards(tmp_path, latents, np.zeros(24), num_classes=1, scaling_factor=0.18215)
    objective = Objective(
        DiffusionConfig(), Arch(in_channels=4, input_size=8, num_classes=1, learn_sigma=False), seed=0
    )
    for batch in take(stream(tmp_path), 3):
        whole = replace(
            batch, stored=torch.from_numpy(batch.stored.numpy().astype(np.float32) * np.float32(0.18215)), scale=1.0
        )
        assert torch.equal(*(objective(lambda z, t, y: z.tanh(), each) for each in (batch, whole)))


def test_moments_are_sampled_by_seed_step_and_position_and_have_the_moments(tmp_path):
    mean, std = np.full((60, 2, 8, 8), 3.0), np.full((60, 2, 8, 8), 0.5)
    moments = np.concatenate([mean, std], 1)
    write_shards(tmp_path, moments, np.zeros(60), num_classes=1, kind="moments", scaling_factor=2.0, shard_samples=20)
    whole = take(stream(tmp_path), 20)
    latents = torch.stack([batch.latents for batch in whole])
    assert latents.shape == (20, 12, 2, 8, 8)
    # 30,720 draws: the mean's error is 1 / sqrt(30720) = 0.006, five of them are allowed
    assert abs(latents.mean() - 6.0) < 0.03 and abs(latents.std() - 1.0) < 0.03
    halves = [take(stream(tmp_path, rank=r, world_size=2), 20) for r in range(2)]
    assert torch.equal(torch.cat([halves[0][7].latents, halves[1][7].latents]), whole[7].latents)
    assert not torch.equal(whole[0].latents, whole[5].latents)
    assert read_all(str(tmp_path))[0].unique().tolist() == [6.0]


def test_plain_webdataset_reads_our_shards(shards):
    import webdataset as wds

    paths = sorted(str(path) for path in shards.glob("*.tar"))
    rows = wds.WebDataset(paths, shardshuffle=False, empty_check=False)
    rows = rows.decode(wds.handle_extension("latent.npy", _npy))
    found = [(int(row["cls"]), row["latent.npy"]) for row in rows]
    assert len(found) == TOTAL
    for number, (label, latent) in enumerate(found):
        assert label == number % 10 and latent.dtype == np.float16 and (latent == number).all()


def _npy(content: bytes) -> np.ndarray:
    import io

    return np.load(io.BytesIO(content), allow_pickle=False)


def test_tars_of_another_program_are_read_with_a_manifest_made_by_index(tmp_path):
    from fine_dist.encode import main

    make_foreign(tmp_path, [[sample(i) for i in range(30)], [sample(i) for i in range(30, 77)]], manifest=False)
    with pytest.raises(DataError, match=r"2 tar files but no manifest\.json; write one with"):
        stream(tmp_path)
    assert main(["--index", str(tmp_path), "--num-classes", "10"]) == 0
    seen = Counter(gathered(tmp_path, 2, 77, workers=1).flatten().tolist())
    assert seen == Counter({number: 12 for number in range(77)})
    assert read_all(str(tmp_path))[1].tolist() == [i % 10 for i in range(77)]


def test_a_brace_pattern_names_some_of_the_shards(shards):
    with stream(f"{shards}/latents-{{000001..000003}}.tar") as part:
        assert part.manifest.count == 31 + 1 + 50
        found = numbers([next(part.batches())])
    assert found.min() >= 7 and found.max() < 7 + 82
    with pytest.raises(DataError, match=r"latents-000010.tar is not in .*manifest.json, which lists 10 shards"):
        stream(f"{shards}/latents-{{000009..000010}}.tar")


def test_what_is_no_folder_of_shards_says_so(tmp_path):
    with pytest.raises(DataError, match="no such folder of shards"):
        stream(tmp_path / "absent")
    with pytest.raises(DataError, match=r"no manifest\.json and no shards"):
        stream(tmp_path)
    with pytest.raises(DataError, match=r"set data\.shards"):
        LatentStream(DataConfig(), seed=0, global_batch=1)


def test_the_time_spent_waiting_is_known(shards):
    source = stream(shards)
    take(source, 3)
    assert 0 < source.waited_s < 5 and source.bad == 0
