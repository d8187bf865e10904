"""Random faults in a minute: condense and a family under random faults, compared byte by byte with an undisturbed run.

    python -m tests.chaos.chaos --rounds 100 --record runs/chaos.jsonl      prints the table of docs/reliability.md

A fault is chosen by a seeded generator, struck at a random moment of a start, and the same command is given again. Each
night is a row of the record; the same command leaves out the nights that the record has, and --rounds 0 only prints it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fine_dist.core.errors import FineDistError, ResumeLater
from fine_dist.data.settings import DataConfig
from fine_dist.engine.settings import LoopConfig, OptimConfig
from fine_dist.family.config import InitConfig
from fine_dist.model.arch import Arch
from fine_dist.stages.settings import CondenseConfig
from fine_dist.testing import Ranks

RANKS = 2
BUSY = min(10.0, max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0))))
"""How many processes want each core: on a busy machine a healthy rank is as slow as a stopped one."""
DEAD_AFTER_S = 3.0 * BUSY
"""A rank that is stopped for longer counts as dead."""
ARCH = Arch(
    hidden_size=16, num_layers=2, num_heads=2, patch_size=4, in_channels=1, input_size=8, num_classes=10,
    learn_sigma=False,
)  # fmt: skip
STRIKES = ("kill one rank", "kill all ranks", "SIGTERM", "stopped longer than the watch")
BETWEEN = ("newest state cut short", "stolen lock", "full disk")
STEPS = 240
"""So many that fifteen faults strike before the last of them."""
PATIENCE_S = 90.0 * BUSY
"""A start that has neither ended nor progressed by then hangs, which is what this looks for."""


def condense_config(root: Path, shards: Path) -> CondenseConfig:
    return CondenseConfig.model_validate(
        {
            "run_dir": str(root / "condense"),
            "arch": ARCH,
            "steps": STEPS,
            "batch": 8,
            "data": {"shards": str(shards / "train")},
            "engine": {
                "device": "cpu", "checkpoint_every": 4, "log_every": 5, "eval_every": 1000, "preview_every": 10**6,
                "threads": 1,
            },
        }
    )  # fmt: skip


def family_config(root: Path, shards: Path) -> InitConfig:
    return InitConfig(
        run_dir=str(root / "family"), parent=str(root / "condense" / "learngene"), depths=(1, 2, 3), steps=STEPS,
        batch=8, data=DataConfig(shards=str(shards / "train")), optim=OptimConfig(lr=1e-2),
        engine=LoopConfig(device="cpu", checkpoint_every=3, log_every=5, threads=1),
    )  # fmt: skip


def run_stage(stage: str, root: str, shards: str, room: int | None) -> str:
    """In a rank: the stage to its end; what became of it. room: bytes that a file may have (a full disk)."""
    if room is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        if stage == "condense":
            from fine_dist.stages.condense import run

            run(condense_config(Path(root), Path(shards)))
        else:
            from fine_dist.family.family_plan import Family
            from fine_dist.family.train_family import run_family

            run_family(Family(family_config(Path(root), Path(shards))), inside=False)
    except ResumeLater:
        return "stopped"
    except (FineDistError, OSError) as error:
        return f"refused: {error}"
    return "done"


@dataclass
class Night:
    """What was struck, how often the command was given, and what came of it."""

    struck: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    hung: int = 0
    differing: list[str] = field(default_factory=list)


class Chaos:
    """One stage under faults. ranks: processes of the stage."""

    def __init__(self, stage: str, root: Path, shards: Path, ranks: int, dice: random.Random, night: Night) -> None:
        self.stage, self.root, self.shards, self.ranks, self.dice, self.night = stage, root, shards, ranks, dice, night
        self.folder = root / stage

    def run(self, faults: int) -> None:
        """Strike `faults` times, then let it end."""
        for _ in range(faults):
            fault, unfinished = self.dice.choice(STRIKES + BETWEEN), not self._finished()
            if fault in STRIKES:
                self._strike(fault)
            else:
                getattr(self, "_" + fault.replace(" ", "_"))()
            self.night.struck[fault if unfinished else "any of them, at a finished run"] += 1
        for _ in range(4):  # a start may still find what the last fault left
            if self._start(None) == "done":
                return
        raise AssertionError(f"{self.stage} did not end after the faults")

    def _finished(self) -> bool:
        targets = ["."] if self.stage == "condense" else ["L1-s0-lr0.01", "L2-s0-lr0.01", "L3-s0-lr0.01"]
        return all((self.folder / name / "DONE.json").exists() for name in targets)

    def _ranks(self, room: int | None = None) -> Ranks:
        self.night.starts += 1
        env = {"FINE_DIST_DEAD_AFTER_S": str(DEAD_AFTER_S)} if self.ranks > 1 else {}
        if self.ranks == 1:
            env = {"RANK": "0", "WORLD_SIZE": "1"}
        return Ranks(run_stage, self.ranks, self.stage, str(self.root), str(self.shards), room, env=env)

    def _start(self, strike: Callable[[Ranks], None] | None, room: int | None = None) -> str:
        ranks = self._ranks(room)
        try:
            if strike:
                self._await_progress(ranks)
                strike(ranks)
            with contextlib.suppress(RuntimeError):
                said = str(ranks.results(PATIENCE_S)[0])
                if "to start over" in said:  # every state was cut short: a run starts over only when it is asked to
                    shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
                    for path in self.folder.glob("packs/*.damaged"):
                        path.unlink()
                return said
            return "died"
        except TimeoutError:
            self.night.hung += 1
            return "hung"
        finally:
            ranks.kill()
            for process in ranks.processes:
                process.join()

    def _states(self) -> list[Path]:
        found = [*self.folder.glob("checkpoints/step_*/*.safetensors"), *self.folder.glob("packs/*.state.safetensors")]
        return sorted((p for p in found if p.exists()), key=lambda p: p.stat().st_mtime_ns)

    def _await_progress(self, ranks: Ranks) -> None:
        """A random number of saves later, or a random moment of the start itself."""
        if self.dice.random() < 0.3:
            time.sleep(self.dice.uniform(0.0, 0.6))
            return
        saves, until = self.dice.randrange(1, 4), time.monotonic() + 20 * BUSY
        seen = {(p, p.stat().st_mtime_ns) for p in self._states()}
        while saves and time.monotonic() < until and any(p.exitcode is None for p in ranks.processes):
            with contextlib.suppress(FileNotFoundError):
                now = {(p, p.stat().st_mtime_ns) for p in self._states()}
                saves -= min(saves, bool(now - seen))
                seen = now
            time.sleep(0.002)

    def _strike(self, fault: str) -> None:
        def strike(ranks: Ranks) -> None:
            living = [p for p in ranks.processes if p.exitcode is None]
            one = self.dice.choice(living) if living else None
            for process in living if fault == "kill all ranks" else [one] if one else []:
                number = {"SIGTERM": signal.SIGTERM, "stopped longer than the watch": signal.SIGSTOP}.get(fault)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process.pid or 0), number or signal.SIGKILL)
            if fault == "stopped longer than the watch" and one:
                time.sleep(DEAD_AFTER_S + 1.5)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(one.pid or 0), signal.SIGCONT)

        self._start(strike)

    def _newest_state_cut_short(self) -> None:
        states = self._states()
        if states:
            size = states[-1].stat().st_size
            os.truncate(states[-1], self.dice.randrange(0, max(1, size - 1)))
        self._strike("SIGTERM")

    def _stolen_lock(self) -> None:
        """Somebody else holds the directory: the start is refused, and nothing is harmed."""
        from fine_dist.engine.run_dir import RunDir
        from fine_dist.launchers.state_table import StateTable

        if self.stage == "condense":
            if not (self.folder / "identity.json").exists():
                return
            thief: Any = RunDir(self.folder)
            thief._take_lock()
        else:
            thief = StateTable(self.folder).claim(["L1-s0-lr0.01"])
            assert thief is not None
        try:
            said = self._start(None)
            assert said.startswith("refused") or said == "died", said
        finally:
            (thief.close if self.stage == "condense" else thief.release)()

    def _full_disk(self) -> None:
        self._start(None, room=self.dice.choice((0, 500, 2000, 9000)))


def night(seed: int, faults: int, folder: Path, shards: Path, calm: dict[str, bytes]) -> Night:
    """One round: condense and a family, each under half of the faults, compared with what a calm run gave."""
    found, dice = Night(), random.Random(seed)
    Chaos("condense", folder, shards, RANKS, dice, found).run(faults // 2)
    Chaos("family", folder, shards, 1, dice, found).run(faults - faults // 2)
    theirs = products(folder)
    found.differing = [name for name in calm if theirs.get(name) != calm[name]]
    return found


def products(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor file that the stages made."""
    places = [folder / "condense" / "learngene", *sorted(folder.glob("family/L*/target"))]
    return {str(f.relative_to(folder)): f.read_bytes() for place in places for f in sorted(place.glob("*.safetensors"))}


