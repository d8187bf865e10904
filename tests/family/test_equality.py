"""A job's trajectory in a pack is its solo run's, whatever else is in the pack."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine import dist
from fine_dist.engine.settings import EngineConfig, OptimConfig
from fine_dist.family.pack_model import PackedDiT, PackInputs
from fine_dist.testing import run_distributed
from tests.conftest import inputs
from tests.family.tools import form, largest_difference, packed, sigma_of, solo, target

FAMILY = [(4, 0, 3e-2), (2, 0, 1e-2), (6, 1, 3e-2), (1, 2, 3e-3), (3, 1, 1e-2)]
STEPS = 50
# fp32 sums in another order differ by some 1e-7; 50 steps carry that to at most 1e-5 of a loss and 1e-4 of a sigma.
LOSS, SIGMA = 1e-5, 1e-4


def assert_equals_solo(run, recorder, learngene, data, points, steps, **how):
    for j, point in enumerate(points):
        losses, model = solo(learngene, point, data, steps, **how)
        assert recorder.losses[j] == pytest.approx(losses, rel=LOSS)
        assert largest_difference(run.pack.scalers(j), sigma_of(model)) < SIGMA
        moved = largest_difference(sigma_of(target(learngene, point[0], point[1])), sigma_of(model))
        assert moved > 100 * SIGMA  # the comparison is not between two runs that stood still


def test_mixed_depths_rates_and_seeds_train_as_each_would_alone(learngene, shards):
    run, recorder = packed(learngene, FAMILY, shards / "train", STEPS)
    assert run.train()
    assert_equals_solo(run, recorder, learngene, shards / "train", FAMILY, STEPS)


@pytest.mark.parametrize(
    "optim",
    [
        OptimConfig(warmup_steps=5, schedule="cosine", weight_decay=0.1, clip_norm=0.05),
        OptimConfig(clip_norm=None, betas=(0.8, 0.95), eps=1e-4),
    ],
)
def test_schedule_clipping_and_weight_decay_are_each_jobs_own(learngene, shards, optim):
    points = FAMILY[:3]
    run, recorder = packed(learngene, points, shards / "train", 20, optim=optim)
    assert run.train()
    assert_equals_solo(run, recorder, learngene, shards / "train", points, 20, optim=optim)


def test_a_pack_under_flow_matching_trains_each_job_as_it_would_alone(learngene, shards):
    how = {"diffusion": DiffusionConfig(process="flow", time="logit_normal", time_shift=2.0)}
    run, recorder = packed(learngene, FAMILY[:3], shards / "train", 20, **how)
    assert run.train()
    assert_equals_solo(run, recorder, learngene, shards / "train", FAMILY[:3], 20, **how)


@pytest.mark.parametrize(
    "scaling",
    [{"scaling_factor": 2.0, "shift_factor": 0.5}, {"channel_scale": [2.0], "channel_shift": [0.5]}],
    ids=["one", "by channel"],
)
def test_a_pack_shifts_and_scales_latents_as_a_run_alone_does(learngene, shards, scaling, tmp_path):
    shutil.copytree(shards / "train", tmp_path / "train")
    manifest = tmp_path / "train" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **scaling}))
    run, recorder = packed(learngene, FAMILY[:2], tmp_path / "train", 5)
    assert run.train()
    for j, point in enumerate(FAMILY[:2]):
        losses, _ = solo(learngene, point, tmp_path / "train", 5)
        assert recorder.losses[j] == pytest.approx(losses, rel=LOSS)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_how_many_jobs_go_through_at_once_changes_rounding_only(learngene, shards, chunk):
    whole, recorder = packed(learngene, FAMILY, shards / "train", 10)
    part, other = packed(learngene, FAMILY, shards / "train", 10, chunk=chunk)
    assert whole.train() and part.train()
    assert all(other.losses[j] == pytest.approx(recorder.losses[j], rel=LOSS) for j in range(len(FAMILY)))
    torch.testing.assert_close(part.pack.sigma, whole.pack.sigma, atol=SIGMA, rtol=0)


def test_a_packs_outputs_are_each_targets_own_in_the_order_asked_for(learngene):
    models = [target(learngene, depth) for depth in (2, 5, 3)]
    pack = PackedDiT([form(model) for model in models])
    z, t, y = inputs(learngene.arch, batch=4)
    seen = PackInputs(torch.stack([z.flip(0), z]), torch.stack([t.flip(0), t]), torch.stack([y.flip(0), y]))
    out = pack(seen, [0, 1])
    torch.testing.assert_close(out[0], models[0](z.flip(0), t.flip(0), y.flip(0)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[1], models[1](z, t, y), atol=1e-5, rtol=1e-5)
    one = PackInputs(z[None], t[None], y[None])
    torch.testing.assert_close(pack(one, [2])[0], models[2](z, t, y), atol=1e-5, rtol=1e-5)


def test_bf16_follows_fp32_and_keeps_sigma_in_fp32(learngene, shards):
    engine = EngineConfig(device="cpu", log_every=1, precision="bf16")
    run, recorder = packed(learngene, FAMILY[:2], shards / "train", 20, engine=engine)
    exact, other = packed(learngene, FAMILY[:2], shards / "train", 20)
    assert run.train() and exact.train()
    assert run.pack.sigma.dtype == torch.float32
    for j in range(2):  # bf16 has 8 bits: losses agree to some parts in a thousand, and drift slowly
        assert recorder.losses[j] == pytest.approx(other.losses[j], rel=0.05)


def train_over_ranks(learngene, data, points, steps, states):
    world = dist.world("cpu")
    if world.rank == 1:  # as if its processor had begun the targets otherwise
        learngene = replace(learngene, tensors={k: v * 1.01 for k, v in learngene.tensors.items()})
    run, recorder = packed(learngene, points, data, steps, world=world, states=(states, "p"))
    assert run.train()
    return recorder.losses, [run.pack.scalers(j) for j in range(len(points))]


@pytest.mark.distributed
def test_two_processes_train_what_one_does_whatever_the_second_began_with(learngene, shards, tmp_path):
    points = FAMILY[:3]
    one, recorder = packed(learngene, points, shards / "train", 20)
    assert one.train()
    both = run_distributed(train_over_ranks, 2, learngene, shards / "train", points, 20, tmp_path)
    losses, first = both[0]
    for j in range(len(points)):
        assert losses[j] == pytest.approx(recorder.losses[j], rel=LOSS)
        assert largest_difference(first[j], one.pack.scalers(j)) < SIGMA
        assert largest_difference(first[j], both[1][1][j]) == 0  # both ranks hold the same sigma, bit by bit
    assert not both[1][0]  # only rank 0 writes


@pytest.mark.parametrize("points", [FAMILY[:3], [FAMILY[0], (3, 0, 1e30), FAMILY[1]]], ids=["fine", "one fails"])
def test_numbers_that_are_read_one_step_late_change_nothing(learngene, shards, points):
    """As on a GPU, where the host reads a step's losses while the next step is computed."""
    at_once, recorder = packed(learngene, points, shards / "train", 8)
    late, other = packed(learngene, points, shards / "train", 8)
    late.reads_late = True
    assert at_once.train() and late.train()
    assert other.losses == recorder.losses
    assert torch.equal(late.pack.sigma, at_once.pack.sigma)
    ends = [(end.state, end.step, end.reason) for _, end in sorted(other.ends.items())]
    assert ends == [(end.state, end.step, end.reason) for _, end in sorted(recorder.ends.items())]


def compiled_graphs(learngene, data, depths) -> tuple[list[float], int]:
    """Losses of the first job of a pack whose blocks are compiled, and how many graphs that took."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    run, recorder = packed(learngene, [(depth, 0, 1e-2) for depth in depths], data, 2)
    counter = CompileCounter()
    run.pack.compile_block(counter)
    assert run.train()
    return recorder.losses[0], counter.frame_count


def test_a_compiled_block_computes_the_same_in_a_few_graphs_whatever_the_depth(learngene, shards):
    plain, recorder = packed(learngene, [(depth, 0, 1e-2) for depth in (3, 2, 1)], shards / "train", 2)
    assert plain.train()
    losses, graphs = compiled_graphs(learngene, shards / "train", (3, 2, 1))
    assert losses == pytest.approx(recorder.losses[0], rel=LOSS)
    # all jobs, any number of jobs, and one job
    assert graphs <= 3 and compiled_graphs(learngene, shards / "train", (9, 5, 2))[1] <= 3
