"""Frozen CLIP text encoders whose vocabulary has the new token.

Shapes: N prompts, S tokens of the longest prompt, V words, D width of an encoder, E width of its projection.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fine_dist.core.errors import ConfigError
from fine_dist.creative import causal

_LEGACY_EOS = 2
"""The end-of-text id for which transformers reads the pooled output at the greatest token id."""
_CHUNK = 256
"""Number of prompts that are embedded at once."""


class TextEncoder:
    """One frozen encoder, and its tokenizer with the new token.

    It is deliberately not an `nn.Module`: the trained module refers to it without owning it, so that it is not copied
    for the EMA, not sharded, and not part of a checkpoint.
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
        """Width D of the token embeddings."""
        return int(self.model.config.hidden_size)

    @property
    def table(self) -> Tensor:
        """The embeddings of the original vocabulary, [V, D]."""
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
                f"the prompt {text!r} has {len(ids)} tokens, and {self.key} takes at most {self.max_length}; shorten "
                "the template or the words"
            )
        return ids

    def single(self, word: str, what: str) -> int:
        """The id of a word that must be a single token. `ConfigError` names the pieces of other words.

        Args:
            word: The word.
            what: The setting that the word came from, for the message.
        """
        ids = self.ids(word)[1:-1]
        if len(ids) != 1 or ids[0] in (self.token_id, self.tokenizer.eos_token_id):
            pieces = " + ".join(self.tokenizer.convert_ids_to_tokens(ids)) or "nothing"
            raise ConfigError(f"{what}: {word!r} is not one token of {self.key} but {pieces}; give a common word")
        return ids[0]

    def rows(self, ids: Tensor) -> Tensor:
        """Embeddings [..., D] of token ids; zeros for the new token."""
        # The new token's id is beyond the table, which is never resized, so that the encoder's hash stays the same.
        return torch.where((ids == self.token_id)[..., None], 0.0, self.table[ids.clamp_max(len(self.table) - 1)])

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], row: Tensor | None = None) -> Tensor:
        """Pooled, projected embeddings [N, E] of prompts, fp32; `row` [D] is the embedding of the new token."""
        embedded = []
        for start in range(0, len(prompts), _CHUNK):
            lists = [self.ids(prompt) for prompt in prompts[start : start + _CHUNK]]
            ids, ends = pad(lists, self.device)
            x = self.rows(ids)
            if row is not None:
                x = torch.where((ids == self.token_id)[..., None], row.to(x), x)
            elif bool((ids == self.token_id).any()):
                raise ValueError("a prompt contains the new token, and no row is given for it")
            embedded.append(causal.pool(self.model, causal.run(self.model, x, causal.NOTHING), ends).float())
        return torch.cat(embedded)

    def nearest(self, row: Tensor, count: int = 5) -> list[tuple[str, float]]:
        """(word, cosine) of the words whose embeddings have the greatest cosine to a row [D]."""
        table = torch.nn.functional.normalize(self.table.float(), dim=1)
        cosines = table @ torch.nn.functional.normalize(row.detach().float().to(table.device), dim=0)
        num_words = min(len(self.tokenizer) - 1, len(table))  # a table may have more rows than the vocabulary has words
        best = cosines[:num_words].topk(min(count, num_words))
        words = self.tokenizer.convert_ids_to_tokens(best.indices.tolist())
        return [(word.replace("</w>", ""), float(value)) for word, value in zip(words, best.values)]

    def hash(self) -> str:
        """sha256 of the vocabulary and the weights."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        digest = hashlib.sha256(repr(vocabulary).encode())
        # The vocabulary is included, because the same weights with words in another order are another encoder.
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its class where it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def pad(lists: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [N, S] padded on the right, and the index [N] of each last token. Attention is causal, so the padding
    does not affect the prompt, whatever its id."""
    size = max(len(ids) for ids in lists)
    ids = torch.tensor([[*ids, *[0] * (size - len(ids))] for ids in lists], device=device)
    return ids, torch.tensor([len(ids) - 1 for ids in lists], device=device)


def add_token(tokenizer: Any, token: str, where: str) -> int:
    """Add a new token to a vocabulary and return its id. `ConfigError` when the vocabulary has it already."""
    refuse_known(tokenizer, token, where)
    tokenizer.add_tokens(token)
    return int(tokenizer.convert_tokens_to_ids(token))


def refuse_known(tokenizer: Any, token: str, where: str) -> None:
    """`ConfigError` when a vocabulary has a token, as it is or as a complete word (CLIP is case-insensitive)."""
    known = {word.lower() for word in tokenizer.get_vocab()}
    if token.lower() in known or f"{token.lower()}</w>" in known:
        raise ConfigError(
            f"token: {token!r} is in the vocabulary of {where} already; choose one that is not, such as <CreTok>"
        )


def read_at_end(model: Any, tokenizer: Any, where: str) -> None:
    """Make transformers read a text model's pooled output at the end of the text.

    Many published configs, such as SD3's, have `eos_token_id` 2, which is not the id in the vocabulary. transformers
    then reads the output at the greatest id, which is the end of the text until a token with a greater id is added.
    """
    end = end_of(tokenizer, where)
    model.config.eos_token_id = end
    for module in model.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = end


def end_of(tokenizer: Any, where: str) -> int:
    """The end-of-text id of a vocabulary. `ConfigError` for the id to which transformers gives another meaning."""
    end = int(tokenizer.eos_token_id)
    if end == _LEGACY_EOS:
        raise ConfigError(
            f"encoders: the end-of-text id of {where} is {_LEGACY_EOS}, for which transformers reads the pooled output "
            "at the greatest id instead; a vocabulary with another id is needed"
        )
    return end
