"""Upload of an export to the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi

from fine_dist.artifacts.card import licence_of_card
from fine_dist.artifacts.imported import UNKNOWN_LICENCE
from fine_dist.core.errors import ArtifactError, ConfigError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def check_repository(name: str) -> None:
    """Raise `ConfigError` unless a name is a legal OWNER/MODEL of the hub."""
    if not _NAME.fullmatch(name) or ".." in name or "--" in name:
        raise ConfigError(
            f"push: {name[:100]!r} is no name of a repository; legal: OWNER/MODEL, letters, digits, - _ ."
        )


def files_to_push(out: Path) -> dict[str, Path]:
    """Return an export's files by their path in the repository. The card of a single-file export becomes README.md.

    Raises:
        ArtifactError: There is no model card, or it names no licence.
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
    """Upload an export to a repository, which is created as private if it does not exist, and return its URL.

    The token is that of `hf auth login` or HF_TOKEN.

    Raises:
        ConfigError: The name is not OWNER/MODEL.
        ArtifactError: The card names no licence, or the hub refuses the upload or cannot be reached.
    """
    check_repository(name)
    files = files_to_push(out)
    api = HfApi()
    try:
        # Private, because only the user should decide to make the weights public.
        address = str(api.create_repo(name, private=True, exist_ok=True))
        if out.is_dir():
            api.upload_folder(repo_id=name, folder_path=out)
        else:
            for target, path in files.items():
                api.upload_file(repo_id=name, path_or_fileobj=path, path_in_repo=target)
    except Exception as error:  # the hub's client also passes on the exceptions of its HTTP library
        line = (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
        raise ArtifactError(
            f"push: {name}: {line}; check the name and the token (`hf auth login`). The export itself is in {out}"
        ) from None
    return address
