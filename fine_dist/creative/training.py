"""Training: the runs of a config as programs of the engine, several in one program, and the files of each run."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fine_dist.core.config import expand_path, run_dir_of
from fine_dist.core.errors import TrainingError
from fine_dist.core.files import write_atomic
from fine_dist.creative.config import (
    SETTINGS,
    TINY,
    CreativeConfig,
    TokenRun,
    check_folder,
    expand,
    is_finished,
    is_single_run,
    packs,
    settings,
)
from fine_dist.creative.encoder_sources import load_encoders
from fine_dist.creative.encoders import TextEncoder
from fine_dist.creative.evaluate import START_WORD, HeldOutPairs, NearestWords, measure, report
from fine_dist.creative.pairs import Pairs, PairStream, make_pairs
from fine_dist.creative.saving import save_token
from fine_dist.creative.tokens import RowSpec, TokenObjective, Tokens
from fine_dist.engine import dist
from fine_dist.engine.fit import fit
from fine_dist.engine.program import FitResult, Program
from fine_dist.engine.run_dir import RunDir
from fine_dist.engine.world import World
from fine_dist.launchers.state_table import StateTable

log = logging.getLogger(__name__)
KIND = "creative"
LEARNED, SHUFFLED = "the learned token", "a row trained on shuffled targets"


def train(config: CreativeConfig, table: StateTable | None = None) -> Path:
    """Train the unfinished runs of a config, one pack after another, in this process; returns the run directory.

    Args:
        config: The config.
        table: State table with a row for each run, updated on rank 0.

    Raises:
        ResumeLater: The run was stopped; the same command resumes it.
    """
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    world = dist.world(config.engine.device)
    folder = run_dir_of(config)
    for member in expand(config):
        check_folder(config, member)
    if is_single_run(config):
        train_pack(config, expand(config), folder, world)
        return folder
    for name, members in packs(config).items():
        train_pack(config, members, folder / "packs" / name, world)
        if table is not None and world.is_main:
            for member in members:
                table.finish(member.name, "done")
    return folder


def train_pack(config: CreativeConfig, members: Sequence[TokenRun], pack_folder: Path, world: World) -> None:
    """Train some runs as one program with checkpoints and logs in `pack_folder`, and write the token of each run."""
    if all(is_finished(member) for member in members):
        if world.is_main:
            print(f"creative: already finished: {', '.join(str(member.folder) for member in members)}", flush=True)
        return
    # the directory is claimed only after words, encoders and the initial token have been checked
    encoders = load_encoders(config.encoders, config.token, world.device)
    pairs = make_pairs(config)
    program = make_program(config, members, encoders, pairs, world)
    settings = config.model_dump(mode="json", include={"optim", "batch", "steps"})
    identity = {**program.identity, **settings, "precision": config.engine.precision}
    if world.is_main:
        assert isinstance(program.model, Tokens)
        warn_at_clamp(config, program.model, len(pairs.trained))
    with RunDir(pack_folder).open(KIND, identity, world) as run_dir:
        fitted = fit(
            program,
            steps=config.steps,
            global_batch=config.batch,
            optim=config.optim,
            engine=config.engine,
            run_dir=run_dir,
            seed=config.split_seed,
            title=f"creative {config.token}",
            world=world,
            claim=lambda: run_dir.claim(_own(config, members)) if world.is_main else None,
        )
        if world.is_main:
            # A token only fits the encoder it was trained on; a change of the weights would silently make it useless.
            if {encoder.key: encoder.hash() for encoder in encoders} != program.identity["encoders"]:
                raise TrainingError("an encoder's weights changed while a token trained on it; nothing was saved")
            for index in range(len(members)):
                save_run(config, members, index, encoders, pairs, fitted, program.identity["encoders"])
            facts = {"steps": fitted.step, "seconds": fitted.seconds, "losses": fitted.losses}
            for member in members:
                write_atomic(member.folder / "DONE.json", json.dumps({"name": member.name, **facts}, indent=1) + "\n")
            run_dir.finish(**facts)


def _own(config: CreativeConfig, members: Sequence[TokenRun]) -> CreativeConfig:
    """A config of these runs only and without speed settings, so that a pack resumes after other runs are added."""
    names = {member.name for member in members}
    templates = {key: t for key, t in config.templates.items() if any(n.startswith(f"{key}-s") for n in names)}
    seeds = tuple(seed for seed in config.seeds if any(member.seed == seed for member in members))
    only = () if is_single_run(config) else tuple(member.name for member in members)
    fixed = {"pack": len(members), "cache": True}
    return config.model_copy(update={"templates": templates, "seeds": seeds, "only": only, **fixed})


def make_program(
    config: CreativeConfig, members: Sequence[TokenRun], encoders: Sequence[TextEncoder], pairs: Pairs, world: World
) -> Program:
    """The program of some runs: one row for each run and encoder, followed by the rows of the controls."""
    specs = [RowSpec(member.template, member.seed) for member in members]
    if config.shuffled:
        specs += [RowSpec(member.template, member.seed, shuffled=True) for member in members]
    model = Tokens(encoders, specs, pairs.all, token=config.token, start=config.start, cache=config.cache)
    stream = PairStream(
        [spec.seed for spec in specs],
        len(pairs.trained),
        global_batch=config.batch,
        rank=world.rank,
        world_size=world.world_size,
    )
    names = [""] if len(members) == 1 and is_single_run(config) else [member.name for member in members]
    flops, positions = model.work(config.engine.micro_batch or max(1, config.batch // world.world_size))
    rows = [{"template": spec.template.model_dump(), "seed": spec.seed, "shuffled": spec.shuffled} for spec in specs]
    return Program(
        model,
        TokenObjective(config.max_cosine, len(members)),
        stream,
        identity={
            "method": "cretok",
            "encoders": {encoder.key: encoder.hash() for encoder in encoders},
            "pairs": _hash(pairs),
            "rows": rows,
            "start": config.start,
            "max_cosine": config.max_cosine,
        },
        held_out=HeldOutPairs(names, len(pairs.trained), len(pairs.all), config.max_cosine),
        texts=NearestWords(names),
        flops_per_sample=flops,
        tokens_per_sample=positions,
    )


def save_run(
    config: CreativeConfig,
    members: Sequence[TokenRun],
    index: int,
    encoders: Sequence[TextEncoder],
    pairs: Pairs,
    fitted: FitResult,
    hashes: dict[str, str],
) -> None:
    """Write a run's token and its report."""
    member = members[index]
    rows = {key: fitted.ema[key][index] for key in (encoder.key for encoder in encoders)}
    control = {key: fitted.ema[key][len(members) + index] for key in rows} if config.shuffled else {}
    measured = measure(
        encoders,
        member.template,
        pairs.held_out,
        token=config.token,
        start=config.start,
        rows={LEARNED: rows, **({SHUFFLED: control} if control else {})},
    )
    facts: dict[str, Any] = {
        "encoders": [_whereabouts(source) for source in config.encoders],
        "encoder_sha256": hashes,
        "template": member.template.model_dump(),
        "start": config.start,
        "seed": member.seed,
        "steps": fitted.step,
        "batch": config.batch,
        "max_cosine": config.max_cosine,
        "word_list": word_list(config),
        "num_trained": len(pairs.trained),
        "num_held_out": len(pairs.held_out),
        "held_out": [list(pair) for pair in pairs.held_out],
        "nearest": {encoder.key: encoder.nearest(rows[encoder.key]) for encoder in encoders},
        "cosines": measured,
    }
    member.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(member.folder / SETTINGS, json.dumps(settings(config, member), indent=1) + "\n")
    manifest = save_token(member.folder / "token", config.token, rows, facts, control)
    write_atomic(member.folder / "report.md", report(f"CreTok, {member.name}", manifest, measured))
    learned, start = measured[LEARNED]["mean"], measured[START_WORD.format(config.start)]["mean"]
    print(
        f"creative: {member.name}: mean cosine to {len(pairs.held_out)} held-out pairs {learned:.4f} (start word "
        f"{start:.4f})\n  token: {member.folder / 'token'}\n  report: {member.folder / 'report.md'}\n"
        f"  measure it again: fine-dist creative --evaluate {member.folder}",
        flush=True,
    )


