"""Pictures of your own: latents -> a learngene -> a family -> pictures, a pipeline of diffusers. README.md explains it.

python examples/own_images/run.py PHOTOS --vae stabilityai/sd-vae-ft-ema
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def main(argv: list[str] | None = None) -> int:
    """Run the commands, each only when the one before has worked; the exit code of the last."""
    options = parse(argv)
    out = options.out
    splits = split(options.images, out / "images", options.held_out_fraction)
    for name in ("train", "held_out"):
        if code := run("encode", source=splits / name, out=out / "data", split=name, codec="vae", vae=options.vae,
                       image_size=options.size, batch=options.batch):  # fmt: skip
            return code
    manifest = json.loads((out / "data" / "train" / "manifest.json").read_text())
    channels, side, _ = manifest["latent_shape"]
    arch = {"arch": options.arch, "arch.num_classes": manifest["num_classes"]}
    arch |= {"arch.input_size": side, "arch.in_channels": channels}
    data = {"data.shards": out / "data" / "train", "data.held_out": out / "data" / "held_out"}
    here = {"launcher": "here", "batch": options.batch}
    target = f"L{options.depths[0]}-s0-lr0.01"
    steps = [
        ("condense", {**arch, **data, **here, "steps": options.steps, "vae": options.vae, "run_dir": out / "condense"}),
        ("init", {**data, **here, "parent": out / "condense", "depths": options.depths, "steps": options.init_steps,
                  "run_dir": out / "family"}),
        ("sample", {"model": out / "family" / target, "vae": options.vae, "classes": "balanced", "count": options.count,
                    "sampler.steps": options.sampler_steps, "run_dir": out / "samples", "launcher": "here"}),
        ("export", {"model": out / "family" / target, "to": "diffusers", "vae": options.vae, "out": out / "pipeline"}),
    ]  # fmt: skip
    return next((code for command, settings in steps if (code := run(command, **settings))), 0)


def run(command: str, **settings: object) -> int:
    """`python -m fine_dist COMMAND --KEY VALUE ...`, in this process and printed; its exit code."""
    from fine_dist.__main__ import main as fine_dist

    words = [command]
    for key, value in settings.items():
        words += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    print(f"\n$ python -m fine_dist {shlex.join(words)}", flush=True)
    if command == "export" and Path(str(settings["out"])).exists():
        return 0  # written before; everything else finds out by itself
    return fine_dist(words)


def split(images: Path, out: Path, fraction: float) -> Path:
    """Links to the pictures in `out/train/CLASS` and `out/held_out/CLASS`; those without a folder are of class `all`.

    Every n-th picture of a class is held out, at least one, so that the same pictures always are.
    """
    every = max(2, round(1 / fraction))
    classes: dict[str, list[Path]] = {}
    for path in sorted(images.rglob("*")):
        if path.suffix.lower() in SUFFIXES:
            parent = path.relative_to(images).parent
            classes.setdefault(parent.parts[0] if parent.parts else "all", []).append(path)
    if not classes:
        sys.exit(f"{images} holds no pictures ({', '.join(SUFFIXES)})")
    for name, paths in classes.items():
        for number, path in enumerate(paths):
            link = out / ("held_out" if number % every == every - 1 or len(paths) == number + 1 else "train") / name
            link.mkdir(parents=True, exist_ok=True)
            link = link / "-".join(path.relative_to(images).parts)
            if not link.is_symlink():
                os.symlink(path.absolute(), link)
    return out


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of pictures; with a folder a class, or without")
    parser.add_argument("--vae", default="stabilityai/sd-vae-ft-ema", help="folder or hub name of an AutoencoderKL")
    parser.add_argument("--out", type=Path, default=Path("runs/own_images"), help="where everything is written")
    parser.add_argument("--size", type=int, default=256, help="side of a picture, in pixels")
    parser.add_argument("--arch", default="DiT-S/2", help="the ancestor's size")
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 4, 8], help="layers of the targets")
    parser.add_argument("--steps", type=int, default=20000, help="updates of the learngene")
    parser.add_argument("--init-steps", type=int, default=300, help="updates of a target")
    parser.add_argument("--batch", type=int, default=64, help="samples an update")
    parser.add_argument("--count", type=int, default=32, help="pictures drawn in the end")
    parser.add_argument("--sampler-steps", type=int, default=50, help="denoising steps of a picture")
    parser.add_argument("--held-out-fraction", type=float, default=0.05, help="pictures that are never trained on")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
