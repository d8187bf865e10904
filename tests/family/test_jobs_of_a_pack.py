"""What happens to one job of a pack is that job's own affair."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fine_dist.artifacts.targets import descend
from fine_dist.core.errors import ArtifactError, CheckpointError, ConfigError, DamagedStateError
from fine_dist.data.settings import DataConfig
from fine_dist.engine.settings import EngineConfig
from fine_dist.engine.stopping import GO_ON, STOP
from fine_dist.family.pack_model import PackedDiT
from fine_dist.family.pack_state import DAMAGED, SUFFIX
from fine_dist.family.packing import EarlyStop
from fine_dist.methods import parent_of
from fine_dist.methods.random_genes import RandomGenes
from fine_dist.methods.settings import RandomGenesConfig
from tests.family.tools import form, job, largest_difference, packed, sigma_of, solo, target

FAMILY = [(4, 0, 3e-2), (2, 0, 1e-2), (3, 1, 3e-2)]


def test_a_job_whose_loss_is_not_finite_is_frozen_and_the_others_go_on(learngene, shards):
    wild = (3, 0, 1e30)  # its sigma leaves fp32's range at once
    run, recorder = packed(learngene, [FAMILY[0], wild, FAMILY[1]], shards / "train", 12)
    assert run.train()
    failed = recorder.ends[1]
    assert failed.state == "failed" and "nan" in failed.reason.lower() and "1e+30" in failed.reason
    assert failed.step < 12
    for j, point in ((0, FAMILY[0]), (2, FAMILY[1])):
        losses, _ = solo(learngene, point, shards / "train", 12)
        assert recorder.ends[j].state == "done"
        assert recorder.losses[j] == pytest.approx(losses, rel=1e-5)


def test_jobs_of_different_lengths_leave_when_they_are_done(learngene, shards):
    run, recorder = packed(learngene, FAMILY, shards / "train", 12)
    run.jobs[1] = job(FAMILY[1], shards / "train", 5)
    assert run.train()
    assert [recorder.ends[j].step for j in range(3)] == [12, 5, 12]
    losses, model = solo(learngene, FAMILY[1], shards / "train", 5)
    assert recorder.losses[1] == pytest.approx(losses, rel=1e-5)
    assert largest_difference(run.pack.scalers(1), sigma_of(model)) < 1e-4


def test_an_early_stop_ends_a_job_that_no_longer_improves_and_no_other(learngene, shards):
    slow = (2, 0, 1e-9)  # learns nothing, so the mean loss of its windows only wanders
    fast = (1, 0, 3e-2)
    run, recorder = packed(learngene, [fast, slow], shards / "train", 60, stop=EarlyStop(window=10, min_gain=0.0))
    assert run.train()
    assert recorder.ends[1].step == 20 < recorder.ends[0].step
    assert "stopped improving" in recorder.ends[1].reason


def test_jobs_on_another_data_set_train_in_the_same_pack_on_their_own(learngene, shards):
    run, recorder = packed(learngene, FAMILY, shards / "train", 8)
    run.jobs[1] = job(FAMILY[1], shards / "held_out", 8)
    assert run.train()
    for j, where in ((0, "train"), (1, "held_out")):
        losses, _ = solo(learngene, FAMILY[j], shards / where, 8)
        assert recorder.losses[j] == pytest.approx(losses, rel=1e-5)


def test_a_data_set_that_cannot_be_read_fails_its_own_jobs_alone(learngene, shards, tmp_path):
    run, recorder = packed(learngene, FAMILY, shards / "train", 6)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (shards / "train").iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:-4096] if file.suffix == ".tar" else content)
    run.jobs[1] = job(FAMILY[1], broken, 6)
    assert run.train()
    assert [recorder.ends[j].state for j in range(3)] == ["done", "failed", "done"]
    assert "broken" in recorder.ends[1].reason


def test_a_target_with_classes_of_its_own_trains_its_label_embedder_too(learngene, shards):
    models = [target(learngene, depth, seed, new_labels=True) for depth, seed in ((3, 0), (2, 1))]
    before = [model.label.weight.detach().clone() for model in models]
    for model in models:
        model.label.weight.requires_grad_(True)
    run, recorder = packed(learngene, [(3, 0, 1e-2), (2, 1, 1e-2)], shards / "train", 5)
    other, again = packed(learngene, [(3, 0, 1e-2), (2, 1, 1e-2)], shards / "train", 5, models=models)
    assert run.train() and other.train()
    assert "label.weight" not in run.pack.scalers(0)
    for j in range(2):
        assert not torch.equal(other.pack.scalers(j)["label.weight"], before[j])
        assert again.losses[j] != recorder.losses[j]


def test_targets_of_other_genes_are_refused(learngene):
    control = RandomGenes(RandomGenesConfig())
    other = descend(control, parent_of(learngene), learngene.arch.with_depth(2), 0).model
    with pytest.raises(ArtifactError, match="does not share"):
        PackedDiT([form(target(learngene, 2)), form(other)])


def test_a_micro_batch_or_recomputed_blocks_change_rounding_only(learngene, shards):
    whole, recorder = packed(learngene, FAMILY, shards / "train", 8)
    assert whole.train()
    for settings in ({"micro_batch": 4}, {"activation_checkpointing": "blocks"}):
        engine = EngineConfig(device="cpu", log_every=1, **settings)
        run, other = packed(learngene, FAMILY, shards / "train", 8, engine=engine)
        run.pack.recompute = engine.activation_checkpointing
        assert run.train()
        for j in range(3):
            assert other.losses[j] == pytest.approx(recorder.losses[j], rel=1e-5)
    with pytest.raises(ConfigError, match="3 does not divide the 16 samples"):
        packed(learngene, FAMILY, shards / "train", 8, engine=EngineConfig(device="cpu", micro_batch=3))


def test_a_bad_step_is_skipped_as_often_as_the_config_allows(learngene, shards):
    engine = EngineConfig(device="cpu", log_every=1, on_bad_loss="skip", max_bad_steps=3)
    run, recorder = packed(learngene, [FAMILY[0], (3, 0, 1e30)], shards / "train", 12, engine=engine)
    assert run.train()
    assert recorder.ends[0].state == "done" and recorder.ends[0].bad_steps == 0
    assert recorder.ends[1].state == "failed" and recorder.ends[1].bad_steps == 3
    assert "3 skipped steps" in recorder.ends[1].reason


def test_targets_are_looked_at_before_on_the_way_and_the_config_says_how_often(learngene, shards):
    run, recorder = packed(learngene, FAMILY[:2], shards / "train", 9, engine=EngineConfig(device="cpu", eval_every=4))
    assert run.train()
    assert [step for job, step in recorder.looks if job == 0] == [0, 4, 8]


# --- going on -------------------------------------------------------------------------------------------------------


def stop_after(steps):
    asked = iter([GO_ON] * (steps - 1) + [STOP] * 10_000)
    return lambda seconds: next(asked)


def test_a_stopped_pack_goes_on_bit_by_bit_as_if_it_had_not_stopped(learngene, shards, tmp_path):
    whole, recorder = packed(learngene, FAMILY, shards / "train", 12)
    assert whole.train()
    state = (tmp_path, "pack")
    first, before = packed(learngene, FAMILY, shards / "train", 12, states=state, stop_request=stop_after(5))
    assert not first.train()
    second, after = packed(learngene, FAMILY, shards / "train", 12, states=state)
    assert second.train()
    assert all(before.losses[j] + after.losses[j] == recorder.losses[j] for j in range(3))
    assert torch.equal(second.pack.sigma, whole.pack.sigma)


def test_jobs_go_on_in_other_packs_than_they_began_in(learngene, shards, tmp_path):
    first, _ = packed(learngene, FAMILY, shards / "train", 12, states=(tmp_path, "all"), stop_request=stop_after(5))
    assert not first.train()
    for j, point in enumerate(FAMILY):
        alone, recorder = packed(learngene, [point], shards / "train", 12, states=(tmp_path, f"{j}"))
        assert alone.train()
        losses, model = solo(learngene, point, shards / "train", 12)
        assert recorder.losses[0] == pytest.approx(losses[5:], rel=1e-5)
        assert largest_difference(alone.pack.scalers(0), sigma_of(model)) < 1e-4


def test_jobs_at_different_steps_go_on_together(learngene, shards, tmp_path):
    for steps, point in zip((3, 7), FAMILY[:2]):
        run, _ = packed(
            learngene, [point], shards / "train", 12, states=(tmp_path, f"{steps}"), stop_request=stop_after(steps)
        )
        assert not run.train()
    both, recorder = packed(learngene, FAMILY[:2], shards / "train", 12, states=(tmp_path, "both"))
    assert [p.step for p in both.progress] == [3, 7]
    assert both.train()
    for j, begun in ((0, 3), (1, 7)):
        losses, _ = solo(learngene, FAMILY[j], shards / "train", 12)
        assert recorder.losses[j] == pytest.approx(losses[begun:], rel=1e-5)


def test_a_saved_state_of_other_settings_is_refused(learngene, shards, tmp_path):
    run, _ = packed(learngene, FAMILY[:1], shards / "train", 6, states=(tmp_path, "pack"), stop_request=stop_after(2))
    assert not run.train()
    run.jobs[0] = type(run.jobs[0])(**{**vars(run.jobs[0]), "key": "another learngene"})
    with pytest.raises(CheckpointError, match="other settings or another parent"):
        run._resume()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def test_a_damaged_state_is_set_aside_and_the_one_before_it_serves(learngene, shards, tmp_path, caplog):
    engine = EngineConfig(device="cpu", log_every=1, checkpoint_every=2)
    how = {"engine": engine, "states": (tmp_path, "pack")}
    whole, recorder = packed(learngene, FAMILY, shards / "train", 12)
    assert whole.train()
    first, _ = packed(learngene, FAMILY, shards / "train", 12, stop_request=stop_after(7), **how)
    assert not first.train()
    files = sorted(tmp_path.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 2  # of steps 6 and 7
    cut(files[1])
    second, after = packed(learngene, FAMILY, shards / "train", 12, **how)
    assert [p.step for p in second.progress] == [6, 6, 6]
    assert files[1].name + DAMAGED in caplog.text and (tmp_path / (files[1].name + DAMAGED)).exists()
    assert second.train()
    assert torch.equal(second.pack.sigma, whole.pack.sigma)
    assert all(after.losses[j] == recorder.losses[j][6:] for j in range(3))


def test_a_damaged_state_of_one_pack_stops_no_other(learngene, shards, tmp_path):
    for name, point in zip(("one", "two"), FAMILY[:2]):
        run, _ = packed(learngene, [point], shards / "train", 6, states=(tmp_path, name), stop_request=stop_after(3))
        assert not run.train()
    for path in tmp_path.glob(f"one*{SUFFIX}"):
        cut(path)
    two, _ = packed(learngene, FAMILY[1:2], shards / "train", 6, states=(tmp_path, "two"))
    assert two.progress[0].step == 3 and two.train()


@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"x" * 999)])
def test_a_pack_whose_states_are_all_damaged_starts_over_only_when_it_is_asked_to(learngene, shards, tmp_path, damage):
    how = {"engine": EngineConfig(device="cpu", log_every=1, checkpoint_every=2), "states": (tmp_path, "one")}
    run, _ = packed(learngene, FAMILY[:2], shards / "train", 6, stop_request=stop_after(5), **how)
    assert not run.train()
    for path in tmp_path.glob(f"one*{SUFFIX}"):
        damage(path)
    for _ in range(2):  # the second time it finds what the first has set aside
        with pytest.raises(DamagedStateError, match=r"all saved states of L4.* and 1 more .* to start over") as refusal:
            packed(learngene, FAMILY[:2], shards / "train", 6, **how)
        assert "\n" not in str(refusal.value)
    for path in tmp_path.glob(f"*{DAMAGED}"):
        assert path.name in str(refusal.value)
        path.unlink()
    again, _ = packed(learngene, FAMILY[:2], shards / "train", 6, **how)
    assert again.progress[0].step == 0 and again.train()


# --- memory ---------------------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys, pickle, torch
torch.set_num_threads(1)
from pathlib import Path
from fine_dist.model.artifact import load_artifact
from tests.family.tools import packed
learngene, data, room, batch = load_artifact(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
points = [(8, s, 1e-2) for s in range(4)]
run, recorder = packed(learngene, points, data, 3, batch=batch, chunk=4)
count = recorder.after_step
def after_step(progress):  # after the first step whatever is allocated once is there
    count(progress)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (room << 20), resource.RLIM_INFINITY))
recorder.after_step = after_step
run.train()
print("chunk", run.gradients.chunk)
for j in range(4):
    print(recorder.ends[j].state, recorder.ends[j].reason)
"""


