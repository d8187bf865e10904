"""`python -m benchmarks scale`: the model of scale against real runs, and the state tables of 10,000 targets.

A step of 2 and 4 processes is predicted from the parts of a step of one process, the gloo links between so many
processes, and how much slower a process computes while the others do; then the engine runs and is timed. All of it
happens in every round, so that a slow minute of the machine falls on both sides. Nothing is fitted to a measured step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.rows import BenchmarkRow, median, say
from fine_dist.model.arch import Arch
from fine_dist.planning.scaling_model import Affine, Network, Parts, Prediction, predict

ARCH = Arch(
    hidden_size=128, num_layers=4, num_heads=4, patch_size=2, in_channels=4, input_size=16, num_classes=10,
    learn_sigma=False,
)  # fmt: skip
MICRO = 2
"""Samples of a process: few, so that communication is a fair part of a step."""
KINDS = tuple((model, stage) for model in ("dense", "learngene") for stage in (0, 1, 2, 3))
WORLDS = (2, 4)
BAR = 1.2
"""Predicted over measured: 0.8 to 1.2."""
TARGETS = 10_000


def run(quick: bool) -> list[BenchmarkRow]:
    """All rows. quick: two ZeRO stages, one round, 1,000 targets, and no bars."""
    from benchmarks.large_families import state_tables

    kinds = [kind for kind in KINDS if not quick or kind[1] in (0, 1)]
    return [
        *against_reality(kinds, rounds=1 if quick else 5, bars=not quick),
        *state_tables(1000 if quick else TARGETS, not quick),
    ]


def against_reality(
    kinds: Sequence[tuple[str, int]], rounds: int, bars: bool, worlds: Sequence[int] = WORLDS
) -> list[BenchmarkRow]:
    """Predicted over measured, for each world, model and stage: medians of the rounds' own ratios."""
    found: dict[tuple[int, str, int], list[tuple[Prediction, float]]] = {}
    slower: dict[int, list[float]] = {p: [] for p in worlds}
    for turn in range(rounds):
        say(f"steps of 1 and {', '.join(map(str, worlds))} processes, round {turn + 1} of {rounds}")
        # In every round again: the prediction comes from the machine as it is now, as the measurement does.
        one = world_of(1, kinds)
        for processes in worlds:
            several = world_of(processes, kinds)
            slower[processes].append(several["kernel_s"] / one["kernel_s"])
            for model, stage in kinds:
                expected = prediction(one, several, model, stage, processes)
                measured = several["runs"][f"{model} {stage}"]["step"]
                found.setdefault((processes, model, stage), []).append((expected, measured))
    cores = len(os.sched_getaffinity(0))
    rows = [
        BenchmarkRow(f"a process computes slower while {p} do, {cores} cores", median(values), "x", None, "lower")
        for p, values in slower.items()
    ]
    for (processes, model, stage), pairs in found.items():
        where = f"{model}, {f'ZeRO-{stage}' if stage else 'plain'}, {processes} processes"
        measured = median([seconds for _, seconds in pairs])
        ratio = median([made.step_s / seconds for made, seconds in pairs])
        talk = median([made.communication_s / made.step_s for made, _ in pairs])
        rows += [
            BenchmarkRow(f"{where}: step, measured", 1e3 * measured, "ms", None, "lower"),
            BenchmarkRow(
                f"  predicted / measured ({talk:.0%} communication)", ratio, "x", BAR if bars else None, "near"
            ),
        ]
    return rows


def world_of(processes: int, kinds: Sequence[tuple[str, int]], steps: int = 14) -> dict[str, Any]:
    """What `ranks.measure` finds in a world of so many processes, on rank 0."""
    from fine_dist.planning import rank_timing as ranks
    from fine_dist.testing import run_distributed

    found: dict[str, Any] = run_distributed(
        ranks.measure, processes, ARCH.model_dump_json(), MICRO, steps, kinds, timeout_s=600
    )[0]
    return found


def prediction(
    one: Mapping[str, Any], several: Mapping[str, Any], model: str, stage: int, processes: int
) -> Prediction:
    """Of a step of several processes, from a step of one, and the links and the kernel of several."""
    from fine_dist.planning.rank_timing import as_links

    links = as_links(several["links"])
    network = Network(links["all_reduce"], links["all_reduce"], processes, links, grouped=False)
    slowdown = several["kernel_s"] / one["kernel_s"]
    return predict(parts_of(one["runs"][f"{model} {stage}"]), stage, network, processes, MICRO, slowdown=slowdown)


def parts_of(run: Mapping[str, float]) -> Parts:
    """A run of one process as the model's parts."""
    rest = run["step"] - run["forward"] - run["backward"] - run["numbers"]
    return Parts(
        forward=Affine(run["forward"], 0.0),
        backward=Affine(run["backward"], 0.0),
        per_number_s=run["numbers"],
        fixed_s=max(0.0, rest) + run["joined"],
        **{key: int(run[key]) for key in ("trained", "tensors", "small", "small_tensors")},
    )
