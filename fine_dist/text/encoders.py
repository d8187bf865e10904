"""Frozen CLIP text encoders whose vocabulary has the new token, from local folders, the hub, or made up (`tiny`).

N prompts, S tokens of the longest, D an encoder's width, E its projection.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fine_dist.config import expand_path
from fine_dist.errors import ArtifactError, ConfigError
from fine_dist.text import causal
from fine_dist.text.config import TINY

KEYS = {768: "clip_l", 1280: "clip_g"}
"""An encoder's name by its width, where the width says which CLIP it is (ComfyUI's names)."""
_LEGACY_EOS = 2
"""The end-of-text id that transformers takes for "read the pooled output at the greatest id"."""
_CHUNK = 256
"""Prompts that are embedded at once."""


class TextEncoder:
    """One frozen encoder, and its tokenizer with the new token.

    It is no `nn.Module` on purpose: what trains refers to it without owning it, so that it is neither copied for
    looking at averages, nor sharded, nor part of a checkpoint.
    """

    def __init__(self, key: str, model: Any, tokenizer: Any, token: str) -> None:
        self.key = key
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.token_id = add_token(tokenizer, token, key)
        self.max_length = int(model.config.max_position_embeddings)
        read_at_end(model, tokenizer, key)

    def __deepcopy__(self, memo: dict[int, Any]) -> TextEncoder:
        return self

    @property
    def width(self) -> int:
        """D."""
        return int(self.model.config.hidden_size)

    @property
    def table(self) -> Tensor:
        """The embeddings of the vocabulary as it came, [V, D]."""
        weight: Tensor = self.model.text_model.embeddings.token_embedding.weight
        return weight

    @property
    def device(self) -> torch.device:
        return self.table.device

    def ids(self, text: str) -> list[int]:
        """Token ids of a prompt, from start to end of text. `ConfigError` when it is longer than the encoder reads."""
        ids = [int(i) for i in self.tokenizer(text, verbose=False).input_ids]
        if len(ids) > self.max_length:
            raise ConfigError(
                f"the prompt {text!r} has {len(ids)} tokens and {self.key} reads at most {self.max_length}; shorten "
                "the template or the words"
            )
        return ids

    def single(self, word: str, what: str) -> int:
        """The id of a word that is one token. `ConfigError` names its pieces otherwise.

        what: the setting that the word came from.
        """
        ids = self.ids(word)[1:-1]
        if len(ids) != 1 or ids[0] in (self.token_id, self.tokenizer.eos_token_id):
            pieces = " + ".join(self.tokenizer.convert_ids_to_tokens(ids)) or "nothing"
            raise ConfigError(
                f"{what}: {word!r} is not one token of {self.key} but {pieces}; give a plain, common word"
            )
        return ids[0]

    def rows(self, ids: Tensor) -> Tensor:
        """Embeddings [..., D] of ids; the new token's is not in the table, so zeros stand for it."""
        return torch.where((ids == self.token_id)[..., None], 0.0, self.table[ids.clamp_max(len(self.table) - 1)])

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], row: Tensor | None = None) -> Tensor:
        """Pooled, projected embeddings [N, E] of prompts, fp32; `row` [D] is what the new token means in them."""
        found = []
        for start in range(0, len(prompts), _CHUNK):
            lists = [self.ids(prompt) for prompt in prompts[start : start + _CHUNK]]
            ids, ends = pad(lists, self.device)
            x = self.rows(ids)
            if row is not None:
                x = torch.where((ids == self.token_id)[..., None], row.to(x), x)
            elif bool((ids == self.token_id).any()):
                raise ValueError("a prompt with the new token needs its row")
            found.append(causal.pool(self.model, causal.run(self.model, x, causal.NOTHING), ends).float())
        return torch.cat(found)

    def nearest(self, row: Tensor, count: int = 5) -> list[tuple[str, float]]:
        """The vocabulary's words whose embeddings have the greatest cosine to a row [D]."""
        table = torch.nn.functional.normalize(self.table.float(), dim=1)
        cosines = table @ torch.nn.functional.normalize(row.float().to(table.device), dim=0)
        known = min(len(self.tokenizer) - 1, len(table))  # a table may have more rows than the vocabulary has words
        best = cosines[:known].topk(min(count, known))
        words = self.tokenizer.convert_ids_to_tokens(best.indices.tolist())
        return [(word.replace("</w>", ""), float(value)) for word, value in zip(words, best.values)]

    def hash(self) -> str:
        """sha256 over its weights, by name."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def pad(lists: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [N, S] padded on the right, and the place [N] of each last one. What stands after a prompt's end does not
    reach it, so any id pads."""
    size = max(len(ids) for ids in lists)
    ids = torch.tensor([[*ids, *[0] * (size - len(ids))] for ids in lists], device=device)
    return ids, torch.tensor([len(ids) - 1 for ids in lists], device=device)


