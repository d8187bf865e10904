"""`python -m fine_dist.export`: an initialised target or a learngene as an ordinary dense model."""

from __future__ import annotations

import sys
from pathlib import Path

from fine_dist.cli import parse
from fine_dist.config import Config, dump_yaml, expand_path
from fine_dist.errors import ArtifactError, ConfigError, guard


class ExportConfig(Config):
    """Merge `W = U diag(sigma) V^T` into a dense model: safetensors by state-dict name, and a manifest."""

    model: str | None = None
    """Folder of an initialised target, a learngene, or a run."""
    out: str | None = None
    """Folder for the dense model; must not exist yet."""


def run(config: ExportConfig) -> Path:
    """Write the dense model; returns its folder."""
    from fine_dist.model.artifact import save_artifact
    from fine_dist.stages import load_model

    if not config.model or not config.out:
        raise ConfigError("export needs --model FOLDER and --out FOLDER")
    out = Path(expand_path(config.out))
    if out.exists():
        raise ArtifactError(f"{out} exists already; choose another folder, or remove it")
    model, about = load_model(config.model)
    extra = {"exported_from": about["folder"], "origin": about["hash"]}
    manifest = save_artifact(
        out, kind="model", method=about["method"], arch=model.arch, tensors=model.state_dict(), extra=extra
    )
    print(
        f"export: {model.arch.name}, {manifest['num_numbers']:,} numbers, {manifest['bytes'] / 2**20:.1f} MiB in {out}"
    )
    return out


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""

    def body() -> int:
        call = parse(ExportConfig, argv, "python -m fine_dist.export")
        if call.dry_run:
            print(dump_yaml(call.config) + "\ndry run: nothing was done")
            return 0
        run(call.config)
        return 0

    return guard(body)


if __name__ == "__main__":
    sys.exit(main())
