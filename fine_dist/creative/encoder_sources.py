"""Loading of text encoders: from a local folder, the hub, or random ones (`tiny`).

A folder or hub repository is a pipeline's (its CLIP text encoders are taken), or holds one CLIP text encoder, or a
whole CLIP. Nothing is unpickled: weights are safetensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fine_dist.core.config import expand_path
from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.core.json_files import read_json
from fine_dist.creative.config import TINY
from fine_dist.creative.encoders import TextEncoder, first_line

KEYS = {768: "clip_l", 1280: "clip_g"}
"""Name of an encoder (ComfyUI's) by its width, for the widths of known CLIP models."""


def load_encoders(sources: Sequence[str], token: str, device: torch.device | None = None) -> list[TextEncoder]:
    """The encoders of all sources, frozen, fp32, with the new token in their vocabularies.

    Args:
        sources: Each a folder or hub name of a pipeline or of one CLIP text encoder, or `tiny`.
        token: The new token.
        device: Where the encoders are put. Default: the CPU.

    Raises:
        ConfigError: There are no encoders or more than two, a vocabulary has the token already, or an encoder has no
            projection.
        ArtifactError: A file is missing, damaged, or cannot be fetched.
    """
    parts: list[tuple[Any, Any]] = []
    for source in sources:
        if source == TINY:
            from fine_dist.creative.tiny import make_encoders

            parts += make_encoders()
        else:
            parts += [(_model(part), _tokenizer(part)) for part in _sources_in(expand_path(source))]
    if not 1 <= len(parts) <= 2:
        raise ConfigError(f"encoders: {', '.join(sources)} have {len(parts)} CLIP text encoders; give one or two")
    return [
        TextEncoder(key, model.to(device or "cpu"), tokenizer, token)
        for key, (model, tokenizer) in zip(_keys([model for model, _ in parts]), parts)
    ]


class EncoderSource(NamedTuple):
    """One encoder and its tokenizer: sub-folders of a folder or hub repository (empty: its root)."""

    source: str
    model: str
    tokenizer: str

    def __str__(self) -> str:
        return f"{self.source}/{self.model}".rstrip("/")


def _keys(models: Sequence[Any]) -> list[str]:
    """`clip_l` and `clip_g` by width; encoders of other widths get the unused names in this order."""
    keys = [KEYS.get(model.config.hidden_size) for model in models]
    for index, key in enumerate(keys):
        if key is None or key in keys[:index]:
            # Names must differ, because they are the keys of the rows in a file.
            keys[index] = next(name for name in ("clip_l", "clip_g") if name not in keys)
    return [str(key) for key in keys]


def _sources_in(source: str) -> list[EncoderSource]:
    """The CLIP text encoders of a folder or hub repository."""
    index = _read_json(source, "model_index.json")
    if index is None and not (Path(source) / "text_encoder").is_dir():
        return [EncoderSource(source, "", "")]
    names = [name for name in ("text_encoder", "text_encoder_2") if index is None or name in index]
    if index is None:
        names = [name for name in names if (Path(source) / name).is_dir()]
    parts = [EncoderSource(source, name, name.replace("text_encoder", "tokenizer")) for name in names]
    return [part for part in parts if _config(part).get("model_type") in ("clip_text_model", "clip")]


def _config(part: EncoderSource) -> dict[str, Any]:
    config = _read_json(part.source, f"{part.model}/config.json".lstrip("/"))
    if config is None:
        raise ArtifactError(f"encoders: {part} has no config.json; give a folder or hub name of a CLIP text encoder")
    return config


def _read_json(source: str, name: str) -> dict[str, Any] | None:
    """A JSON file of a folder or hub repository; None if there is no such file."""
    if Path(source).is_dir():
        path = Path(source) / name if (Path(source) / name).is_file() else None
    else:
        path = _fetch(source, name)
    if path is None:
        return None
    content = read_json(path, ArtifactError, "copy it again")
    return content if isinstance(content, dict) else None


def _fetch(source: str, name: str) -> Path | None:
    """A small file of a hub repository, from the cache if there is no network; None if it has no such file."""
    if source.startswith((".", "/")) or source.count("/") != 1:
        raise ArtifactError(f"encoders: {source} is no folder, nor a hub name (OWNER/NAME); check the path")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(source, name))
    except LocalEntryNotFoundError as error:  # no network, and not in the cache
        if name == "model_index.json" and isinstance(try_to_load_from_cache(source, "config.json"), str):
            return None  # the repository of one encoder, which was fetched before
        raise _unreachable(source, error) from None
    except EntryNotFoundError:
        return None
    except GatedRepoError:
        raise ArtifactError(
            f"encoders: {source} asks for its licence to be accepted; do so on its page and log in (hf auth login), or "
            "give a folder"
        ) from None
    except RepositoryNotFoundError:
        raise ArtifactError(
            f"encoders: the hub has no {source}, or you have no access; check the name, or log in"
        ) from None
    except (HFValidationError, OSError, ValueError) as error:
        raise _unreachable(source, error) from None


def _unreachable(source: str, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"encoders: {source} cannot be fetched from the hub ({first_line(error)}); without a network, copy its text "
        "encoders and tokenizers to a folder and give that"
    )


def _model(part: EncoderSource) -> Any:
    from safetensors import SafetensorError
    from transformers import CLIPTextModelWithProjection
    from transformers.utils import logging

    config = _config(part)
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # no warning about the unused vision weights of a complete CLIP
    logging.disable_progress_bar()
    try:
        loaded: Any = CLIPTextModelWithProjection.from_pretrained(
            part.source, subfolder=part.model, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if not Path(part.source).is_dir():
            raise _unreachable(part.source, error) from None
        raise ArtifactError(f"encoders: {part} is no CLIP text encoder in safetensors ({first_line(error)})") from None
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if "text_projection.weight" in missing:
        raise ConfigError(
            f"encoders: {part} ({', '.join(config.get('architectures') or ['?'])}) has no projection, and the loss "
            "compares projected embeddings; give a CLIPTextModelWithProjection, such as SD3's, or a whole CLIP"
        )
    if missing:
        raise ArtifactError(f"encoders: {part} lacks {len(missing)} tensors, such as {missing[0]}; copy it again")
    return model


def _tokenizer(part: EncoderSource) -> Any:
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(part.source, subfolder=part.tokenizer)
    except (OSError, ValueError, TypeError) as error:
        if not Path(part.source).is_dir():
            raise _unreachable(part.source, error) from None
        raise ArtifactError(
            f"encoders: {part} has no CLIP tokenizer ({first_line(error)}); put its files beside it"
        ) from None
    if len(tokenizer) < 10:  # transformers makes an empty vocabulary if it finds no files
        where = f"{part.source}/{part.tokenizer}".rstrip("/")
        raise ArtifactError(f"encoders: {where} has no vocabulary (tokenizer.json, or vocab.json and merges.txt)")
    return tokenizer
