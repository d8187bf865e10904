"""Drawing images of a model with any number of processes, so that an interrupted command continues where it stopped.

Every image depends on (seed, its number) alone. The processes divide the images, write them into one store on disk, and
the first process makes the files when all images are there.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fine_dist.artifacts.locate import ARTIFACT_FOLDERS, exists_locally, is_foreign
from fine_dist.artifacts.reading import facts_of
from fine_dist.core.config import expand_path
from fine_dist.core.errors import ConfigError, DataError, nearest
from fine_dist.core.files import sha256_text, write_atomic
from fine_dist.core.json_files import Record, read_record
from fine_dist.core.limits import FAR_BEYOND, GIB, memory_bytes
from fine_dist.core.seeds import mix
from fine_dist.diffusion.samplers import SampledBatch
from fine_dist.engine.dist import all_reduce_max, all_reduce_sum, barrier, world
from fine_dist.engine.world import World
from fine_dist.model.arch import Arch
from fine_dist.sampling.image_grid import labelled_grid, latents_as_images, save_png
from fine_dist.sampling.image_store import ImageStore, LatentStore
from fine_dist.sampling.renderer import ImageRenderer, class_name_of, make_renderer
from fine_dist.sampling.settings import ALL_CLASSES, DEFAULT_CLASSES, SampleConfig

DONE = "samples.json"
GRID_IMAGES = 100
"""Images in a grid, at most: ten rows of ten can be looked at."""


def run(config: SampleConfig) -> Path:
    """Draw what a config asks for, in this process among the others; returns the folder or the picture of a grid."""
    if not config.model and not config.compare:
        raise ConfigError("model: give the folder of a model with --model")
    paths, family = expand_family([*filter(None, [config.model]), *config.compare])
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    here = world(config.engine.device)
    renderers = [make_renderer(config, path, here.device) for path in paths]
    if here.is_main:
        print("".join(f"note: {note}\n" for renderer in renderers for note in renderer.notes), end="")
    labels = labels_of(config, renderers[0].model.arch.num_classes, renderers[0].facts.class_names)
    if here.is_main:
        for renderer in renderers:
            print(f"sample: {renderer.estimate(len(labels))}", flush=True)
    if here.device is None or here.device.type == "cpu":
        for renderer in renderers:
            check_memory(config, renderer.model.arch, len(labels))
    folder = Path(expand_path(config.run_dir))
    if config.compare or family:
        return compare(config, renderers, labels, folder, here)
    return draw(config, renderers[0], labels, folder, here)


def check(config: SampleConfig) -> None:
    """Raise what `run` would refuse of models that are on this machine, for a dry run. No weights are read."""
    cpu = config.engine.device == "cpu" or not torch.cuda.is_available()
    for path in expand_family([*filter(None, [config.model]), *config.compare])[0]:
        if exists_locally(path):
            facts = facts_of(path, config.hints)
            count = len(labels_of(config, facts.arch.num_classes, facts.extra.get("class_names") or ()))
            if cpu and config.launch.nodes * config.launch.processes == 1:
                check_memory(config, facts.arch, count)


def check_memory(config: SampleConfig, arch: Arch, count: int) -> None:
    """Refuse a batch that is far beyond the memory of a CPU, where the process would be killed without a word.

    Raises:
        ConfigError: The activations of one block alone are far beyond it (`FAR_BEYOND`).
    """
    batch = min(count, config.sampler.batch)
    need = 4.0 * batch * arch.num_tokens * arch.hidden_size * 8  # the stream, queries, keys, values, the hidden layer
    if need > FAR_BEYOND * memory_bytes() and config.launch.preflight != "off":
        raise ConfigError(
            f"sampler.batch {config.sampler.batch}: {arch.name} needs {need / GIB:.1f} GiB for {batch} images at once, "
            f"and this machine has {memory_bytes() / GIB:.1f}; lower it"
        )


def expand_family(paths: Sequence[str]) -> tuple[list[str], bool]:
    """The models of some paths, a family's folder replaced by its targets, and whether there was a family.

    Other things in a family's folder (tables, logs), which `FAMILY/*` names too, are left out.
    """
    found: list[str] = []
    family = False
    for path in paths:
        folder = Path(expand_path(path))
        if _has_artifact(folder):
            found.append(path)
        elif members := family_members(folder):
            found += map(str, members)
            family = True
        elif (is_foreign(path) and not folder.exists()) or not family_members(folder.parent):
            found.append(path)  # another project's model, a hub name; or loading it says what is wrong with it
    if not found:
        raise ConfigError(
            f"model: {', '.join(paths)}: none of these is a model; give the folder of a family or a model"
        )
    return found, family


def family_members(folder: Path) -> list[Path]:
    """The finished targets in a folder that `init` wrote, in order of their names; empty where it is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(part for part in folder.iterdir() if (part / "target" / "manifest.json").is_file())


def _has_artifact(folder: Path) -> bool:
    return any((folder / name / "manifest.json").is_file() for name in (".", *ARTIFACT_FOLDERS))


