"""Steps that are timed in separate processes, because a setting of the allocator applies to a process (Linux, CPU).

Our step is timed with `engine.keep_freed_memory`, which is the default, and without. The original-style DiT is timed
without, as in a script that does not set it.

    python -m benchmarks.isolated_steps KIND ARCH BATCH PRECISION THREADS     runs one step for each line of input
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
    """A context with a new process; the function that it yields runs one step there and returns its seconds.

    Args:
        kind: As in `main`.
        plan: Architecture and batch.
        precision: `fp32` or `bf16`.

    Raises:
        RuntimeError: The process has ended (raised by the function).
    """
    import torch

    words = [kind, plan.arch.model_dump_json(), str(plan.batch), precision, str(torch.get_num_threads())]
    command = [sys.executable, "-m", "benchmarks.isolated_steps", *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout  # both are pipes
        requests, replies = process.stdin, process.stdout

        def step() -> float:
            # While it waits for the next line, the process uses no CPU that the other processes need.
            print(file=requests, flush=True)
            reply = replies.readline()
            if not reply:
                raise RuntimeError(f"the process of a step ended with code {process.wait()}")
            return float(reply)

        yield step


def isolated_rows(plan: SpeedPlan, precision: str) -> list[BenchmarkRow]:
    """Rows: the speedup of keeping freed memory, and of our dense step over the original-style one."""
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
    """In the separate process: time steps. The arguments are strings from the command line.

    Args:
        kind: `kept` or `dense`, our step with or without `keep_freed_memory`; or `original`.
        shape: The architecture as JSON.
        batch: Samples in a step.
        precision: `fp32` or `bf16`.
        threads: Number of torch's threads.
    """
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