def add_token(tokenizer: Any, token: str, where: str) -> int:
    """Put a new token into a vocabulary; its id. `ConfigError` when the vocabulary has it."""
    refuse_known(tokenizer, token, where)
    tokenizer.add_tokens(token)
    return int(tokenizer.convert_tokens_to_ids(token))


def refuse_known(tokenizer: Any, token: str, where: str) -> None:
    """`ConfigError` when a vocabulary has a token, as itself or as a whole word (CLIP reads lower case)."""
    known = {word.lower() for word in tokenizer.get_vocab()}
    if token.lower() in known or f"{token.lower()}</w>" in known:
        raise ConfigError(
            f"token: {token!r} is in the vocabulary of {where} already; choose one that is not, such as <CreTok>"
        )


def read_at_end(model: Any, tokenizer: Any, where: str) -> None:
    """Have transformers read a text model's pooled output at the end of text.

    Many published configs, SD3's among them, state `eos_token_id` 2, which is not the vocabulary's. transformers takes
    that for "at the greatest id", which was the end of text until a token was added: then it would be the token.
    """
    end = int(tokenizer.eos_token_id)
    if end == _LEGACY_EOS:
        raise ConfigError(
            f"encoders: the end-of-text id of {where} is {_LEGACY_EOS}, for which transformers reads the pooled output "
            "at the greatest id instead; a vocabulary with another id is needed"
        )
    model.config.eos_token_id = end
    for module in model.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = end


# --- where they come from ------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where one encoder and its tokenizer lie: folders within a folder or hub repository (empty: at its top)."""

    source: str
    model: str
    tokenizer: str

    def __str__(self) -> str:
        return f"{self.source}/{self.model}".rstrip("/")


def load_encoders(sources: Sequence[str], token: str, device: torch.device | None = None) -> list[TextEncoder]:
    """The encoders of all sources, frozen, fp32, with the new token in their vocabularies.

    sources: each a folder or hub name of a pipeline or of one CLIP text encoder, or `tiny`.

    `ConfigError` when there are none or more than two, a token is known already or an encoder has no projection;
    `ArtifactError` when something is missing or cannot be fetched.
    """
    parts: list[tuple[Any, Any]] = []
    for source in sources:
        if source == TINY:
            from fine_dist.text.tiny import make_encoders

            parts += make_encoders()
        else:
            parts += [(_model(place), _tokenizer(place)) for place in _places(expand_path(source))]
    if not 1 <= len(parts) <= 2:
        raise ConfigError(f"encoders: {', '.join(sources)} hold {len(parts)} CLIP text encoders; one or two are needed")
    return [
        TextEncoder(key, model.to(device or "cpu"), tokenizer, token)
        for key, (model, tokenizer) in zip(_keys([model for model, _ in parts]), parts)
    ]


def _keys(models: Sequence[Any]) -> list[str]:
    """`clip_l` and `clip_g` by width; where the width says nothing, in this order."""
    found = [KEYS.get(model.config.hidden_size) for model in models]
    for index, key in enumerate(found):
        if key is None or key in found[:index]:
            found[index] = next(name for name in ("clip_l", "clip_g") if name not in found)
    return [str(key) for key in found]


