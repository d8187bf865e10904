"""Samples images from models with any number of processes; an interrupted command resumes where it stopped.

The noise of an image depends only on the seed and the image's number. The processes divide the images among themselves
and write them to one store on disk; when all are there, rank 0 writes the files.

Letters: N images, C channels, H, W height and width of an image.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fine_dist.artifacts.locate import ARTIFACT_FOLDERS, exists_locally, is_foreign
from fine_dist.artifacts.reading import facts_of
from fine_dist.core.config import expand_path
from fine_dist.core.errors import ConfigError, nearest
from fine_dist.core.files import sha256_text
from fine_dist.core.limits import FAR_BEYOND, GIB, memory_bytes
from fine_dist.core.seeds import mix
from fine_dist.engine.dist import all_reduce_max, all_reduce_sum, barrier, world
from fine_dist.engine.world import World
from fine_dist.model.arch import Arch
from fine_dist.sampling.image_grid import labelled_grid, latents_as_images, save_png
from fine_dist.sampling.renderer import ImageRenderer, class_name_of, make_renderer
from fine_dist.sampling.sample_files import (
    GRID_IMAGES,
    OutputStores,
    grid_title,
    samples_exist,
    write_files,
    write_pngs,
)
from fine_dist.sampling.settings import ALL_CLASSES, DEFAULT_CLASSES, SampleConfig


def run(config: SampleConfig) -> Path:
    """Sample the images of a config. All processes of the job call it.

    Returns:
        The folder of the files; with `compare` or a family, the path of the grid.

    Raises:
        ConfigError: No model is given, or a setting does not fit the model or the machine.
        ArtifactError: A model cannot be loaded.
        DataError: The folder holds other images.
    """
    if not config.model and not config.compare:
        raise ConfigError("model: give the folder of a model with --model")
    paths, family = expand_family([*filter(None, [config.model]), *config.compare])
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    process = world(config.engine.device)
    renderers = [make_renderer(config, path, process.device) for path in paths]
    if process.is_main:
        print("".join(f"note: {note}\n" for renderer in renderers for note in renderer.notes), end="")
    labels = labels_of(config, renderers[0].model.arch.num_classes, renderers[0].facts.class_names)
    if process.is_main:
        for renderer in renderers:
            print(f"sample: {renderer.estimate(len(labels))}", flush=True)
    if process.device is None or process.device.type == "cpu":
        for renderer in renderers:
            check_memory(config, renderer.model.arch, len(labels))
    folder = Path(expand_path(config.run_dir))
    if config.compare or family:
        return compare(config, renderers, labels, folder, process)
    return draw(config, renderers[0], labels, folder, process)


def check(config: SampleConfig) -> None:
    """Raise the errors that `run` would raise for models on this machine; for dry runs, which load no model."""
    cpu = config.engine.device == "cpu" or not torch.cuda.is_available()
    for path in expand_family([*filter(None, [config.model]), *config.compare])[0]:
        if exists_locally(path):
            facts = facts_of(path, config.hints)
            count = len(labels_of(config, facts.arch.num_classes, facts.extra.get("class_names") or ()))
            if cpu and config.launch.nodes * config.launch.processes == 1:
                check_memory(config, facts.arch, count)


def check_memory(config: SampleConfig, arch: Arch, count: int) -> None:
    """Check the memory of sampling on a CPU, where the system would kill the process without a message.

    Raises:
        ConfigError: The activations of one block exceed the machine's memory by far (`FAR_BEYOND`).
    """
    batch = min(count, config.sampler.batch)
    # Bytes of fp32 activations [B, T, D]: the residual stream, q, k, v, and the MLP's hidden layer, which is 4 D wide.
    need = 4.0 * batch * arch.num_tokens * arch.hidden_size * 8
    if need > FAR_BEYOND * memory_bytes() and config.launch.preflight != "off":
        raise ConfigError(
            f"sampler.batch {config.sampler.batch}: {arch.name} needs {need / GIB:.1f} GiB for {batch} images at once, "
            f"and this machine has {memory_bytes() / GIB:.1f}; lower it"
        )


def expand_family(paths: Sequence[str]) -> tuple[list[str], bool]:
    """Replace the folders of families by their targets.

    Other files in a family's folder (tables, logs), which the pattern `FAMILY/*` includes, are ignored.

    Returns:
        The paths of the models, and whether there was a family.

    Raises:
        ConfigError: None of the paths is a model.
    """
    models: list[str] = []
    family = False
    for path in paths:
        folder = Path(expand_path(path))
        if _has_artifact(folder):
            models.append(path)
        elif members := family_members(folder):
            models += map(str, members)
            family = True
        elif (is_foreign(path) and not folder.exists()) or not family_members(folder.parent):
            models.append(path)  # another project's model or a hub name; else loading it raises the error
    if not models:
        raise ConfigError(
            f"model: {', '.join(paths)}: none of these is a model; give the folder of a family or a model"
        )
    return models, family


def family_members(folder: Path) -> list[Path]:
    """Return the run directories of the finished targets in a family's folder, by name; empty for other folders."""
    if not folder.is_dir():
        return []
    return sorted(part for part in folder.iterdir() if (part / "target" / "manifest.json").is_file())


