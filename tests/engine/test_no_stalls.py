"""A step never waits for the device: its numbers are read while the next step is under way, its noise is there before.

On CPU nothing is asynchronous, but what would wait for an accelerator can be seen there as well: a call that turns a
tensor into a number of the host. `late` is how an accelerator's run reads its steps; here it is set on CPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fine_dist.core.errors import ResumeLater, TrainingError
from fine_dist.diffusion.objective import Objective
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine import dist
from fine_dist.engine.checkpoint_files import CheckpointReader
from fine_dist.engine.loop import Run
from fine_dist.engine.optimizer import adamw, update_only_if
from fine_dist.engine.plain_backend import PlainBackend
from fine_dist.engine.run_dir import RunDir
from fine_dist.engine.stopping import Stopper
from tests.engine.test_loop import nan_at
from tests.engine.toy import ARCH, ToyConfig, engine, toy_program

READS = {"item", "tolist", "cpu", "numpy", "nonzero", "__float__", "__int__", "__bool__", "__index__", "__array__"}
READ_OPS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select"}
CLOCKS = {"steps_per_s", "images_per_s", "tokens_per_s", "model_tflops_per_s", "data_wait_s", "data_wait_fraction",
          "mfu", "peak_memory_gib"}  # fmt: skip


OF_THE_HOST = {"random_draws.py", "toy.py"}
"""Who reads positions in the global batch, in host memory on every machine: the draws and the toy's stream."""


def asker() -> str:
    """The file that called torch."""
    frame = sys._getframe(2)
    while frame is not None and (frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    return Path(frame.f_code.co_filename).name if frame else "?"


class Calls(TorchFunctionMode):
    """Python's own reads of a tensor: `tolist` and `float()` of a tensor in host memory dispatch nothing."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS and (where := asker()) not in OF_THE_HOST:
            self.seen.append(f"{name} in {where}")
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Operators whose answer a host has to wait for, and copies from one kind of device to another."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        source = {"aten::_to_copy": 0, "aten::copy_": 1}.get(name)
        moved = source is not None and result.device != args[source].device
        if (name in READ_OPS or moved) and (where := asker()) not in OF_THE_HOST:
            self.seen.append(f"{name} in {where}")
        return result


@contextlib.contextmanager
def started(folder: Path, config: ToyConfig, late: bool = True, **parts: Any) -> Iterator[Run]:
    """A run that reads its steps as an accelerator's does."""
    here = dist.single_process("cpu")
    program = toy_program(config, here, **parts)
    with RunDir(folder).open("toy", {}, here) as run_dir, Stopper(run_dir, None, True) as stopper:
        run = Run(
            program, config.steps, config.global_batch, config.optim, config.engine, run_dir, 0, "toy", here, stopper
        )
        run.reads_late = late
        try:
            yield run
        finally:
            run.checkpoints.close()
            run.monitor.close()


@pytest.mark.parametrize("kind", ["dense", "joint", "sigma"])
def test_between_two_steps_the_host_reads_one_message_and_it_is_the_step_befores(tmp_path: Path, kind: str) -> None:
    # no row is due in between: its numbers are the host's, which cannot be told from the device's here
    config = ToyConfig(kind=kind, steps=8, engine=engine(micro_batch=4, checkpoint_every=8, log_every=8))
    seen: list[str] = []
    with started(tmp_path, config) as run:
        gradients, update = run.gradients, run.update
        run.program.before_step = lambda step, generator: seen.append(f"begin {step}")
        run.gradients = lambda batch: (seen.append(f"compute {batch.step}"), gradients(batch))[1]  # type: ignore[method-assign]
        run.update = lambda total, step, waited: (seen.append(f"update {step}"), update(total, step, waited))[1]  # type: ignore[method-assign]

        def read() -> int:
            step = run.pending.step if run.pending else None
            if step is not None:
                seen.append(f"read {step}")
            return type(run).read_pending_step(run)

        run.read_pending_step = read  # type: ignore[method-assign]
        with Calls(seen), Operators(seen):
            run.train()
    steady = [seen[seen.index(f"begin {step}") : seen.index(f"begin {step + 1}")] for step in range(2, 7)]
    for step, events in enumerate(steady, 2):
        reads = ["tolist in step_result.py"]  # the message of one step, and nothing else
        assert events == [f"begin {step}", f"compute {step}", f"read {step - 1}", *reads, f"update {step}"]


def test_a_reading_in_the_middle_of_a_step_would_be_seen(tmp_path: Path) -> None:
    class Asking(Objective):
        def losses(self, question, out):
            return super().losses(question, out if bool(question.t.max() > 0) else 2 * out)

    seen: list[str] = []
    with started(tmp_path, ToyConfig(steps=1), objective=Asking(DiffusionConfig(), ARCH, 0)) as run:
        batch, _ = run.next_batch(run.program.stream.batches(0))
        with Calls(seen), Operators(seen):
            run.gradients(batch)
    assert "__bool__ in objective.py" in seen and "aten::_local_scalar_dense in objective.py" in seen


def results(folder: Path, run: Run) -> tuple[Any, ...]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]
    kept = {}
    for place in sorted((folder / "checkpoints").glob("step_*")):
        saved = CheckpointReader(place)
        saved.extra.pop("seconds")
        kept[place.name] = (saved.optimizer_steps, saved.extra, (place / "rank0.safetensors").read_bytes())
        saved.close()
    return rows, kept, run.bad_steps


