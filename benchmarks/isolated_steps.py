"""Steps timed in processes of their own, for settings that hold for a whole process (Linux, CPU).

`engine.keep_freed_memory` is a setting of the whole process. Here our step is timed with it, as the loop has it, and
without; the original-style DiT without, as a script has it that sets nothing.

    python -m benchmarks.isolated_steps KIND ARCH BATCH PRECISION THREADS     takes a step a line of input
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator

from benchmarks.rows import BenchmarkRow
from benchmarks.speed_plan import DENSE, ORIGINAL_BARS, SpeedPlan
from benchmarks.steps import ratio


@contextlib.contextmanager
def isolated_step(kind: str, plan: SpeedPlan, precision: str) -> Iterator[Callable[[], float]]:
    """A process that takes a step whenever this is called, and its seconds; it ends with its input."""
    import torch

    words = [kind, plan.arch.model_dump_json(), str(plan.batch), precision, str(torch.get_num_threads())]
    command = [sys.executable, "-m", "benchmarks.isolated_steps", *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout  # both are pipes
        asked, answers = process.stdin, process.stdout

        def step() -> float:
            # One line, one step: between steps the process sleeps and takes nothing from the one that is measured.
            print(file=asked, flush=True)
            answer = answers.readline()
            if not answer:
                raise RuntimeError(f"the process of a step ended with code {process.wait()}")
            return float(answer)

        yield step


def isolated_rows(plan: SpeedPlan, precision: str) -> list[BenchmarkRow]:
    """Our dense step, freed memory kept over given back; the original-style step over ours as the loop has it."""
    with contextlib.ExitStack() as stack:
        steps = {
            kind: stack.enter_context(isolated_step(kind, plan, precision)) for kind in ("kept", "dense", "original")
        }
        figures = plan.bench().times(steps, plan.seconds / 2)
    bar = ORIGINAL_BARS[precision] if plan.cpu_bars else None
    where = f"{precision}, {plan.label}"
    return [
        BenchmarkRow(
            f"dense, {where}: freed memory kept / given back", ratio(figures, "kept", "dense"), "x", None, "lower"
        ),
        BenchmarkRow(
            f"original-style DiT / ours as the loop has it, {where}", ratio(figures, "original", "kept"), "x", bar
        ),
    ]


def main(kind: str, shape: str, batch: str, precision: str, threads: str) -> None:
    """The process's end: `kept`, `dense` or `original`."""
    import torch

    from benchmarks.reference_dit import original_step
    from benchmarks.steps import Bench
    from fine_dist.engine.allocator import keep_freed_memory
    from fine_dist.model.arch import Arch

    torch.set_num_threads(int(threads))
    if kind == "kept":
        keep_freed_memory()
    arch, cpu = Arch.model_validate_json(shape), torch.device("cpu")
    if kind == "original":
        step = original_step(arch, int(batch), precision, cpu)
    else:
        step = Bench(arch, cpu, 1).step(DENSE, int(batch), precision)
    step.warm()
    for _ in sys.stdin:
        print(step(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
