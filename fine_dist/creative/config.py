"""The settings of a token's training, and the runs they ask for: seeds x templates. Read without torch."""

from __future__ import annotations

import hashlib
import json
import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from fine_dist.core.config import Config, run_dir_of
from fine_dist.core.errors import ConfigError, RunDirError, nearest
from fine_dist.core.settings import LaunchConfig
from fine_dist.engine.settings import EngineConfig, OptimConfig
from launchers.spec import check_name

SETTINGS = "settings.json"
"""In a run's folder: what it was made with."""
TINY = "tiny"
"""As a source of encoders: random ones, to try things out (`fine_dist.creative.tiny`)."""


class Template(Config):
    """The two prompts whose embeddings are drawn together."""

    adaptive: str = "a photo of a {token} mixture"
    """The prompt with the learned token, `{token}`; it may also name the pair, `{t1}` and `{t2}`."""
    restrictive: str = "a {t1} {t2}"
    """The prompt that it should mean, with the words of a pair: `{t1}` and `{t2}`."""

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
        found = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise ValueError(
            f"{error}; write {' and '.join(f'{{{name}}}' for name in sorted(legal))} for what is put in"
        ) from None
    if found - legal:
        wrong = sorted(found - legal)[0]
        raise ValueError(f"{{{wrong}}} is nothing that can be put in; {nearest(wrong, legal)}")
    if needed - found:
        raise ValueError(f"{{{sorted(needed - found)[0]}}} is missing")
    return text


class CreativeConfig(Config):
    """Learn the embedding of one new token on frozen CLIP text encoders (CreTok, arXiv 2410.24160); no images needed.

    Several seeds or templates are several runs; they are trained packed: their rows are one batch for the encoder.
    """

    run_dir: str = "runs/creative"
    """Where everything is written: `token/` of one run, or a folder for each of several."""
    encoders: tuple[str, ...] = ("stabilityai/stable-diffusion-3-medium-diffusers",)
    """Folders or hub names: a pipeline (its CLIP encoders are taken), or CLIP text encoders; `tiny`: random ones."""
    token: str = "<CreTok>"
    """The new token, as it will stand in prompts."""
    start: str = "creative"
    """Word whose embedding the token starts from; one token in every vocabulary."""
    template: Template = Template()
    """The prompts, when there is one pair of them."""
    templates: dict[str, Template] = Field(default_factory=dict)
    """Prompts by name, when there are several; `template` is not read then."""
    seeds: tuple[int, ...] = (0,)
    """Each chooses the pairs of every step."""
    concepts: str | None = None
    """File with a word a line, of which pairs are made; none: the project's own list of 60 nouns."""
    pairs: str | None = None
    """File with two columns (comma or tab), a pair a line; `concepts` is not read then."""
    num_pairs: int = Field(200, ge=1)
    """Pairs that are trained on, when they are made of concepts (the paper's number)."""
    held_out: int = Field(27, ge=1)
    """Pairs that are never trained on, only measured (the paper's number)."""
    split_seed: int = Field(0, ge=0)
    """Which pairs are trained on and which are held out; the same for all runs, so that they compare."""
    max_cosine: float = Field(0.5, gt=0, le=1)
    """The loss is 1 - min(cosine, this): beyond it the token is not drawn further (the paper's clamp)."""
    shuffled: bool = True
    """Beside each run, train a control row on targets whose coordinates are shuffled, for the evaluation."""
    cache: bool = True
    """Compute what stands before the token in a prompt once; exact, as the encoders' attention is causal."""
    steps: int = Field(10_000, ge=1)
    """Updates."""
    batch: int = Field(16, ge=1)
    """Pairs an update, over all processes; both orders of each (the paper accumulates 16)."""
    optim: OptimConfig = OptimConfig(lr=1e-2, schedule="cosine", clip_norm=None)
    """Optimiser of the row."""
    engine: EngineConfig = EngineConfig(ema_decay=0.0, checkpoint_every=1000, eval_every=500)
    """How the loop runs. What is measured and saved is the EMA: with decay 0 the row itself."""
    launch: LaunchConfig = LaunchConfig()
    """What a job needs, where it is submitted."""
    pack: int = Field(8, ge=1)
    """Runs that one task trains at once."""
    only: tuple[str, ...] = ()
    """Names of the runs to train; none: all."""

    @field_validator("token")
    @classmethod
    def _one_word(cls, token: str) -> str:
        if not token or re.search(r"\s", token):
            raise ValueError("a token is one word without blanks, such as <CreTok>")
        return token


