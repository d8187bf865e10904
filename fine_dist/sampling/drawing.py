"""Drawing images of a model with any number of processes, so that a stopped command goes on where it was.

Every image depends on (seed, its number) alone. Processes share the images out, write them into one store on disk, and
the first one makes files of them when all are there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fine_dist.core.config import expand_path
from fine_dist.core.errors import ConfigError, DataError, nearest
from fine_dist.sampling.renderer import ImageRenderer, class_name_of, make_renderer
from fine_dist.sampling.settings import SamplingSettings

if TYPE_CHECKING:
    from torch import Tensor

    from fine_dist.engine.dist import World
    from fine_dist.sampling.image_store import ImageStore, LatentStore

BALANCED = "balanced"
DONE = "samples.json"
GRID_IMAGES = 100
"""Images of a grid, at most."""
Kind = Literal["npy", "grid", "png", "npz"]


class SampleConfig(SamplingSettings):
    """Draw images from a model, or the same images from several (`--compare`). Guidance, clip and diffusion are the
    model's own unless they are said."""

    model: str | None = None
    """A model, a target, a learngene, a run; also DiT's `.pt`, a folder of diffusers, a name on the hub."""
    compare: tuple[str, ...] = ()
    """Further models: one grid of the same seeds and classes, a row each, instead of the files."""
    run_dir: str = "runs/samples"
    """Where the files are written. The same command again continues what is there."""
    classes: tuple[int | str, ...] = ()
    """Classes by number or name, per_class images of each; `balanced`: all of them in turn. None: all."""
    per_class: int = Field(8, ge=1)
    """Images of each class."""
    count: int | None = Field(None, ge=1)
    """Images in all, classes in turn; none: per_class of each."""
    formats: tuple[Kind, ...] = ("npy", "grid")
    """npy: latents and labels. grid: samples.png. png: single pictures. npz: ADM's file of all pictures (uint8)."""


def labels_of(config: SampleConfig, num_classes: int, names: Sequence[str]) -> Tensor:
    """Labels [N] int64 of the images, in order. `ConfigError` for a class that the model does not have."""
    import torch

    chosen: list[int] = []
    for word in config.classes:
        if word == BALANCED:
            chosen += range(num_classes)
        elif str(word).lstrip("-").isdigit() and str(word) not in names:
            if not 0 <= int(word) <= num_classes:
                raise ConfigError(f"classes: {word} is out of range; legal: 0..{num_classes} (the last is no class)")
            chosen.append(int(word))
        elif str(word) in names:
            chosen.append(list(names).index(str(word)))
        else:
            legal = nearest(str(word), [*list(names)[:1000], BALANCED])
            known_by = legal if names else f"the model's manifest names none; legal: 0..{num_classes}, {BALANCED}"
            raise ConfigError(f"classes: no class is called {word!r}; {known_by}")
    classes = torch.tensor(chosen or list(range(num_classes)))
    count = config.count or (config.per_class * len(classes) if BALANCED in config.classes else None)
    return classes[torch.arange(count) % len(classes)] if count else classes.repeat_interleave(config.per_class)


def draw(config: SampleConfig, renderer: ImageRenderer, labels: Tensor, folder: Path, world: World) -> Path:
    """Draw all images into the files of a folder, with the other processes; the folder. `DataError` for others'."""
    wanted = set(config.formats)
    if wanted & {"png", "npz"} and not renderer.pictures:
        raise ConfigError(
            f"formats: {', '.join(sorted(wanted & {'png', 'npz'}))} of latents needs pictures; say what decodes them "
            "with --vae FOLDER"
        )
    identity = renderer.protocol(config.seed) | {
        "weights": config.weights,
        "vae": [config.vae, config.vae_precision] if config.vae else None,
        "labels": labels.tolist() if len(labels) <= 1000 else _hash(labels),
    }
    if _is_done(folder, identity, wanted):
        return folder
    with _Stores(folder, renderer, labels, identity, wanted) as stores:
        begun = time.perf_counter()
        mine = stores.missing(world.rank, world.world_size)
        bar = f"sample {renderer.model.arch.name}" if world.is_main else False
        for drawn, finished in renderer.render(labels[mine], mine, config.seed, bar):
            stores.write(drawn, finished)
        seconds = _meet(world, time.perf_counter() - begun, len(mine))
        if "png" in wanted and stores.images is not None:
            _write_pngs(stores.images, renderer, labels, folder, world)
        _meet(world, 0.0, 0)
        if world.is_main:
            _write_files(stores, config, renderer, labels, folder, identity, seconds)
    _meet(world, 0.0, 0)
    return folder


