"""Tokens on disk, as diffusers and ComfyUI read them, and tokens into diffusers' pipelines.

    learned_embeds.safetensors     {"<CreTok>": [1, D]} of the first encoder: diffusers' `load_textual_inversion`
    learned_embeds_2.safetensors   the same of the second
    CreTok.safetensors             {"clip_l": [1, D], "clip_g": [1, D]}: ComfyUI, in models/embeddings
    shuffled_control.safetensors   the control row, by the encoder's name, where one was trained
    manifest.json                  the token, what it was trained on, sha256 of each file

D is an encoder's width: 768 for CLIP-L, 1280 for CLIP-G.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fine_dist.core.errors import ArtifactError
from fine_dist.core.files import atomic_folder, sha256_of
from fine_dist.core.json_files import Record, as_record, read_json
from fine_dist.creative.encoders import add_token, end_of, read_at_end, refuse_known

FORMAT, KIND, MANIFEST = 1, "token", "manifest.json"
FILES = ("learned_embeds.safetensors", "learned_embeds_2.safetensors")
CONTROL = "shuffled_control.safetensors"


@dataclass(frozen=True)
class SavedToken:
    """A token on disk. `rows`: fp32 [1, D] by the encoder's name, in the order of the pipeline's encoders; `control`
    the same of the row trained on shuffled targets, if any."""

    folder: Path
    token: str
    rows: dict[str, Tensor]
    control: dict[str, Tensor]
    manifest: dict[str, Any]


def save_token(
    folder: str | Path,
    token: str,
    rows: dict[str, Tensor],
    facts: dict[str, Any],
    control: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Write a token's folder atomically (under a temporary name, then renamed); returns its manifest.

    Args:
        rows: [D] by the encoder's name, in the order of the pipeline's encoders.
        facts: Further entries of the manifest (JSON): encoders, templates, steps, cosines.
        control: The row trained on shuffled targets, as `rows`.
    """
    with atomic_folder(folder) as draft:
        saved_rows = _as_saved(rows)
        for name, row in zip(FILES, saved_rows.values()):
            save_file({token: row}, draft / name, metadata={"format": "pt"})
        save_file(saved_rows, draft / combined_name(token), metadata={"format": "pt"})
        if control:
            save_file(_as_saved(control), draft / CONTROL, metadata={"format": "pt"})
        files = sorted(path.name for path in draft.iterdir())
        manifest = {
            "format": FORMAT,
            "kind": KIND,
            "method": "CreTok, arXiv 2410.24160",
            "token": token,
            "rows": {key: list(row.shape) for key, row in saved_rows.items()},
            "sha256": {name: sha256_of(draft / name) for name in files},
            **facts,
        }
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _as_saved(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows [D] in the layout of the files: contiguous fp32 [1, D] in host memory."""
    return {key: row.detach().cpu().float().reshape(1, -1).contiguous() for key, row in rows.items()}


def combined_name(token: str) -> str:
    """The file's name for ComfyUI, which is also the name in its prompts: `embedding:CreTok`."""
    name = (re.sub(r"[^A-Za-z0-9_-]", "", token) or "token") + ".safetensors"
    return f"token_{name}" if name in (*FILES, CONTROL) else name


class TokenManifest(Record):
    """manifest.json of a token's folder."""

    token: str = Field(min_length=1, max_length=200)
    """The token as it is written in prompts."""
    rows: dict[str, list[int]]
    """Shape of the token's row by encoder."""
    sha256: dict[str, str]
    """Hash of each tensor file by name."""


def read_token(folder: str | Path) -> SavedToken:
    """Read a folder of `save_token`, or the `token/` in a run directory. `ArtifactError` when it is incomplete."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file() and (folder / "token" / MANIFEST).is_file():
        folder = folder / "token"
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {MANIFEST}: give the token/ of a finished run of fine_dist.creative")
    values = read_json(path, ArtifactError, "copy it again")
    if not isinstance(values, dict) or (values.get("format"), values.get("kind")) != (FORMAT, KIND):
        raise ArtifactError(f"{path} is not a token of this version; give the token/ that `fine-dist creative` wrote")
    manifest = as_record(TokenManifest, values, path, ArtifactError, "copy it again").model_dump()
    if combined_name(manifest["token"]) not in manifest["sha256"]:
        raise ArtifactError(f"{path} has no sha256 of the token's tensors: it was altered; copy it again")
    for name, stated in manifest["sha256"].items():
        if Path(name).name != name:
            raise ArtifactError(f"{path} names a file outside its folder: {name!r}; copy it again")
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder} has a manifest but no {name}: copy the complete folder")
        if sha256_of(folder / name) != stated:
            raise ArtifactError(f"{folder / name} does not match its manifest: edited or half copied; copy it again")
    try:
        tensors = load_file(folder / combined_name(manifest["token"]))
        control = load_file(folder / CONTROL) if CONTROL in manifest["sha256"] else {}
    except SafetensorError as error:
        raise ArtifactError(f"{folder} is damaged: {error}") from None
    missing = [key for key in manifest["rows"] if key not in tensors]
    if missing:
        raise ArtifactError(f"{path} names rows that its tensors do not have: {missing[0]!r}; copy it again")
    rows = {key: tensors[key] for key in manifest["rows"]}
    return SavedToken(folder, manifest["token"], rows, control, manifest)


def load_cretok(pipe: Any, folder: str | Path) -> str:
    """Add a learned token to a diffusers pipeline with CLIP text encoders (SD3, SDXL, SD1.5); returns the token.

    Each encoder's embedding table gets one more row, and its pooled output is read at the end of the text; otherwise
    it would be read at the new token. SD3's third encoder (T5) does not have the token: give it
    `prompt_3=plain_prompt(prompt, token)`.

    Args:
        pipe: A pipeline with `tokenizer` and `text_encoder`, and `tokenizer_2` and `text_encoder_2` if it has two.
        folder: The directory of a run, or the `token/` in it.

    Raises:
        ArtifactError: The folder is incomplete, or its rows do not fit the encoders. The pipeline is not changed.
        ConfigError: The pipeline has the token already. The pipeline is not changed.
    """
    saved = read_token(folder)
    pairs: list[tuple[Any, Any]] = []
    for ending in ("", "_2"):
        tokenizer, encoder = getattr(pipe, f"tokenizer{ending}", None), getattr(pipe, f"text_encoder{ending}", None)
        if tokenizer is not None and encoder is not None:
            pairs.append((tokenizer, encoder))
    widths = [int(encoder.get_input_embeddings().weight.shape[1]) for _, encoder in pairs]
    rows = _fitting(saved, widths, type(pipe).__name__)
    for number, (tokenizer, _) in enumerate(pairs, 1):
        where = f"tokenizer {number} of {type(pipe).__name__}"
        refuse_known(tokenizer, saved.token, where)
        end_of(tokenizer, where)
    for number, ((tokenizer, encoder), row) in enumerate(zip(pairs, rows), 1):
        token_id = add_token(tokenizer, saved.token, f"tokenizer {number}")
        if token_id >= encoder.get_input_embeddings().weight.shape[0]:
            encoder.resize_token_embeddings(token_id + 1, mean_resizing=False)
        with torch.no_grad():
            table = encoder.get_input_embeddings().weight
            table[token_id] = row[0].to(table)
        read_at_end(encoder, tokenizer, f"text encoder {number}")
    return saved.token


def _fitting(saved: SavedToken, widths: list[int], pipe: str) -> list[Tensor]:
    """The row for each encoder of a pipeline, matched by width."""
    left = list(saved.rows.values())
    chosen = []
    for width in widths:
        row = next((row for row in left if row.shape[1] == width), None)
        if row is None:
            have = ", ".join(f"{key} {row.shape[1]}" for key, row in saved.rows.items())
            raise ArtifactError(
                f"{saved.folder}: the text encoders of {pipe} are {' and '.join(map(str, widths))} wide, and the token "
                f"has rows for {have}; train it on the encoders of this pipeline"
            )
        left = [other for other in left if other is not row]
        chosen.append(row)
    if not chosen:
        raise ArtifactError(f"{pipe} has no CLIP text encoder with a tokenizer that a token could be added to")
    return chosen


def plain_prompt(prompt: str, token: str = "<CreTok>", word: str = "creative") -> str:
    """A prompt with an ordinary word in place of the token, for encoders without it (SD3's T5: `prompt_3`)."""
    return re.sub(re.escape(token), word, prompt, flags=re.IGNORECASE)