def calm_run(folder: Path, shards: Path) -> dict[str, bytes]:
    """The same stages without a fault."""
    for stage, ranks in (("condense", RANKS), ("family", 1)):
        said = Chaos(stage, folder, shards, ranks, random.Random(0), Night())._start(None)
        assert said == "done", said
    return products(folder)


def main() -> int:
    """Many rounds, and the table of what was struck."""
    from fine_dist.data.encoding import run
    from fine_dist.data.settings import EncodeConfig

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, default=Path("runs/chaos.jsonl"))
    options = parser.parse_args()
    options.record.parent.mkdir(parents=True, exist_ok=True)
    options.record.touch()
    done = {row["seed"] for row in recorded_nights(options.record)}
    seeds = [seed for seed in range(options.seed, options.seed + options.rounds) if seed not in done]
    if seeds:
        with tempfile.TemporaryDirectory() as place:
            root = Path(place)
            run(EncodeConfig(out=str(root / "data")))
            calm = calm_run(root / "calm", root / "data")
            for seed in seeds:
                begun = time.monotonic()
                folder = root / f"night{seed}"
                try:
                    found = night(seed, options.faults, folder, root / "data", calm)
                except AssertionError as error:
                    found = Night(differing=[f"did not end: {error}"])
                row = {"seed": seed, "seconds": round(time.monotonic() - begun), **vars(found)}
                with options.record.open("a") as record:
                    record.write(json.dumps(row) + "\n")
                print(row, file=sys.stderr, flush=True)
                if not found.differing:  # the files of a night that differs are copied for whoever looks for the cause
                    shutil.rmtree(folder)
                else:
                    shutil.copytree(folder, options.record.with_suffix(f".night{seed}"))
    return print_table(recorded_nights(options.record))


def recorded_nights(record: Path) -> list[dict[str, Any]]:
    """The rows of the record, one a night."""
    return [json.loads(line) for line in record.read_text().splitlines()]


def print_table(nights: list[dict[str, Any]]) -> int:
    """The table of what was struck in the nights, and the exit code: 1 where one hung or ended with other bytes."""
    struck = sum((Counter(row["struck"]) for row in nights), Counter[str]())
    print("| fault | struck |\n|---|---|")
    for fault, count in sorted(struck.items()):
        print(f"| {fault} | {count} |")
    hung, unequal = sum(row["hung"] for row in nights), sum(bool(row["differing"]) for row in nights)
    starts, seconds = sum(row["starts"] for row in nights), sum(row["seconds"] for row in nights)
    print(f"\n{len(nights)} nights, {struck.total()} faults in all, {starts} starts, {seconds} s: ", end="")
    print(f"{hung} hung, {unequal} ended with other bytes than an undisturbed run.")
    return 1 if unequal or hung else 0


if __name__ == "__main__":
    sys.exit(main())