@pytest.mark.parametrize("bad", [None, 0, 3, 6])
def test_a_step_that_is_read_late_computes_logs_and_saves_what_one_that_is_read_at_once_does(
    tmp_path: Path, bad: int | None
) -> None:
    """Bad losses at the first step, in the middle, before a checkpoint and at the end (each two steps long)."""
    settings = engine(on_bad_loss="skip", log_every=2, checkpoint_every=4, keep_checkpoints=9, eval_every=3)
    config = ToyConfig(kind="joint", steps=8, engine=settings)
    found = []
    for late in (False, True):
        parts = {} if bad is None else {"stream": nan_at(bad)}
        with started(tmp_path / str(late), config, late, held_out=norm_of, **parts) as run:
            run.train()
        found.append(results(tmp_path / str(late), run))
    assert found[0] == found[1]
    assert found[0][2] == (0 if bad is None else 2)


def norm_of(model: torch.nn.Module) -> dict[str, float]:
    return {"held_out_loss": float(sum(p.double().norm() for p in model.parameters()))}


def test_a_bad_loss_stops_a_late_run_with_the_same_words_and_the_same_last_checkpoint(tmp_path: Path) -> None:
    said = []
    for late in (False, True):
        place = started(tmp_path / str(late), ToyConfig(steps=8), late, stream=nan_at(3))
        with place as run, pytest.raises(TrainingError) as caught:
            run.train()
        said.append(str(caught.value))
        assert (tmp_path / str(late) / "checkpoints" / "LATEST").read_text() == "step_00000002"
    assert said[0] == said[1] and said[0].startswith("step 4: the loss is nan on rank 0")


def test_a_signal_saves_a_late_run_one_step_later_and_it_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    config = ToyConfig(steps=9, engine=engine(checkpoint_every=100))
    plain = Objective(DiffusionConfig(), ARCH, 0)

    def struck(model, batch):
        if batch.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(model, batch)

    with (
        started(tmp_path / "cut", config, objective=struck) as run,
        pytest.raises(ResumeLater, match="saved at step 5 of"),
    ):
        run.train()
    for folder in ("cut", "whole"):
        with started(tmp_path / folder, config) as run:
            run.train()
    ours, theirs = (results(tmp_path / folder, run) for folder in ("cut", "whole"))
    assert ours[0] == theirs[0] and ours[1]["step_00000009"] == theirs[1]["step_00000009"]


@pytest.mark.parametrize("good", [True, False])
def test_an_update_is_taken_or_left_by_a_flag_that_the_host_does_not_read(good: bool) -> None:
    parameters = [torch.nn.Parameter(torch.randn(7, 3)), torch.nn.Parameter(torch.randn(5))]
    others = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    config = ToyConfig().optim
    guarded, plain = adamw(parameters, config), adamw(others, config)
    for step in range(4):
        for p, q in zip(parameters, others):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        keeps = good or step != 2
        if not keeps:
            for p in parameters:
                p.grad.fill_(torch.nan)
        with update_only_if(guarded, torch.tensor(keeps)):
            guarded.step()
        if keeps:
            plain.step()
    for p, q in zip(parameters, others):
        assert torch.equal(p, q)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(guarded.state[p][key], plain.state[q][key])


def test_a_first_step_that_is_bad_leaves_no_trace_in_the_optimizer() -> None:
    backend = PlainBackend(torch.nn.Linear(3, 2), ToyConfig().optim, dist.single_process("cpu"))
    before = backend.weights()
    backend.backward(backend.model(torch.randn(4, 3)).sum(1), global_batch=4, last=True)
    norm = backend.step(0.1, torch.tensor(False))
    assert norm.isfinite() and all(torch.equal(w, before[name]) for name, w in backend.weights().items())
    assert backend.optimizer_steps() == {}
    assert not any(moment.any() for piece in backend.pieces() for moment in backend.moments(piece).values())


# --- noise, a step ahead ---------------------------------------------------------------------------------------------


def test_the_next_steps_noise_is_drawn_by_another_thread_while_this_step_computes(tmp_path: Path) -> None:
    """The model waits in each step until the next one's draws are there: from its own thread they would never come."""
    config = ToyConfig(steps=5, engine=engine(micro_batch=4))
    objective = Objective(DiffusionConfig(), ARCH, 0)
    draws, drawn = objective.draws, []
    inner = draws._draw  # type: ignore[attr-defined]

    def watched(step, positions, pin):
        drawn.append((step, threading.current_thread() is threading.main_thread()))
        return inner(step, positions, pin=pin)

    draws._draw = watched  # type: ignore[attr-defined]
    order: list[tuple[str, int]] = []

    def waiting(model, batch):
        def asked(z, t, y):
            for (step, _), ready in list(draws._ready.items()):  # type: ignore[attr-defined]
                ready.result(timeout=60)
                order.append(("drawn", step))
            order.append(("model", batch.step))
            return model(z, t, y)

        return objective(asked, batch)

    with started(tmp_path, config, objective=waiting) as run:
        run.train()
    first, *later = sorted(set(drawn))
    assert first == (0, True)  # nothing could be drawn ahead of the first step
    assert later == [(step, False) for step in range(1, 6)]
    for step in range(5):
        assert order.index(("drawn", step + 1)) < order.index(("model", step))