def compare(
    config: SampleConfig, renderers: Sequence[ImageRenderer], labels: Tensor, folder: Path, world: World
) -> Path:
    """One labelled grid, a row a model, of the same seeds and classes; the picture's path."""
    import torch

    from fine_dist.sampling.image_grid import labelled_grid, latents_as_images, save_png

    if len(labels) > GRID_IMAGES:
        raise ConfigError(f"compare: {len(labels)} images of each model are too many; {GRID_IMAGES} at most (--count)")
    rows = []
    for renderer in renderers:
        images: dict[int, Tensor] = {}
        mine = torch.arange(world.rank, len(labels), world.world_size)
        bar = f"sample {Path(renderer.where).name}" if world.is_main else False
        for drawn, finished in renderer.render(labels[mine], mine, config.seed, bar):
            finished = finished if renderer.pictures else latents_as_images(finished)
            images.update(zip(drawn.indices.tolist(), finished))
        rows.append(_gather(images, len(labels), renderer, world))
    if world.is_main:
        sizes = {tuple(row.shape[1:]) for row in rows}
        if len(sizes) > 1:
            told = ", ".join("x".join(map(str, size)) for size in sorted(sizes))
            raise ConfigError(f"compare: the models draw pictures of different sizes: {told}")
        first = renderers[0]
        captions = [class_name_of(int(label), first.facts, first.model.arch.num_classes) for label in labels] * len(
            rows
        )
        folder.mkdir(parents=True, exist_ok=True)
        picture = labelled_grid(
            torch.cat(rows),
            captions,
            len(labels),
            title=_title(first, config),
            rows=_short([a.where for a in renderers]),
        )
        save_png(picture, folder / "compare.png")
        print(f"sample: {len(rows)} models beside each other in {folder / 'compare.png'}")
    return folder / "compare.png"


# --- parts -----------------------------------------------------------------------------------------------------------


class _Stores:
    """What is drawn, on disk: latents where they are wanted or all there is, pictures where there are any."""

    def __init__(
        self, folder: Path, renderer: ImageRenderer, labels: Tensor, identity: dict[str, Any], wanted: set[Any]
    ) -> None:
        from fine_dist.sampling.image_store import ImageStore, LatentStore

        self.latents: LatentStore | None = None
        self.images: ImageStore | None = None
        shape, count = renderer.model.arch.latent_shape, len(labels)
        if "npy" in wanted or not renderer.pictures:
            self.latents = LatentStore(folder / "store" / "latents", count, shape, identity)
        if renderer.pictures and wanted & {"grid", "png", "npz"}:
            import torch

            one = renderer.finish(torch.zeros(1, *shape))
            size = (int(one.shape[2]), int(one.shape[3]))
            self.images = ImageStore(folder / "store" / "images", count, size, int(one.shape[1]), identity)

    @property
    def all(self) -> list[LatentStore | ImageStore]:
        return [store for store in (self.latents, self.images) if store is not None]

    def missing(self, rank: int, size: int) -> Tensor:
        import torch

        return torch.cat([store.missing(rank, size) for store in self.all]).unique()

    def write(self, drawn: Any, finished: Tensor) -> None:
        if self.latents is not None:
            self.latents.write(drawn.indices, drawn.latents)
        if self.images is not None:
            self.images.write(drawn.indices, finished)

    def __enter__(self) -> _Stores:
        return self

    def __exit__(self, *_: object) -> None:
        for store in self.all:
            store.close()


