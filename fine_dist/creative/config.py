"""Settings of a token's training, and the runs that they describe: seeds x templates. Read without torch."""

from __future__ import annotations

import hashlib
import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from fine_dist.core.config import Config, PathKey, Seed, run_dir_of
from fine_dist.core.errors import ConfigError, RunDirError, nearest
from fine_dist.core.json_files import as_record, read_json
from fine_dist.core.settings import LaunchConfig
from fine_dist.engine.settings import EngineConfig, OptimConfig
from fine_dist.launchers.spec import check_name

SETTINGS = "settings.json"
"""File in a run's folder with the settings of the run."""
TINY = "tiny"
"""Name of a source of small random encoders (`tiny.py`), for trials and tests."""


class Template(Config):
    """The two prompts whose embeddings are trained to agree."""

    adaptive: str = "a photo of a {token} mixture"
    """Prompt with the learned token, `{token}`; it may also contain the words of the pair, `{t1}` and `{t2}`."""
    restrictive: str = "a {t1} {t2}"
    """Prompt whose meaning the token learns, with the words of a pair, `{t1}` and `{t2}`."""

    @field_validator("adaptive")
    @classmethod
    def _with_token(cls, text: str) -> str:
        return _slots(text, {"token", "t1", "t2"}, needed={"token"})

    @field_validator("restrictive")
    @classmethod
    def _with_pair(cls, text: str) -> str:
        return _slots(text, {"t1", "t2"}, needed={"t1", "t2"})


def _slots(text: str, legal: set[str], needed: set[str]) -> str:
    try:
        fields = [field for field in string.Formatter().parse(text) if field[1] is not None]
    except ValueError as error:
        raise ValueError(f"{error}; legal placeholders: {', '.join(f'{{{name}}}' for name in sorted(legal))}") from None
    placeholders = {str(name) for _, name, _, _ in fields}
    if placeholders - legal:
        wrong = sorted(placeholders - legal)[0]
        raise ValueError(f"{{{wrong}}} is no placeholder; {nearest(wrong, legal)}")
    for _, name, form, conversion in fields:
        if form or conversion:
            raise ValueError(f"{{{name}}} takes no conversion (!) and no format (:); write the placeholder alone")
    if needed - placeholders:
        raise ValueError(f"{{{sorted(needed - placeholders)[0]}}} is missing")
    return text


class CreativeConfig(Config):
    """Learn the embedding of one new token on frozen CLIP text encoders (CreTok, arXiv 2410.24160); no images needed.

    Several seeds or templates are several runs. They are packed: their rows go through the encoder as one batch.
    """

    run_dir: PathKey = "runs/creative"
    """Run directory: it gets `token/` of a single run, or one folder for each of several runs."""
    encoders: tuple[PathKey, ...] = ("stabilityai/stable-diffusion-3-medium-diffusers",)
    """Folders or hub names of a pipeline, whose CLIP text encoders are used, or of one or two CLIP text encoders.
    `tiny` makes small random ones for trials."""
    token: str = "<CreTok>"
    """Name of the new token as it is written in prompts: one word without spaces."""
    start: str = "creative"
    """Word whose embedding is the token's initial value; it must be a single token in every vocabulary."""
    template: Template = Template()
    """The two prompts of a run. Set `templates` instead for several runs with different prompts."""
    templates: dict[str, Template] = Field(default_factory=dict)
    """Several pairs of prompts by name, one run each; they replace `template`."""
    seeds: tuple[Seed, ...] = (0,)
    """Random seeds, one run each: a seed determines the pairs of every step."""
    concepts: PathKey | None = None
    """Text file with one word per line, from which pairs are sampled. Default: the project's own list of 60 nouns."""
    pairs: PathKey | None = None
    """Text file with one pair of words per line, separated by a comma or a tab; it replaces `concepts`."""
    num_pairs: int = Field(200, ge=1, le=1_000_000)
    """Number of training pairs sampled from the concepts; the paper uses 200."""
    held_out: int = Field(27, ge=1, le=1_000_000)
    """Number of held-out pairs, which are measured and never trained on; the paper uses 27."""
    split_seed: int = Field(0, ge=0, le=2**63 - 1)
    """Seed of the split into training and held-out pairs. All runs share it, so their results are comparable."""
    max_cosine: float = Field(0.5, gt=0, le=1)
    """Clamp of the loss, 1 - min(cosine, max_cosine); the paper uses 0.5. A pair whose cosine exceeds it has no
    gradient, so raise it when the start word is already that close."""
    shuffled: bool = True
    """Also train a control for each run, on targets whose coordinates are shuffled; the report compares with it."""
    cache: bool = True
    """Compute the part of a prompt before the token once. It is exact, because the encoders' attention is causal."""
    steps: int = Field(10_000, ge=1, le=1_000_000_000)
    """Number of optimizer steps; the paper uses 10,000."""
    batch: int = Field(16, ge=1, le=2**16)
    """Number of pairs per optimizer step over all processes, each in both orders; the paper uses 16."""
    optim: OptimConfig = OptimConfig(lr=1e-2, schedule="cosine", clip_norm=None)
    """Optimizer of the embedding row and its learning-rate schedule."""
    engine: EngineConfig = EngineConfig(ema_decay=0.0, checkpoint_every=1000, eval_every=500)
    """Settings of the training loop. The EMA of the row is measured and saved; with decay 0 it is the row itself."""
    launch: LaunchConfig = LaunchConfig()
    """Resources of a submitted job."""
    pack: int = Field(8, ge=1, le=4_096)
    """Maximum number of runs that one task trains together."""
    only: tuple[str, ...] = ()
    """Names of the runs to train. Default: all runs of the config."""

    @field_validator("token")
    @classmethod
    def _one_word(cls, token: str) -> str:
        if not token or re.search(r"\s", token):
            raise ValueError(f"{token!r} is not one word; give a word without spaces, such as <CreTok>")
        return token