@dataclass(frozen=True)
class Member:
    """One run: a seed and a template. `folder` takes its token."""

    name: str
    seed: int
    template: Template
    folder: Path


def expand(config: CreativeConfig, everyone: bool = False) -> list[Member]:
    """The runs that a config asks for (all of them, or `only`). `ConfigError` for an impossible grid.

    A config with one seed and one template is one run, which has the run directory for itself.
    """
    templates = config.templates or {"": config.template}
    for axis, values in {"seeds": config.seeds, "encoders": config.encoders}.items():
        if not values:
            raise ConfigError(f"{axis}: an empty list; give one value or more")
        twice = [value for value in values if list(values).count(value) > 1]
        if twice:
            raise ConfigError(f"{axis}: {twice[0]} is listed twice")
    if any(seed < 0 for seed in config.seeds):
        raise ConfigError(f"seeds: {min(config.seeds)} is no seed; give numbers from 0 on")
    alone = len(templates) * len(config.seeds) == 1
    members = []
    for key, template in templates.items():
        for seed in config.seeds:
            try:
                name = check_name(f"{key}-s{seed}" if key else f"s{seed}")
            except ValueError as error:
                raise ConfigError(f"templates: {error}") from None
            folder = run_dir_of(config) if alone else run_dir_of(config) / name
            members.append(Member(name, seed, template, folder))
    names = [member.name for member in members]
    unknown = [name for name in config.only if name not in names]
    if unknown:
        raise ConfigError(f"only: no run is called {unknown[0]!r}; {nearest(unknown[0], names)}")
    if config.optim.clip_norm is not None and (config.shuffled or (config.pack > 1 and not alone)):
        raise ConfigError(
            f"optim.clip_norm: {config.optim.clip_norm} would clip rows that train together by their common norm, "
            "which is no run's own; set it to null, or pack to 1 and shuffled to false"
        )
    return [m for m in members if everyone or not config.only or m.name in config.only]


def is_alone(config: CreativeConfig) -> bool:
    """Whether the config is one ordinary run rather than a fan-out."""
    return len(expand(config, everyone=True)) == 1


def packs(config: CreativeConfig) -> dict[str, list[Member]]:
    """The runs of a config in packs of at most `pack`, by a name that says which runs they are.

    Finished runs keep to themselves, so that a family that grows does not train them again.
    """
    members = expand(config)
    parts = [m for m in members if is_finished(m)], [m for m in members if not is_finished(m)]
    groups = [part[i : i + config.pack] for part in parts for i in range(0, len(part), config.pack)]
    return {f"pack-{_hash(group)}": group for group in groups}


def _hash(group: list[Member]) -> str:
    return hashlib.sha256(" ".join(member.name for member in group).encode()).hexdigest()[:8]


def is_finished(member: Member) -> bool:
    """Whether the run's token is written."""
    return (member.folder / "DONE.json").is_file()


def settings(config: CreativeConfig, member: Member) -> dict[str, Any]:
    """Everything that decides what a run becomes, as JSON values; whatever else a family has besides."""
    free = {"run_dir", "template", "templates", "seeds", "engine", "launch", "pack", "only", "cache"}
    engine = config.engine.model_dump(mode="json", include={"precision", "ema_decay"})
    own = {"template": member.template.model_dump(), "seed": member.seed, "engine": engine}
    return {**config.model_dump(mode="json", exclude=free), **own}


def check_folder(config: CreativeConfig, member: Member) -> None:
    """`RunDirError` when the run's folder was written for other settings, naming them."""
    path = member.folder / SETTINGS
    if not path.is_file():
        return
    there, now = json.loads(path.read_text(encoding="utf-8")), settings(config, member)
    differing = [f"{key}: {there.get(key)!r} there, {now[key]!r} now" for key in now if there.get(key) != now[key]]
    if differing:
        raise RunDirError(
            f"{member.folder} was made with other settings:\n  "
            + "\n  ".join(differing)
            + "\nchoose another run_dir, or give the same settings to continue"
        )