@torch.no_grad()
def warn_at_clamp(config: CreativeConfig, model: Tokens, num_trained: int) -> None:
    """Warn when the loss has hardly a gradient: nine in ten cosines exceed the clamp before the first step."""
    index = torch.arange(num_trained, device=next(model.parameters()).device)
    cosines = model(index[:, None].expand(-1, len(model.specs)))[:, : len(model.specs) // (1 + config.shuffled)]
    at_clamp = float((cosines >= config.max_cosine).float().mean())
    if at_clamp >= 0.9:
        log.warning(
            "the loss is at its clamp from the first step: with start %r, %.0f%% of the training pairs have a cosine "
            "beyond max_cosine %g (mean %.4f), so the token will hardly move; raise --max-cosine above %.4f, or choose "
            "another --start",
            config.start,
            100 * at_clamp,
            config.max_cosine,
            float(cosines.mean()),
            float(cosines.max()),
        )


def _whereabouts(source: str) -> str:
    """A source of encoders that can be found again from another directory."""
    path = Path(expand_path(source))
    return str(path.resolve()) if source != TINY and path.is_dir() else source


def word_list(config: CreativeConfig) -> str:
    """Where the pairs come from, in words."""
    if config.pairs or config.concepts:
        return f"pairs of {Path(config.pairs or config.concepts or '').name}"
    return "pairs made of this project's own list of 60 nouns (the paper's 200 and 27 pairs are not public)"


def _hash(pairs: Pairs) -> str:
    return hashlib.sha256(json.dumps([pairs.trained, pairs.held_out]).encode()).hexdigest()
