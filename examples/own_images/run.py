"""Your own images: latents, an ancestor, a learngene, models of several depths, samples, a diffusers pipeline.

    python examples/own_images/run.py PHOTOS --vae stabilityai/sd-vae-ft-ema

README.md explains it. Interrupted? Run the same command to resume.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run the commands, each only when the one before has worked; returns the exit code of the last."""
    options = parse(argv)
    out = options.out
    if code := run("encode", source=options.images, held_out_fraction=options.held_out_fraction, out=out / "data",
                   codec="vae", vae=options.vae, image_size=options.size, batch=options.batch):  # fmt: skip
        return code
    manifest = json.loads((out / "data" / "train" / "manifest.json").read_text())
    channels, side, _ = manifest["latent_shape"]
    arch = {"arch": options.arch, "arch.num_classes": manifest["num_classes"]}
    arch |= {"arch.input_size": side, "arch.in_channels": channels}
    data = {"data.shards": out / "data" / "train", "data.held_out": out / "data" / "held_out"}
    here = {"launcher": "here", "batch": options.batch}
    ancestor, target = options.ancestor or out / "ancestor", out / "family" / f"L{options.depths[0]}-s0-lr0.01"
    steps = [
        ("condense", {**data, **here, "ancestor": ancestor, "steps": max(1, options.steps // 10), "vae": options.vae,
                      "run_dir": out / "condense"}),
        ("init", {**data, **here, "parent": out / "condense", "depths": options.depths, "steps": options.init_steps,
                  "run_dir": out / "family"}),
        ("sample", {"model": target, "vae": options.vae, "classes": "balanced", "count": options.count,
                    "sampler.steps": options.sampler_steps, "run_dir": out / "samples", "launcher": "here"}),
        ("export", {"model": target, "to": "diffusers", "vae": options.vae, "out": out / "pipeline"}),
    ]  # fmt: skip
    if not options.ancestor:
        steps.insert(0, ("train", {**arch, **data, **here, "steps": options.steps, "run_dir": ancestor}))
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


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "images", type=Path, help="folder of images, with one sub-folder per class, or without sub-folders"
    )
    parser.add_argument("--vae", default="stabilityai/sd-vae-ft-ema", help="folder or hub name of an autoencoder")
    parser.add_argument("--ancestor", help="trained model of these classes; default: one is trained here")
    parser.add_argument("--out", type=Path, default=Path("runs/own_images"), help="output folder")
    parser.add_argument("--size", type=int, default=256, help="side of the square crops, in pixels")
    parser.add_argument("--arch", default="DiT-S/2", help="size of the ancestor that is trained")
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 4, 8], help="numbers of layers of the targets")
    parser.add_argument(
        "--steps", type=int, default=20000, help="training steps of the ancestor; stage 1 takes a tenth"
    )
    parser.add_argument("--init-steps", type=int, default=300, help="training steps of a target")
    parser.add_argument("--batch", type=int, default=64, help="samples per step")
    parser.add_argument("--count", type=int, default=32, help="number of images that are sampled at the end")
    parser.add_argument("--sampler-steps", type=int, default=50, help="denoising steps of an image")
    parser.add_argument(
        "--held-out-fraction", type=float, default=0.05, help="fraction of the images that is never trained on"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