def under_limit(learngene, shards, room_mib: int, batch: int) -> list[str]:
    command = [sys.executable, "-c", LIMITED, str(learngene.folder), str(shards / "train"), str(room_mib), str(batch)]
    root = Path(__file__).resolve().parents[2]
    # With its own mapping for every tensor, memory that was freed is free again and not kept by the allocator.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=root, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_pack_that_runs_out_of_memory_goes_on_in_smaller_parts(learngene, shards):
    chunk, *ends = under_limit(learngene, shards, 110, batch=128)
    assert chunk in ("chunk 1", "chunk 2")
    assert ends == ["done None"] * 4


def test_a_job_that_does_not_fit_even_alone_fails_with_the_remedy(learngene, shards):
    _, *ends = under_limit(learngene, shards, 20, batch=256)
    assert all("out of memory" in end and "lower batch" in end for end in ends)


def test_losses_are_recorded_as_means_over_the_steps_since_the_last_row(learngene, shards):
    engine = EngineConfig(device="cpu", log_every=4)
    rows, by_four = packed(learngene, FAMILY[:1], shards / "train", 10, engine=engine)
    every, by_one = packed(learngene, FAMILY[:1], shards / "train", 10)
    assert rows.train() and every.train()
    losses = by_one.losses[0]
    wanted = [sum(losses[:4]) / 4, sum(losses[4:8]) / 4, sum(losses[8:]) / 2]
    assert by_four.losses[0] == pytest.approx(wanted, rel=1e-6)
    assert all(math.isfinite(value) for value in losses)
    assert DataConfig(shards=str(shards / "train")) == rows.jobs[0].data