def _is_done(folder: Path, identity: dict[str, Any], wanted: set[Any]) -> bool:
    """Whether these images are in the folder. `DataError` when others are."""
    try:
        found = json.loads((folder / DONE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise DataError(f"{folder / DONE} is damaged: {error}; remove {folder} to begin again") from None
    there = found.get("protocol", {}) if isinstance(found, dict) else {}
    differs = [key for key in identity if there.get(key) != json.loads(json.dumps(identity[key]))]
    if differs:
        raise DataError(
            f"{folder} holds other images (another {', '.join(differs)}); choose another --run-dir, or remove it"
        )
    if not wanted <= set(found.get("formats", ())):
        return False
    print(f"sample: drawn before; the files are in {folder}")
    return True


def _write_files(
    stores: _Stores,
    config: SampleConfig,
    renderer: ImageRenderer,
    labels: Tensor,
    folder: Path,
    identity: Any,
    seconds: float,
) -> None:
    import io

    import numpy as np

    from fine_dist.core.files import write_atomic

    if "npy" in config.formats and stores.latents is not None:
        stores.latents.to_npy(folder / "samples.npy")
    file = io.BytesIO()
    np.save(file, labels.numpy())
    write_atomic(folder / "labels.npy", file.getvalue())
    if "npz" in config.formats and stores.images is not None:
        stores.images.to_npz(folder / "samples.npz")
    if "grid" in config.formats:
        _write_grid(stores, config, renderer, labels, folder)
    kept = {"protocol": identity, "formats": config.formats, "count": len(labels), "source": renderer.where}
    write_atomic(folder / DONE, json.dumps(kept, indent=1) + "\n")
    shutil.rmtree(folder / "store")
    rate = f", {len(labels) / seconds:.3g} images/s" if seconds else ""
    print(f"sample: {len(labels)} images of {renderer.where}{rate}; {', '.join(config.formats)} in {folder}")


def _write_grid(stores: _Stores, config: SampleConfig, renderer: ImageRenderer, labels: Tensor, folder: Path) -> None:
    import torch

    from fine_dist.sampling.image_grid import labelled_grid, latents_as_images, save_png

    num = min(len(labels), GRID_IMAGES)
    if stores.images is not None:
        images = torch.from_numpy(stores.images.read(0, num).copy()).permute(0, 3, 1, 2)
    else:
        assert stores.latents is not None
        images = latents_as_images(torch.from_numpy(stores.latents.read(0, num).copy()))
    captions = [class_name_of(int(label), renderer.facts, renderer.model.arch.num_classes) for label in labels[:num]]
    columns = 10 if config.count or BALANCED in config.classes else config.per_class
    save_png(labelled_grid(images, captions, min(columns, 16), title=_title(renderer, config)), folder / "samples.png")


def _write_pngs(store: ImageStore, renderer: ImageRenderer, labels: Tensor, folder: Path, world: World) -> None:
    import torch

    from fine_dist.sampling.image_grid import save_png

    for number in range(world.rank, len(labels), world.world_size):
        name = class_name_of(int(labels[number]), renderer.facts, renderer.model.arch.num_classes)
        safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:60]
        picture = torch.from_numpy(store.read(number, 1)[0].copy()).permute(2, 0, 1)
        save_png(picture, folder / "images" / f"{number:06d}-{safe}.png")


def _title(renderer: ImageRenderer, config: SampleConfig) -> str:
    what = "" if renderer.pictures else "LATENTS, not decoded (--vae makes pictures of them); "
    sampler = renderer.sampler
    return f"{what}{sampler.scheduler} {sampler.steps} steps, guidance {sampler.guidance:g}, seed {config.seed}"


def _gather(images: dict[int, Tensor], count: int, renderer: ImageRenderer, world: World) -> Tensor:
    """All images uint8 [N, C, H, W], from whoever drew them, on every process."""
    import torch

    from fine_dist.engine.dist import all_reduce_sum
    from fine_dist.sampling.image_grid import latents_as_images

    zero = torch.zeros(1, *renderer.model.arch.latent_shape)
    one = renderer.finish(zero) if renderer.pictures else latents_as_images(zero)
    table = torch.zeros(count, *one.shape[1:], dtype=torch.int32)
    for number, image in images.items():
        table[number] = image.int()
    return all_reduce_sum(table, world).to(torch.uint8)


def _meet(world: World, seconds: float, count: int) -> float:
    """Wait for all; the longest seconds of a process that drew something."""
    import torch

    from fine_dist.engine.dist import all_reduce_max

    return float(all_reduce_max(torch.tensor([seconds if count else 0.0], dtype=torch.float64), world)[0])


def _short(paths: Sequence[str]) -> list[str]:
    """Paths by the parts in which they differ: their last two, or one."""
    last = [Path(path).name for path in paths]
    return last if len(set(last)) == len(last) else ["/".join(Path(path).parts[-2:]) for path in paths]


def _hash(labels: Tensor) -> str:
    from fine_dist.core.files import sha256_text

    return sha256_text(" ".join(map(str, labels.tolist())))


def run(config: SampleConfig) -> Path:
    """Draw what a config asks for, in this process among the others; where it is."""
    import torch

    from fine_dist.engine import dist

    paths = [*filter(None, [config.model]), *config.compare]
    if not paths:
        raise ConfigError("model: give the folder of a model with --model")
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    world = dist.world(config.engine.device)
    renderers = [make_renderer(config, path, world.device) for path in paths]
    if world.is_main:
        print("".join(f"note: {note}\n" for renderer in renderers for note in renderer.notes), end="")
    labels = labels_of(config, renderers[0].model.arch.num_classes, renderers[0].facts.class_names)
    folder = Path(expand_path(config.run_dir))
    if config.compare:
        return compare(config, renderers, labels, folder, world)
    return draw(config, renderers[0], labels, folder, world)