def labels_of(config: SampleConfig, num_classes: int, names: Sequence[str]) -> Tensor:
    """Labels [N] int64 of the images, in order. `ConfigError` for a class that the model does not have."""
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
    """All classes where they are few or `count` bounds the images, else some that the seed chooses, in order."""
    if num_classes <= DEFAULT_CLASSES or config.count:
        return torch.arange(num_classes)
    # Mixed, so that the choice of classes is independent of the images' noise, which comes from the same seed.
    generator = torch.Generator().manual_seed(mix(config.seed, num_classes))
    return torch.randperm(num_classes, generator=generator)[:DEFAULT_CLASSES].sort().values


def _is_number(word: str) -> bool:
    return word.isascii() and word.lstrip("-").isdigit() and len(word) < 19


def draw(config: SampleConfig, renderer: ImageRenderer, labels: Tensor, folder: Path, here: World) -> Path:
    """Draw all images into the files of a folder, with the other processes; returns the folder.

    Raises:
        ConfigError: A format needs images, and nothing decodes the model's latents.
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
        # 50,000 labels would make samples.json unreadable; their hash tells two orders apart just as well.
        "labels": labels.tolist() if len(labels) <= 1000 else sha256_text(" ".join(map(str, labels.tolist()))),
    }
    if _is_done(folder, identity, wanted):
        return folder
    with OutputStores(folder, renderer, labels, identity, wanted) as stores:
        begun = time.perf_counter()
        mine = stores.missing(here.rank, here.world_size)
        progress = f"sample {renderer.model.arch.name}" if here.is_main else False
        for batch, images in renderer.render(labels[mine], mine, config.seed, progress):
            stores.write(batch, images)
        # The slowest process that drew anything; a process without work spent its time waiting for files to open.
        spent = torch.tensor([time.perf_counter() - begun if len(mine) else 0.0], dtype=torch.float64)
        seconds = float(all_reduce_max(spent, here)[0])  # also waits for everybody's images
        if "png" in wanted and stores.images is not None:
            _write_pngs(stores.images, renderer, labels, folder, here)
        # Rank 0 deletes the stores, so everybody's pictures must have been written from them before.
        barrier(here)
        if here.is_main:
            _write_files(stores, config, renderer, labels, folder, identity, seconds)
    barrier(here)
    return folder


def compare(
    config: SampleConfig, renderers: Sequence[ImageRenderer], labels: Tensor, folder: Path, here: World
) -> Path:
    """One labeled grid, a row a model, of the same seeds and classes; returns the picture's path."""
    if len(labels) > GRID_IMAGES:
        raise ConfigError(f"compare: {len(labels)} images of each model are too many; {GRID_IMAGES} at most (--count)")
    rows = []
    for renderer in renderers:
        found: dict[int, Tensor] = {}
        mine = torch.arange(here.rank, len(labels), here.world_size)
        progress = f"sample {Path(renderer.where).name}" if here.is_main else False
        for batch, images in renderer.render(labels[mine], mine, config.seed, progress):
            found.update(zip(batch.indices.tolist(), images if renderer.pictures else latents_as_images(images)))
        rows.append(_gather(found, len(labels), renderer, here))
    path = folder / "compare.png"
    if here.is_main:
        sizes = {tuple(row.shape[1:]) for row in rows}
        if len(sizes) > 1:
            told = ", ".join("x".join(map(str, size)) for size in sorted(sizes))
            raise ConfigError(f"compare: the models draw images of different sizes: {told}")
        first = renderers[0]
        captions = [class_name_of(int(label), first.facts, first.model.arch.num_classes) for label in labels]
        grid = labelled_grid(
            torch.cat(rows),
            captions * len(rows),
            len(labels),
            title=_title(first, config),
            rows=_short_names([renderer.where for renderer in renderers]),
        )
        save_png(grid, path)
        print(f"sample: {len(rows)} models, a row each, in {path}")
    return path


# --- stores and files ------------------------------------------------------------------------------------------------


class OutputStores:
    """What is drawn, on disk: latents where they are wanted or there is nothing else, images where there are any."""

    def __init__(
        self, folder: Path, renderer: ImageRenderer, labels: Tensor, identity: dict[str, Any], wanted: set[Any]
    ) -> None:
        self.latents: LatentStore | None = None
        self.images: ImageStore | None = None
        shape, count = renderer.model.arch.latent_shape, len(labels)
        if "npy" in wanted or not renderer.pictures:
            self.latents = LatentStore(folder / "store" / "latents", count, shape, identity)
        if renderer.pictures and wanted & {"grid", "png", "npz"}:
            # The decoder alone knows the size of its images, and the
            # store must be allocated before the first one is drawn.
            one = renderer.finish(torch.zeros(1, *shape))
            size = (int(one.shape[2]), int(one.shape[3]))
            self.images = ImageStore(folder / "store" / "images", count, size, int(one.shape[1]), identity)

    @property
    def all(self) -> list[LatentStore | ImageStore]:
        return [store for store in (self.latents, self.images) if store is not None]

    def missing(self, rank: int, size: int) -> Tensor:
        """Numbers of images that are not in every store yet, this process's share of them."""
        return torch.cat([store.missing(rank, size) for store in self.all]).unique()

    def write(self, batch: SampledBatch, images: Tensor) -> None:
        """Store a batch; it is on disk when this returns."""
        if self.latents is not None:
            self.latents.write(batch.indices, batch.latents)
        if self.images is not None:
            self.images.write(batch.indices, images)

    def __enter__(self) -> OutputStores:
        return self

    def __exit__(self, *_: object) -> None:
        for store in self.all:
            store.close()


