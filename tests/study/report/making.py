"""Results of a small study, as numbers that tests choose."""

from __future__ import annotations

from fine_dist.study.report.measurements import Ancestor, PublishedClaim
from fine_dist.study.report.results import Results

N, INIT = 100, 50
CLAIMS = [
    PublishedClaim(
        text="Ours is better at equal steps", source="A paper, table 1", chain=(("ours", "N"), ("plain", "N"))
    ),
    PublishedClaim(text="Ours is worth 3N", source="A paper", chain=(("ours", "N"), ("plain", "3N")), or_equal=True),
    PublishedClaim(text="Equal total steps", source="control", chain=(("ours", "N"), ("plain", "N+I"))),
    PublishedClaim(text="A third is between", source="A paper", chain=(("ours", "N"), ("third", "N"), ("plain", "N"))),
    PublishedClaim(text="Numbers follow depth", source="A paper, figure 2", on_a_line="learngene", bound=0.9),
]


def results(ours: float = 0.11, plain: float = 0.13, plain_3n: float = 0.12, targets=(2, 4), seeds=3) -> Results:
    """Two series on two depths; the mean over seeds is the number given, spread 0.001."""
    made = Results(
        main="ours", baseline="plain", steps={"N": N, "I": INIT}, display_names={"ours": "Ours", "plain": "scratch"}
    )
    made.ancestors["ours"] = Ancestor(name="DiT-D64/2-L8", layers=8, steps=1000, seconds=60, stored=1000)
    made.claims = CLAIMS
    made.target_params = {t: 1000 * t for t in targets}
    for target in targets:
        for seed in range(seeds):
            wobble = 0.001 * (seed - (seeds - 1) / 2)
            common = {"target": target, "seed": seed}
            made.add(method="ours", stage="init", step=0, held_out_loss=0.2, steps_init=INIT, seconds=5, **common)
            for step in (N // 2, N):
                made.add(
                    method="ours", stage="train", step=step, held_out_loss=ours + wobble + 0.01 * (step < N),
                    fd_classifier=8.0 + wobble if step == N else None, end=step == N, steps_init=INIT, steps_train=step,
                    seconds=5 + step / 10, **common,
                )  # fmt: skip
            for step, loss in ((0, 1.0), (N, plain), (3 * N, plain_3n)):
                made.add(
                    method="plain", stage="train", step=step, held_out_loss=loss + wobble, steps_train=step,
                    end=step > 0, seconds=step / 10, **common,
                )  # fmt: skip
    return made


def with_costs() -> Results:
    """`ours` pays 1e9 FLOPs once and 1e6 a step; `plain` 2e6 a step."""
    made = results()
    for row in made.measurements:
        row.flops = row.step * (1e6 if row.method == "ours" else 2e6) + 1.0
        row.flops_condense = 1e9 if row.method == "ours" else 0.0
        row.stored = 50 if row.step == 0 and row.method == "ours" else 4000
    return made
