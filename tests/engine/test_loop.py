"""The loop: what a step computes, what a run writes, how it stops."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fine_dist.core import retry
from fine_dist.core.errors import ConfigError, ResumeLater, TrainingError
from fine_dist.diffusion.objective import Objective
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine import dist
from fine_dist.engine.checkpoint_files import CheckpointReader
from fine_dist.engine.ema import Ema
from fine_dist.engine.monitor import MetricsLog
from fine_dist.engine.optimizer import learning_rate
from fine_dist.engine.plain_backend import PlainBackend
from fine_dist.engine.program import divide_batch
from fine_dist.engine.run_dir import was_stopped
from fine_dist.engine.settings import OptimConfig
from fine_dist.engine.trackers import TrackedRun
from fine_dist.engine.world import World
from fine_dist.model.arch import arch
from fine_dist.model.factors import FactoredDiT
from tests.engine.toy import ARCH, ToyConfig, ToyStream, engine, toy_fit, toy_model, toy_outcome, toy_program


def test_a_run_equals_a_naive_training_loop(tmp_path: Path) -> None:
    config = ToyConfig(steps=5, optim=OptimConfig(lr=1e-3, weight_decay=0.1, clip_norm=0.5, warmup_steps=3))
    model = toy_model(config)
    naive = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    objective, batches = Objective(DiffusionConfig(), ARCH, 0), ToyStream(8, dist.single_process("cpu")).batches()
    losses = []
    for step in range(5):
        loss = objective(model, next(batches)).mean()
        naive.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        naive.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 3)
        naive.step()
        losses.append(loss.item())
        for name, p in model.named_parameters():
            ema[name] = 0.9 * ema[name] + 0.1 * p.detach()
    found = toy_outcome(tmp_path, config)
    # Equal but for the order of sums (fused AdamW, one loss instead of a mean).
    assert found.losses == pytest.approx(losses, rel=1e-5)
    for name, p in model.named_parameters():
        # the key's bias has no gradient but rounding, and AdamW makes a step of 1e-3 of any sign of it
        torch.testing.assert_close(found.weights[name], p.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.ema[name], ema[name], rtol=1e-4, atol=2e-6)


def test_accumulating_micro_batches_changes_only_rounding(tmp_path: Path) -> None:
    whole = toy_outcome(tmp_path / "whole", ToyConfig(steps=10))
    parts = toy_outcome(tmp_path / "parts", ToyConfig(steps=10, engine=engine(micro_batch=2)))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    kept = toy_outcome(tmp_path / "none", ToyConfig(kind="joint"))
    for mode in ("blocks", "every_other"):
        config = ToyConfig(kind="joint", engine=engine(activation_checkpointing=mode))
        assert toy_outcome(tmp_path / mode, config).losses == kept.losses


def test_bf16_keeps_weights_moments_and_ema_in_fp32(tmp_path: Path) -> None:
    found = toy_outcome(tmp_path, ToyConfig(kind="joint", engine=engine(precision="bf16")))
    assert {w.dtype for w in (*found.weights.values(), *found.ema.values())} == {torch.float32}
    exact = toy_outcome(tmp_path / "exact", ToyConfig(kind="joint"))
    assert found.losses != exact.losses  # it was bf16
    assert found.losses == pytest.approx(exact.losses, rel=2e-2)  # 8 bits a product


def test_what_cannot_be_compiled_runs_without_and_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    def without_a_compiler(graph, examples):
        raise RuntimeError("no compiler here")

    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, backend: compile_with(forward, backend=without_a_compiler))
    found = toy_outcome(tmp_path / "tried", ToyConfig(steps=3, engine=engine(compile=True)))
    assert caplog.text.count("torch.compile failed") == 1 and "no compiler here" in caplog.text
    assert found.losses == toy_outcome(tmp_path / "eager", ToyConfig(steps=3)).losses


@pytest.mark.parametrize(
    ("batch", "micro", "world_size", "answer"), [(64, None, 4, (16, 1)), (64, 8, 4, (8, 2)), (6, 1, 3, (1, 2))]
)
def test_global_batch_is_micro_times_accumulation_times_world_size(batch, micro, world_size, answer) -> None:
    assert divide_batch(batch, micro, world_size) == answer


def test_a_batch_that_cannot_be_divided_is_an_error_that_names_legal_values() -> None:
    with pytest.raises(
        ConfigError, match="global batch 10 cannot be divided over 4 processes; the nearest that can: 8"
    ):
        divide_batch(10, None, 4)
    with pytest.raises(ConfigError, match="legal: 1, 2, 4, 8, 16"):
        divide_batch(64, 5, 4)


def test_the_learning_rate_warms_up_and_falls_along_a_half_cosine() -> None:
    optim = OptimConfig(lr=2.0, warmup_steps=4, schedule="cosine")
    rates = [learning_rate(optim, step, 104) for step in (0, 3, 4, 54, 103)]
    assert rates == pytest.approx([0.5, 2.0, 2.0, 1.0, 1 + math.cos(math.pi * 0.99)])


def test_the_learning_rate_falls_along_a_line_after_a_warm_up_that_is_a_fraction_of_the_run() -> None:
    optim = OptimConfig(lr=2.0, warmup_steps=0.05, schedule="linear")
    for steps in (100, 400):
        warm = steps // 20
        rates = [learning_rate(optim, step, steps) for step in (0, warm - 1, warm, (steps + warm) // 2, steps - 1)]
        expected = [2 / warm, 2.0, 2.0, 2 * (1 - ((steps + warm) // 2 - warm) / (steps - warm)), 2 / (steps - warm)]
        assert rates == pytest.approx(expected)
    assert optim.depends_on_steps and OptimConfig(warmup_steps=0.1).depends_on_steps
    assert not OptimConfig(warmup_steps=10).depends_on_steps


def test_a_sigma_only_checkpoint_of_dit_b_is_under_one_mib_and_the_frozen_weights_come_back(tmp_path: Path) -> None:
    b2 = arch("DiT-B/2", in_channels=1, input_size=4, num_classes=10, learn_sigma=False)

    def program(steps: int):
        model = FactoredDiT(b2, rank=768, generator=torch.Generator().manual_seed(1))
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith(".sigma"))
        here = dist.single_process("cpu")
        made = toy_program(ToyConfig(), here, model=model, objective=Objective(DiffusionConfig(), b2, 0))
        made.stream = ToyStream(8, here, b2)
        return toy_fit(tmp_path / "run", ToyConfig(steps=steps, engine=engine(micro_batch=8)), made)

    fitted = program(1)
    folder = tmp_path / "run" / "checkpoints" / "step_00000001"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2**20
    assert set(CheckpointReader(folder).shapes) == {n for n, p in fitted.model.named_parameters() if p.requires_grad}
    again = program(1)
    for (name, p), (_, q) in zip(fitted.model.named_parameters(), again.model.named_parameters()):
        assert torch.equal(p, q), name


def test_a_stop_file_saves_and_asks_to_be_started_again_and_the_run_then_ends_the_same(tmp_path: Path) -> None:
    config = ToyConfig(steps=6, engine=engine(checkpoint_every=100))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    with pytest.raises(ResumeLater, match="a file STOP was in the run directory; saved at step 1 of 6"):
        toy_fit(tmp_path / "run", config)
    assert not (tmp_path / "run" / "STOP").exists() and was_stopped(tmp_path / "run")  # no launcher starts it again
    resumed, whole = toy_outcome(tmp_path / "run", config), toy_outcome(tmp_path / "whole", config)
    assert resumed.losses == whole.losses
    assert all(torch.equal(resumed.weights[name], w) for name, w in whole.weights.items())
    assert not was_stopped(tmp_path / "run")


def test_a_save_file_saves_and_goes_on(tmp_path: Path) -> None:
    tmp_path.joinpath("SAVE").touch()
    fitted = toy_fit(tmp_path, ToyConfig(steps=3, engine=engine(checkpoint_every=100)))
    assert fitted.step == 3
    assert (tmp_path / "checkpoints" / "step_00000001").exists()


def test_a_time_limit_saves_and_asks_to_be_started_again(tmp_path: Path) -> None:
    config = ToyConfig(steps=10**6, engine=engine(time_limit_min=0.01, checkpoint_every=10**6))
    with pytest.raises(ResumeLater, match=r"time limit of 0.01 min"):
        toy_fit(tmp_path, config)
    assert (tmp_path / "checkpoints" / "LATEST").exists()


def nan_at(step: int, here: World | None = None):
    class Bad(ToyStream):
        def batches(self, start_step=0):
            for batch in super().batches(start_step):
                if batch.step in (step, step + 1):
                    batch.latents[0] = float("nan")
                yield batch

    return Bad(8, here or dist.single_process("cpu"))


def test_a_nan_loss_stops_with_the_last_good_checkpoint_or_is_skipped_up_to_a_limit(tmp_path: Path) -> None:
    here = dist.single_process("cpu")
    config = ToyConfig(steps=6)
    with pytest.raises(TrainingError, match="step 4: the loss is nan on rank 0"):
        toy_fit(tmp_path / "stop", config, toy_program(config, here, stream=nan_at(3)))
    assert (tmp_path / "stop" / "checkpoints" / "LATEST").read_text() == "step_00000002"
    config = ToyConfig(steps=6, engine=engine(on_bad_loss="skip", max_bad_steps=2))
    fitted = toy_fit(tmp_path / "skip", config, toy_program(config, here, stream=nan_at(3)))
    assert all(torch.isfinite(p).all() for p in fitted.model.parameters())
    config = ToyConfig(steps=6, engine=engine(on_bad_loss="skip", max_bad_steps=1))
    with pytest.raises(TrainingError, match=r"2 steps were bad and engine.max_bad_steps is 1"):
        toy_fit(tmp_path / "limit", config, toy_program(config, here, stream=nan_at(3)))


def test_held_out_losses_pictures_and_histograms_are_made_with_the_ema_and_do_not_touch_the_run(tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def held_out(model: nn.Module) -> dict[str, float]:
        assert not model.training
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()  # whatever a measurement does to its copy
        return {"held_out_loss": 0.25}

    looks = {
        "held_out": held_out,
        "previews": lambda model, step, budget: {"samples": torch.zeros(1, 8, 8)},
        "histograms": lambda model: {"sigma/qkv": torch.arange(4.0)},
    }
    config = ToyConfig(steps=4, engine=engine(eval_every=2, preview_every=2))
    fitted = toy_fit(tmp_path / "run", config, toy_program(config, dist.single_process("cpu"), **looks))
    assert fitted.losses["held_out_loss"] == 0.25
    assert [row["step"] for row in fitted.rows if "held_out_loss" in row] == [2, 4]
    # the last look but one is at the average, the last at the weights themselves
    assert all(torch.equal(seen[-2][name], value) for name, value in fitted.ema.items())
    unseen = toy_outcome(tmp_path / "unseen", config)
    assert [row["loss"] for row in fitted.rows if "loss" in row] == unseen.losses
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    tags = events.Tags()
    assert tags["images"] == ["samples"] and tags["histograms"] == ["sigma/qkv"]
    assert {"train/loss", "train/lr", "train/images_per_s", "train/mfu", "train/held_out_loss"} <= set(tags["scalars"])


def test_a_row_that_fails_for_a_moment_is_in_the_log_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "WAITS_S", (0.0, 0.0, 0.0))
    log = MetricsLog(TrackedRun(tmp_path), ())
    file, calls = log._file, []

    class Flaky:
        def write(self, data: bytes) -> int:
            calls.append(data)
            if len(calls) == 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return file.write(data[:7])  # and a short write is gone on with

        def close(self) -> None:
            file.close()

    log._file = Flaky()
    log.write(1, {"loss": 0.5})
    log.write(2, {"loss": 0.25})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]


def test_rows_hold_speed_mfu_memory_and_waiting(tmp_path: Path) -> None:
    config = ToyConfig(steps=4, engine=engine(log_every=2, peak_tflops=0.001))
    rows = toy_fit(tmp_path, config).rows
    assert [row["step"] for row in rows] == [2, 4]
    assert rows == [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    row = rows[1]
    assert row["images_per_s"] == pytest.approx(8 * row["steps_per_s"])
    assert row["tokens_per_s"] == pytest.approx(16 * row["images_per_s"])
    assert row["mfu"] == pytest.approx(row["images_per_s"] * 1e6 / 1e9)  # the toy states 1e6 FLOPs a sample
    assert row["peak_memory_gib"] > 0.05 and 0 <= row["data_wait_fraction"] < 1 and row["grad_norm"] > 0


def test_a_model_with_nothing_to_train_and_a_checkpoint_beyond_the_steps_are_refused(tmp_path: Path) -> None:
    config = ToyConfig(steps=4)
    frozen = toy_model(config).requires_grad_(False)
    with pytest.raises(ConfigError, match="every parameter of the model is frozen"):
        toy_fit(tmp_path / "frozen", config, toy_program(config, dist.single_process("cpu"), model=frozen))
    toy_fit(tmp_path / "run", config)
    with pytest.raises(ConfigError, match="beyond the 3 asked"):
        toy_fit(tmp_path / "run", ToyConfig(steps=3))


def test_a_short_runs_average_has_left_its_beginning_behind(tmp_path: Path) -> None:
    """DiT's constant 0.9999 leaves 99% of the beginning in the average after 100 steps."""

    def distance(folder: str, **fields) -> float:
        fitted = toy_fit(tmp_path / folder, ToyConfig(steps=100, engine=engine(ema_decay=0.9999, **fields)))
        weights = dict(fitted.model.named_parameters())
        return float(sum((weights[name] - value).norm() for name, value in fitted.ema.items()))

    assert distance("warm", ema_warmup=True) < 0.25 * distance("constant", ema_warmup=False)
    ema = Ema(PlainBackend(toy_model(ToyConfig()), OptimConfig(), dist.single_process("cpu")), 0.9999, warmup=True)
    assert [ema.decay_at(updates) for updates in (1, 90, 10**6)] == [2 / 11, 91 / 100, 0.9999]


