"""Uploading an export to the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi

from fine_dist.artifacts.card import licence_of_card
from fine_dist.artifacts.imported import UNKNOWN_LICENCE
from fine_dist.core.errors import ArtifactError, ConfigError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def check_repository(name: str) -> None:
    """`ConfigError` unless a name is OWNER/MODEL as the hub takes it."""
    # Checked before the export is written, which may take minutes.
    if not _NAME.fullmatch(name) or ".." in name or "--" in name:
        raise ConfigError(
            f"push: {name[:100]!r} is no name of a repository; legal: OWNER/MODEL, letters, digits, - _ ."
        )


def files_to_push(out: Path) -> dict[str, Path]:
    """Files of an export by their path in the repository; the card of a single file becomes README.md.

    Raises:
        ArtifactError: There is no card, or it names no licence: weights are not published without one.
    """
    if out.is_dir():
        files = {str(path.relative_to(out)): path for path in sorted(out.rglob("*")) if path.is_file()}
    else:
        files = {out.name: out, "README.md": out.with_suffix(".md")}
        picture = out.with_suffix(".png")
        files |= {picture.name: picture} if picture.is_file() else {}
    card = files.get("README.md")
    licence = licence_of_card(card) if card is not None else None
    if licence in (None, UNKNOWN_LICENCE):
        raise ArtifactError(
            f"{out}: its card names no licence, and weights are not published without one; export again with "
            "--hints.licence NAME (an SPDX name), or condense with --ancestor-licence NAME"
        )
    return files


def push(out: Path, name: str) -> str:
    """Upload an export into a repository, which is made as a private one where there is none; returns its address.

    The token is the one of `hf auth login` or of HF_TOKEN. `ArtifactError` in one line when the hub refuses.
    """
    check_repository(name)
    files = files_to_push(out)
    api = HfApi()
    try:
        # Private, because making something public is a decision that a user should take by hand.
        address = str(api.create_repo(name, private=True, exist_ok=True))
        if out.is_dir():
            api.upload_folder(repo_id=name, folder_path=out)
        else:
            for target, path in files.items():
                api.upload_file(repo_id=name, path_or_fileobj=path, path_in_repo=target)
    except Exception as error:  # the hub's client raises what its transport raises
        line = (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
        raise ArtifactError(
            f"push: {name}: {line}; check the name and the token (`hf auth login`). The export itself is in {out}"
        ) from None
    return address
