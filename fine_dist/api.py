"""The library in memory: `import fine_dist as fd`, then `fd.load`, `fd.condense`, `fd.initialise`, `fd.evaluate`.

Each function is the command of that name with values in place of files: the same configs, the same training loop and
the same artifacts, in a temporary folder that exists as long as the result. `Model.save` copies a result elsewhere.

Shapes: B batch, C channels, H and W height and width in latents or pixels, N images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fine_dist.artifacts.load import load_model
from fine_dist.artifacts.reading import read_artifact
from fine_dist.artifacts.targets import changed_tensors, descend, save_target
from fine_dist.core.config import validate
from fine_dist.core.errors import ConfigError, DataError
from fine_dist.data.shards import write_shards
from fine_dist.engine import dist
from fine_dist.evaluation.evaluator import Evaluator
from fine_dist.evaluation.settings import EvaluateConfig
from fine_dist.export import ExportConfig
from fine_dist.export import run as run_export
from fine_dist.family.config import InitConfig
from fine_dist.family.family_plan import Family
from fine_dist.family.train_family import run_family
from fine_dist.methods import CONDENSES, SCRATCH, from_manifest, parent_of
from fine_dist.model.arch import Arch
from fine_dist.model.artifact import save_artifact
from fine_dist.model.dit import DiT
from fine_dist.sampling.renderer import class_name_of, make_renderer
from fine_dist.sampling.settings import SampleConfig
from fine_dist.stages.condense import run as run_condense
from fine_dist.stages.settings import CondenseConfig

Latents: TypeAlias = str | Path | Iterable[tuple[Any, Any]]
"""A folder, URL or pattern of shards; or any iterable of (latent [C, H, W], label), such as a torch Dataset."""


@dataclass
class Model:
    """A model, an initialized target or a learngene, with the facts of its manifest.

    Attributes:
        path: Its artifact: a folder with tensors and a manifest.
        module: The dense DiT; it is called as `model(z, t, y)`, with z [B, C, H, W], t [B] and y int64 [B].
        about: The manifest's facts: method, hash, license, losses and others.
    """

    path: Path
    module: nn.Module
    about: dict[str, Any]
    # A TemporaryDirectory deletes its folder when it is garbage-collected, so a
    # model holds references to its own folder and to the model it came from.
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)
    _parent: Model | None = field(default=None, repr=False)

    @property
    def arch(self) -> Arch:
        """Shape of the model."""
        arch = self.module.arch
        assert isinstance(arch, Arch)
        return arch

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of labels; empty if they are unknown."""
        return tuple(self.about.get("class_names") or ())

    def __call__(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The model's prediction for latents z [B, C, H, W] at times t [B] with labels y int64 [B]."""
        output: Tensor = self.module(z, t, y)
        return output

    def sample(
        self, classes: Sequence[int | str] | None = None, *, per_class: int = 1, seed: int = 0, **settings: Any
    ) -> list[Image.Image]:
        """Sample images, `per_class` of each class in turn.

        Args:
            classes: Labels or class names. Default: every class, at most ten.
            per_class: Number of images of each class.
            seed: Seed of the noise; image i of a seed does not depend on the number of images or the batch.
            **settings: Settings of `fine-dist sample`, such as `vae="stabilityai/sd-vae-ft-ema"` for a model of latents
                or `sampler={"steps": 50, "guidance": 4.0}`.

        Raises:
            ConfigError: A setting is wrong, or a model of latents has no `vae`.
        """
        config = validate(SampleConfig, {"model": str(self.path), "seed": seed, **settings}, "sample")
        device = dist.world(config.engine.device).device or torch.device("cpu")
        renderer = make_renderer(config, str(self.path), device)
        if not renderer.pictures:
            raise ConfigError(
                f"sample: the model makes latents of {self.arch.in_channels} channels; give the autoencoder that "
                'decodes them, such as vae="stabilityai/sd-vae-ft-ema"'
            )
        if classes is None:
            classes = range(min(10, self.arch.num_classes))
        num_classes = self.arch.num_classes
        names = {class_name_of(label, renderer.facts, num_classes): label for label in range(num_classes)}
        labels = [names.get(each, -1) if isinstance(each, str) else int(each) for each in classes]
        wrong = [each for each, label in zip(classes, labels) if not 0 <= label <= num_classes]
        if wrong:
            raise ConfigError(f"sample: there is no class {wrong[0]!r}; legal: 0 to {num_classes - 1}, or a name")
        label_N = torch.tensor([label for label in labels for _ in range(per_class)])
        images = [chunk for _, chunk in renderer.render(label_N, torch.arange(len(label_N)), seed, progress=False)]
        return [_to_image(pixels) for pixels in torch.cat(images)]

    def save(self, folder: str | Path) -> Path:
        """Write the model to a new folder as a dense model, which every command reads."""
        return Path(run_export(ExportConfig(model=str(self.path), out=str(folder))))

    def export(self, folder: str | Path, to: str = "diffusers", **settings: Any) -> Path:
        """Write the model in another format: `"diffusers"` is a pipeline's folder, `"dit"` the original DiT's `.pt`.

        Args:
            **settings: Settings of `fine-dist export`, such as `vae`.
        """
        config = validate(ExportConfig, {"model": str(self.path), "out": str(folder), "to": to, **settings}, "export")
        return Path(run_export(config))


def load(source: str | Path | nn.Module | Model, **hints: Any) -> Model:
    """A model from a folder of this project, a DiT or SiT `.pt`, a diffusers folder, a hub name, or a module in memory.

    Args:
        source: The model. A `fine_dist.model.dit.DiT` and a `DiTTransformer2DModel` of diffusers are taken as they are.
        **hints: Facts that a file of another project does not state, such as `num_heads=6`.

    Raises:
        ArtifactError: It cannot be read, or is not a DiT.
    """
    if isinstance(source, Model):
        return source
    if isinstance(source, nn.Module):
        return _from_module(source)
    given = validate(CondenseConfig, {"hints": hints}, "load").hints
    module, about = load_model(source, hints=given)
    return Model(Path(source), module, about)


def condense(
    ancestor: str | Path | nn.Module | Model | None,
    data: Latents,
    *,
    steps: int = 1000,
    method: str | Mapping[str, Any] = CONDENSES.name,
    arch: str | Mapping[str, Any] | None = None,
    held_out: Latents | None = None,
    run_dir: str | Path | None = None,
    **settings: Any,
) -> Model:
    """Stage 1: condense an ancestor into a learngene (`fine-dist condense`).

    Args:
        ancestor: The pretrained model; None trains a learngene from random factors, which needs `arch` and many more
            steps.
        data: Training latents.
        steps: Number of optimizer steps.
        method: Name of the method, or its settings with a `name`.
        arch: Shape of the learngene. Default: the ancestor's.
        held_out: Latents on which the held-out loss is measured.
        run_dir: Folder of checkpoints and logs. Default: a temporary one.
        **settings: Settings of `fine-dist condense`, such as `optim={"lr": 1e-3}, batch=64, seed=0`.

    Returns:
        The learngene; its `module` is the dense DiT that its factors compose.
    """
    workspace = _Workspace(run_dir)
    values = {
        "steps": steps,
        "method": {"name": method} if isinstance(method, str) else dict(method),
        "run_dir": str(workspace.folder),
        "data": workspace.data(data, held_out),
        **settings,
    }
    if arch is not None:
        values["arch"] = arch
    parent = None if ancestor is None else load(ancestor)
    if parent is not None:
        values["ancestor"] = str(parent.path)
    return workspace.model(run_condense(validate(CondenseConfig, values, "condense")), parent)


def initialise(
    learngene: str | Path | Model,
    depth: int,
    data: Latents | None = None,
    *,
    steps: int = 300,
    held_out: Latents | None = None,
    run_dir: str | Path | None = None,
    **settings: Any,
) -> Model:
    """Stage 2: initialize a model of another depth from a learngene (`fine-dist init`).

    Args:
        learngene: A learngene, or a model for methods that need none, such as depth pruning.
        depth: Number of layers.
        data: Latents to train the method's scalers on, such as FINE's sigma. None returns the untrained target.
        steps: Number of optimizer steps.
        held_out: Latents on which the held-out loss is measured.
        run_dir: Folder of checkpoints and logs. Default: a temporary one.
        **settings: Settings of `fine-dist init`, such as `method={"name": "weight_selection"}` or `optim={"lr": 1e-2}`.

    Returns:
        The initialized model, dense, ready for training or sampling.
    """
    parent, workspace = load(learngene), _Workspace(run_dir)
    values: dict[str, Any] = {
        "parent": str(parent.path),
        "depths": [depth],
        "run_dir": str(workspace.folder),
        **settings,
    }
    if data is None:
        return workspace.model(_untrained(validate(InitConfig, values, "initialise"), workspace.folder), parent)
    values |= {"steps": steps, "data": workspace.data(data, held_out)}
    config = validate(InitConfig, values, "initialise")
    family = Family(config)
    if len(family.members) != 1:
        raise ConfigError(
            f"initialise: {len(family.members)} targets were asked for; use `fine-dist init` for families"
        )
    return workspace.model(run_family(family, False) / family.members[0].name, parent)


def evaluate(
    model: str | Path | nn.Module | Model, held_out: Latents | None = None, **settings: Any
) -> dict[str, float]:
    """Metrics of a model, by name (`fine-dist evaluate`).

    Args:
        model: The model.
        held_out: Latents on which the held-out loss is measured.
        **settings: Settings of `fine-dist evaluate`, such as `metrics=["fid"], samples=50_000, reference="FILE.npz",
            features={"inception": "FILE.pth"}`.
    """
    given, workspace = load(model), _Workspace(None)
    values: dict[str, Any] = {"models": [str(given.path)], "run_dir": str(workspace.folder), **settings}
    if held_out is not None:
        values["data"] = {**values.get("data", {}), "held_out": workspace.shards(held_out, "held_out")}
    config = validate(EvaluateConfig, values, "evaluate")
    evaluator = Evaluator(config, dist.world(config.engine.device))
    return evaluator.measure(evaluator.renderer(str(given.path))).numbers()


class _Workspace:
    """Folders of a run and of latents that were given as an iterable; temporary unless `run_dir` is given."""

    def __init__(self, run_dir: str | Path | None) -> None:
        self.temporary = tempfile.TemporaryDirectory(prefix="fine_dist-")
        self.folder = Path(run_dir) if run_dir is not None else Path(self.temporary.name) / "run"

    def data(self, train: Latents, held_out: Latents | None) -> dict[str, Any]:
        paths = {"shards": self.shards(train, "train")}
        return paths if held_out is None else {**paths, "held_out": self.shards(held_out, "held_out")}

    def shards(self, latents: Latents, name: str) -> str:
        if isinstance(latents, (str, Path)):
            return str(latents)
        pairs = [(np.asarray(latent, np.float32), int(label)) for latent, label in latents]
        if not pairs:
            raise DataError(f"{name}: the iterable is empty; (latent, label) pairs are needed")
        images, labels = np.stack([image for image, _ in pairs]), np.array([label for _, label in pairs])
        folder = Path(self.temporary.name) / name
        classes = int(labels.max()) + 1
        write_shards(
            folder,
            images,
            labels,
            num_classes=classes,
            dtype="float32",
            # Shards are divided among readers and shuffled; with a single shard neither is possible.
            shard_samples=max(1, len(pairs) // 16),
        )
        return str(folder)

    def model(self, path: str | Path, parent: Model | None) -> Model:
        module, about = load_model(path)
        return Model(Path(path), module, about, self.temporary, parent)


def _untrained(config: InitConfig, folder: Path) -> Path:
    """The target of a config before any training, as an artifact."""
    source = parent_of(read_artifact(str(config.parent), config.hints))
    method = from_manifest(config.method.model_dump() if config.method else source.artifact.method)
    arch = (config.arch or source.artifact.arch).model_copy(update={"num_layers": config.depths[0]})
    model = descend(method, source, arch, config.seeds[0]).model
    names = list(model.state_dict())
    facts = {"seed": config.seeds[0], "steps": 0}
    own = changed_tensors(model, source)
    target = folder / "target"
    settings = method.config.model_dump()
    save_target(target, method=settings, parent=source, arch=arch, tensors=own, names=names, facts=facts)
    return target


def _from_module(module: nn.Module) -> Model:
    """A module in memory as an artifact: a fine_dist DiT, or a model of diffusers."""
    folder = tempfile.TemporaryDirectory(prefix="fine_dist-")
    if isinstance(module, DiT):
        path = Path(folder.name) / "model"
        save_artifact(path, kind="model", method=SCRATCH.model_dump(), arch=module.arch, tensors=module.state_dict())
    elif callable(getattr(module, "save_pretrained", None)):
        path = Path(folder.name) / "transformer"
        # The module is saved and then imported like any other diffusers folder,
        # because the import checks names, shapes and values.
        module.save_pretrained(str(path))  # type: ignore[operator]
    else:
        raise ConfigError(
            f"load: a {type(module).__name__} is neither a fine_dist DiT nor a model of diffusers; give a path, a hub "
            "name, a DiT or a DiTTransformer2DModel"
        )
    loaded, about = load_model(path)
    return Model(path, loaded, about, folder)


def _to_image(pixels: Tensor) -> Image.Image:
    """Pixels uint8 [C, H, W] as an image; one channel is gray."""
    array = pixels.cpu().numpy()
    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))


__all__ = ["Latents", "Model", "condense", "evaluate", "initialise", "load"]