def test_a_start_that_fails_before_its_first_step_leaves_the_directory_free(tmp_path: Path) -> None:
    config = ToyConfig(steps=2)
    broken = toy_program(
        config,
        dist.single_process("cpu"),
        objective=lambda model, batch: model.patch.weight.sum() * torch.full((8,), torch.nan),
    )
    with pytest.raises(TrainingError, match="loss is nan"):
        toy_fit(tmp_path / "run", config, broken)
    assert not (tmp_path / "run").exists()
    toy_fit(tmp_path / "run", ToyConfig(steps=2, rank=8))  # another run may have it


def test_a_crash_in_looking_comes_after_the_steps_checkpoint_and_the_look_is_made_up_for(tmp_path: Path) -> None:
    looked = []

    def look(model):
        looked.append(1)
        if len(looked) == 2:
            raise RuntimeError("no display")
        return {"held_out_loss": 0.5}

    config = ToyConfig(steps=6, engine=engine(checkpoint_every=2, eval_every=2))
    with pytest.raises(RuntimeError, match="no display"):
        toy_fit(tmp_path, config, held_out=look)
    assert (tmp_path / "checkpoints" / "LATEST").read_text() == "step_00000004"
    fitted = toy_fit(tmp_path, config, held_out=look)
    assert [row["step"] for row in fitted.rows if "held_out_loss" in row] == [2, 4, 6]