@dataclass(frozen=True)
class TokenRun:
    """One run: a seed and a template; its token is written to `folder`."""

    name: str
    seed: int
    template: Template
    folder: Path


def expand(config: CreativeConfig, everyone: bool = False) -> list[TokenRun]:
    """The runs of a config, or those named in `only`. Raises `ConfigError` for an impossible grid.

    The run of a config with one seed and one template is written to the run directory itself.
    """
    templates = config.templates or {"": config.template}
    for axis, values in {"seeds": config.seeds, "encoders": config.encoders}.items():
        if not values:
            raise ConfigError(f"{axis}: an empty list; give one value or more")
        twice = [value for value in values if list(values).count(value) > 1]
        if twice:
            raise ConfigError(f"{axis}: {twice[0]} is listed twice")
    alone = len(templates) * len(config.seeds) == 1
    members = []
    for key, template in templates.items():
        for seed in config.seeds:
            try:
                name = check_name(f"{key}-s{seed}" if key else f"s{seed}")
            except ValueError as error:
                raise ConfigError(f"templates: {error}") from None
            folder = run_dir_of(config) if alone else run_dir_of(config) / name
            members.append(TokenRun(name, seed, template, folder))
    names = [run.name for run in members]
    unknown = [name for name in config.only if name not in names]
    if unknown:
        raise ConfigError(f"only: no run is called {unknown[0]!r}; {nearest(unknown[0], names)}")
    if config.optim.clip_norm is not None and (config.shuffled or (config.pack > 1 and not alone)):
        raise ConfigError(
            f"optim.clip_norm: {config.optim.clip_norm} would clip the rows of several runs by their joint norm; set "
            "it to none, or set pack to 1 and shuffled to false"
        )
    return [m for m in members if everyone or not config.only or m.name in config.only]


def is_single_run(config: CreativeConfig) -> bool:
    """Whether the config describes one run rather than a fan-out."""
    return len(expand(config, everyone=True)) == 1


def packs(config: CreativeConfig) -> dict[str, list[TokenRun]]:
    """The runs of a config in packs of at most `pack`; a pack's name is derived from its runs.

    Finished runs are packed separately, so that adding a run to a config does not train them again.
    """
    members = expand(config)
    parts = [m for m in members if is_finished(m)], [m for m in members if not is_finished(m)]
    groups = [part[i : i + config.pack] for part in parts for i in range(0, len(part), config.pack)]
    return {f"pack-{_hash(group)}": group for group in groups}


def _hash(group: list[TokenRun]) -> str:
    return hashlib.sha256(" ".join(run.name for run in group).encode()).hexdigest()[:8]


def is_finished(run: TokenRun) -> bool:
    """Whether the run has written its token."""
    return (run.folder / "DONE.json").is_file()


def settings(config: CreativeConfig, run: TokenRun) -> dict[str, Any]:
    """The settings that determine a run's result, as JSON values, without those of other runs of the config."""
    free = {"run_dir", "template", "templates", "seeds", "engine", "launch", "pack", "only", "cache"}
    engine = config.engine.model_dump(mode="json", include={"precision", "ema_decay"})
    own = {"template": run.template.model_dump(), "seed": run.seed, "engine": engine}
    return {**config.model_dump(mode="json", exclude=free), **own}


def check_folder(config: CreativeConfig, run: TokenRun) -> None:
    """`RunDirError` when the run's folder was written for other settings, naming them."""
    path = run.folder / SETTINGS
    if not path.is_file():
        return
    remedy = "choose another run_dir, or delete that folder"
    stored = as_record(dict[str, Any], read_json(path, RunDirError, remedy), path, RunDirError, remedy)
    now = settings(config, run)
    differing = [f"{key}: {stored.get(key)!r} there, {now[key]!r} now" for key in now if stored.get(key) != now[key]]
    if differing:
        raise RunDirError(
            f"{run.folder} was written with other settings:\n  "
            + "\n  ".join(differing)
            + "\nchoose another run_dir, or give the same settings to continue"
        )