def _has_artifact(folder: Path) -> bool:
    return any((folder / name / "manifest.json").is_file() for name in (".", *ARTIFACT_FOLDERS))


def labels_of(config: SampleConfig, num_classes: int, names: Sequence[str]) -> Tensor:
    """Return the labels [N] int64 of the images, in order.

    Args:
        config: The settings `classes`, `per_class`, `count` and `seed`.
        num_classes: Number of the model's classes; this number itself is the null label.
        names: The model's class names by label; empty if unknown.

    Raises:
        ConfigError: The model does not have a class.
    """
    chosen: list[int] = []
    for word in config.classes:
        if word in ALL_CLASSES:
            chosen += range(num_classes)
        elif _is_number(str(word)) and str(word) not in names:
            if not 0 <= int(word) <= num_classes:
                raise ConfigError(f"classes: {word} is out of range; legal: 0..{num_classes} (the last is no class)")
            chosen.append(int(word))
        elif str(word) in names:
            chosen.append(list(names).index(str(word)))
        else:
            legal = nearest(str(word), [*list(names)[:1000], *ALL_CLASSES])
            numbers = f"the model's manifest names none; legal: 0..{num_classes}, {', '.join(ALL_CLASSES)}"
            raise ConfigError(f"classes: no class is called {str(word)[:100]!r}; {legal if names else numbers}")
    classes = torch.tensor(chosen) if chosen else _default_classes(config, num_classes)
    balanced = "balanced" in config.classes
    count = config.count or (config.per_class * len(classes) if balanced else None)
    return classes[torch.arange(count) % len(classes)] if count else classes.repeat_interleave(config.per_class)


def _default_classes(config: SampleConfig, num_classes: int) -> Tensor:
    """Return all classes if they are few or `count` limits the images, else `DEFAULT_CLASSES`, chosen by the seed."""
    if num_classes <= DEFAULT_CLASSES or config.count:
        return torch.arange(num_classes)
    # Mixed, so that the choice of classes is independent of the images' noise, which has the same seed.
    generator = torch.Generator().manual_seed(mix(config.seed, num_classes))
    return torch.randperm(num_classes, generator=generator)[:DEFAULT_CLASSES].sort().values


def _is_number(word: str) -> bool:
    # Fewer digits than 19, so that the number fits int64.
    return word.isascii() and word.removeprefix("-").isdigit() and len(word) < 19