def _places(source: str) -> list[Place]:
    """The CLIP text encoders of a folder or hub repository."""
    index = _read_json(source, "model_index.json")
    if index is None and not (Path(source) / "text_encoder").is_dir():
        return [Place(source, "", "")]
    names = [name for name in ("text_encoder", "text_encoder_2") if index is None or name in index]
    if index is None:
        names = [name for name in names if (Path(source) / name).is_dir()]
    places = [Place(source, name, name.replace("text_encoder", "tokenizer")) for name in names]
    return [place for place in places if _config(place).get("model_type") in ("clip_text_model", "clip")]


def _config(place: Place) -> dict[str, Any]:
    found = _read_json(place.source, f"{place.model}/config.json".lstrip("/"))
    if found is None:
        raise ArtifactError(f"encoders: {place} has no config.json; give a folder or hub name of a CLIP text encoder")
    return found


def _read_json(source: str, name: str) -> dict[str, Any] | None:
    """A JSON file of a folder or hub repository; none where there is no such file."""
    if Path(source).is_dir():
        path = Path(source) / name if (Path(source) / name).is_file() else None
    else:
        path = _fetch(source, name)
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}; copy it again") from None
    return found if isinstance(found, dict) else None


def _fetch(source: str, name: str) -> Path | None:
    """A small file of a hub repository, from the cache where there is no network; none where it has no such file."""
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
            return None  # one encoder, fetched before
        raise _unreachable(source, error) from None
    except EntryNotFoundError:
        return None
    except GatedRepoError:
        raise ArtifactError(
            f"encoders: {source} asks for its licence to be accepted; do so on its page and log in (hf auth login), or "
            "give a folder"
        ) from None
    except RepositoryNotFoundError:
        raise ArtifactError(f"encoders: the hub has no {source}, or not for you; check the name, or log in") from None
    except (HFValidationError, OSError, ValueError) as error:
        raise _unreachable(source, error) from None


def _unreachable(source: str, error: Exception) -> ArtifactError:
    words = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ArtifactError(
        f"encoders: {source} cannot be fetched from the hub ({words}); without a network, copy its text encoders and "
        "tokenizers to a folder and give that"
    )


def _model(place: Place) -> Any:
    from transformers import CLIPTextModelWithProjection
    from transformers.utils import logging

    config = _config(place)
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # a whole CLIP's vision weights are not needed, which is no warning's worth
    logging.disable_progress_bar()
    try:
        loaded: Any = CLIPTextModelWithProjection.from_pretrained(
            place.source, subfolder=place.model, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        if not Path(place.source).is_dir():
            raise _unreachable(place.source, error) from None
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArtifactError(f"encoders: {place} is no CLIP text encoder in safetensors ({words})") from None
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if "text_projection.weight" in missing:
        raise ConfigError(
            f"encoders: {place} ({', '.join(config.get('architectures') or ['?'])}) has no projection, and the loss "
            "compares projected embeddings; give a CLIPTextModelWithProjection, such as SD3's, or a whole CLIP"
        )
    if missing:
        raise ArtifactError(f"encoders: {place} lacks {len(missing)} tensors, such as {missing[0]}; copy it again")
    return model


def _tokenizer(place: Place) -> Any:
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(place.source, subfolder=place.tokenizer)
    except (OSError, ValueError, TypeError) as error:
        if not Path(place.source).is_dir():
            raise _unreachable(place.source, error) from None
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArtifactError(f"encoders: {place} has no CLIP tokenizer ({words}); put its files beside it") from None
    if len(tokenizer) < 10:  # transformers makes an empty vocabulary where it finds no files
        where = f"{place.source}/{place.tokenizer}".rstrip("/")
        raise ArtifactError(f"encoders: {where} has no vocabulary (tokenizer.json, or vocab.json and merges.txt)")
    return tokenizer