class SamplesDone(Record):
    """The file that says which images a folder holds."""

    protocol: dict[str, Any]
    """What decides every image: the model's hash, the sampler, the seed, the classes."""
    formats: list[str]
    """Formats that are complete."""


def _is_done(folder: Path, identity: dict[str, Any], wanted: set[Any]) -> bool:
    """Whether these images are in the folder. `DataError` when others are."""
    try:
        found = read_record(SamplesDone, folder / DONE, DataError, f"remove {folder}, or choose another --run-dir")
    except FileNotFoundError:
        return False
    protocol = found.protocol
    differs = [key for key in identity if protocol.get(key) != json.loads(json.dumps(identity[key]))]
    if differs:
        raise DataError(
            f"{folder} holds other images (another {', '.join(differs)}); choose another --run-dir, or remove it"
        )
    if not wanted <= set(found.formats):
        return False
    print(f"sample: drawn before; the files are in {folder}")
    return True


def _write_files(
    stores: OutputStores,
    config: SampleConfig,
    renderer: ImageRenderer,
    labels: Tensor,
    folder: Path,
    identity: dict[str, Any],
    seconds: float,
) -> None:
    if "npy" in config.formats and stores.latents is not None:
        stores.latents.to_npy(folder / "samples.npy")
    file = io.BytesIO()
    np.save(file, labels.numpy())
    write_atomic(folder / "labels.npy", file.getvalue())
    if "npz" in config.formats and stores.images is not None:
        stores.images.to_npz(folder / "samples.npz")
    if "grid" in config.formats:
        _write_grid(stores, config, renderer, labels, folder)
    record = {"protocol": identity, "formats": config.formats, "count": len(labels), "source": renderer.where}
    # From here on the same command does nothing, so it stands after every file that it promises.
    write_atomic(folder / DONE, json.dumps(record, indent=1) + "\n")
    # Last, after the record: an interruption before it costs disk space and no image.
    shutil.rmtree(folder / "store")
    rate = f", {len(labels) / seconds:.3g} images/s" if seconds else ""
    print(f"sample: {len(labels)} images of {renderer.where}{rate}; {', '.join(config.formats)} in {folder}")


def _write_grid(
    stores: OutputStores, config: SampleConfig, renderer: ImageRenderer, labels: Tensor, folder: Path
) -> None:
    num = min(len(labels), GRID_IMAGES)
    if stores.images is not None:
        images = torch.from_numpy(stores.images.read(0, num).copy()).permute(0, 3, 1, 2)
    else:
        assert stores.latents is not None
        images = latents_as_images(torch.from_numpy(stores.latents.read(0, num).copy()))
    captions = [class_name_of(int(label), renderer.facts, renderer.model.arch.num_classes) for label in labels[:num]]
    columns = 10 if config.count or "balanced" in config.classes else config.per_class
    grid = labelled_grid(images, captions, min(columns, 16), title=_title(renderer, config))
    save_png(grid, folder / "samples.png")


def _write_pngs(store: ImageStore, renderer: ImageRenderer, labels: Tensor, folder: Path, here: World) -> None:
    for number in range(here.rank, len(labels), here.world_size):
        name = class_name_of(int(labels[number]), renderer.facts, renderer.model.arch.num_classes)
        safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:60]
        picture = torch.from_numpy(store.read(number, 1)[0].copy()).permute(2, 0, 1)
        save_png(picture, folder / "images" / f"{number:06d}-{safe}.png")


def _title(renderer: ImageRenderer, config: SampleConfig) -> str:
    what = "" if renderer.pictures else "LATENTS, not decoded (--vae makes images of them); "
    sampler = renderer.sampler
    return f"{what}{sampler.scheduler} {sampler.steps} steps, guidance {sampler.guidance:g}, seed {config.seed}"


def _gather(found: dict[int, Tensor], count: int, renderer: ImageRenderer, here: World) -> Tensor:
    """All images uint8 [N, C, H, W], from whichever process drew them, on every process."""
    zero = torch.zeros(1, *renderer.model.arch.latent_shape)
    one = renderer.finish(zero) if renderer.pictures else latents_as_images(zero)
    table = torch.zeros(count, *one.shape[1:], dtype=torch.int32)  # gloo has no sum of bytes on every platform
    for number, image in found.items():
        table[number] = image.int()
    return all_reduce_sum(table, here).to(torch.uint8)


def _short_names(paths: Sequence[str]) -> list[str]:
    """Paths by the parts in which they differ: their last two, or one."""
    last = [Path(path).name for path in paths]
    # Models of two runs may both end in /model, and then the part before it tells them apart.
    return last if len(set(last)) == len(last) else ["/".join(Path(path).parts[-2:]) for path in paths]