def draw(config: SampleConfig, renderer: ImageRenderer, labels: Tensor, folder: Path, process: World) -> Path:
    """Sample images of labels [N] and write the files of `config.formats` to a folder, which is returned.

    All processes of the job call it.

    Raises:
        ConfigError: A format needs images, and there is no autoencoder for the model's latents.
        DataError: The folder holds other images.
    """
    wanted = set(config.formats)
    if wanted & {"png", "npz"} and not renderer.pictures:
        raise ConfigError(
            f"formats: {', '.join(sorted(wanted & {'png', 'npz'}))} of latents needs images; give what decodes them "
            "with --vae FOLDER"
        )
    identity = renderer.protocol(config.seed) | {
        "weights": config.weights,
        "vae": [config.vae, config.vae_precision] if config.vae else None,
        # The hash of 50,000 labels identifies them as well, and samples.json stays readable.
        "labels": labels.tolist() if len(labels) <= 1000 else sha256_text(" ".join(map(str, labels.tolist()))),
    }
    if samples_exist(folder, identity, wanted):
        return folder
    with OutputStores(folder, renderer, labels, identity, wanted) as stores:
        begun = time.perf_counter()
        own_indices = stores.missing(process.rank, process.world_size)
        progress = f"sample {renderer.model.arch.name}" if process.is_main else False
        for batch, images in renderer.render(labels[own_indices], own_indices, config.seed, progress):
            stores.write(batch, images)
        # The time of the slowest process. A process without images does not count: it only opened files.
        spent = torch.tensor([time.perf_counter() - begun if len(own_indices) else 0.0], dtype=torch.float64)
        seconds = float(all_reduce_max(spent, process)[0])  # also waits until all processes have written their images
        if "png" in wanted and stores.images is not None:
            write_pngs(stores.images, renderer, labels, folder, process)
        # Rank 0 deletes the stores in `write_files`, so all processes must have read their images from them.
        barrier(process)
        if process.is_main:
            write_files(stores, config, renderer, labels, folder, identity, seconds)
    barrier(process)
    return folder


def compare(
    config: SampleConfig, renderers: Sequence[ImageRenderer], labels: Tensor, folder: Path, process: World
) -> Path:
    """Write one labeled grid with one row per model, of the same seed and classes, and return the path of the PNG file.

    All processes of the job call it.

    Raises:
        ConfigError: There are more than `GRID_IMAGES` images per model, or the models differ in their classes or in the
            size of their images.
    """
    if len(labels) > GRID_IMAGES:
        raise ConfigError(f"compare: {len(labels)} images of each model are too many; {GRID_IMAGES} at most (--count)")
    _check_comparable(renderers)
    rows = []
    for renderer in renderers:
        own_images: dict[int, Tensor] = {}
        own_indices = torch.arange(process.rank, len(labels), process.world_size)
        progress = f"sample {Path(renderer.where).name}" if process.is_main else False
        for batch, images in renderer.render(labels[own_indices], own_indices, config.seed, progress):
            own_images.update(zip(batch.indices.tolist(), images if renderer.pictures else latents_as_images(images)))
        rows.append(_gather(own_images, len(labels), renderer, process))
    path = folder / "compare.png"
    if process.is_main:
        first = renderers[0]
        captions = [class_name_of(int(label), first.facts, first.model.arch.num_classes) for label in labels]
        grid = labelled_grid(
            torch.cat(rows),
            captions * len(rows),
            len(labels),
            title=grid_title(first, config),
            rows=_short_names([renderer.where for renderer in renderers]),
        )
        save_png(grid, path)
        print(f"sample: {len(rows)} models, a row each, in {path}")
    return path


def _check_comparable(renderers: Sequence[ImageRenderer]) -> None:
    """Raise `ConfigError`, before anything is sampled, unless all models have the same classes and image size."""
    if len(counts := {renderer.model.arch.num_classes for renderer in renderers}) > 1:
        raise ConfigError(
            f"compare: the models have different numbers of classes: {', '.join(map(str, sorted(counts)))}"
        )
    if len(sizes := {renderer.image_shape for renderer in renderers}) > 1:
        sizes_text = ", ".join("x".join(map(str, size)) for size in sorted(sizes))
        raise ConfigError(f"compare: the models draw images of different sizes: {sizes_text}")


def _gather(own_images: dict[int, Tensor], count: int, renderer: ImageRenderer, process: World) -> Tensor:
    """Return all images uint8 [N, C, H, W] on every process; `own_images` maps this process's numbers to [C, H, W]."""
    # Each image is on one process and zero on the others. gloo cannot sum uint8 on every platform.
    images = torch.zeros(count, *renderer.image_shape, dtype=torch.int32)
    for number, image in own_images.items():
        images[number] = image.int()
    return all_reduce_sum(images, process).to(torch.uint8)


def _short_names(paths: Sequence[str]) -> list[str]:
    """Return the last component of each path, or the last two if the last ones are not unique."""
    last = [Path(path).name for path in paths]
    # The models of two runs may both end in /model.
    return last if len(set(last)) == len(last) else ["/".join(Path(path).parts[-2:]) for path in paths]