def test_the_end_names_the_loss_of_the_average_and_of_the_weights_themselves(tmp_path: Path) -> None:
    fitted = toy_fit(tmp_path, ToyConfig(steps=4), held_out=lambda m: {"held_out_loss": float(m.patch.weight.sum())})
    raw = float(dict(fitted.model.named_parameters())["patch.weight"].sum())
    assert fitted.losses["raw_held_out_loss"] == pytest.approx(raw, rel=1e-6)
    assert fitted.losses["held_out_loss"] == pytest.approx(float(fitted.ema["patch.weight"].sum()), rel=1e-6)
    assert fitted.losses["held_out_loss"] != fitted.losses["raw_held_out_loss"]


def test_a_cuda_backend_without_a_gpu_says_what_is_legal_here() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=r"cuda was asked for and no GPU is usable .* legal here: cpu, auto"):
        dist.pick_device("cuda")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "joint"])
def test_compiled_blocks_compute_what_eager_ones_do_and_nothing_is_warned_of(tmp_path: Path, kind: str, caplog) -> None:
    compiled = toy_outcome(tmp_path / "compiled", ToyConfig(kind=kind, steps=4, engine=engine(compile=True)))
    assert "torch.compile failed" not in caplog.text
    eager = toy_outcome(tmp_path / "eager", ToyConfig(kind=kind, steps=4))
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-5)


@pytest.mark.parametrize("emulated", [True, False])
def test_bf16_on_a_cpu_that_only_emulates_it_is_said_once(tmp_path, caplog, monkeypatch, emulated):
    monkeypatch.setattr("fine_dist.engine.loop.emulates_bf16", lambda device: emulated)
    toy_fit(str(tmp_path / "run"), ToyConfig(steps=3, engine=engine(precision="bf16")))
    assert caplog.text.count("emulated") == emulated
