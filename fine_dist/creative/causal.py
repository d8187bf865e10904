"""The forward pass of a CLIP text encoder from any position on, with the weights of transformers' modules.

A text encoder's attention is causal: the hidden state at position i depends only on positions up to i. Positions before
the first trainable one are therefore the same at every step: their keys and values are computed once (`Cached`), and
the later positions attend to them. Positions after the end of a prompt need not be computed. Both are exact.

Shapes: N prompts, S computed positions, P cached positions before them, D width, H heads, K = D / H, E projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Cached:
    """Keys and values [1, H, P, K] of the first P positions, one pair for each layer."""

    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def length(self) -> int:
        """Number of cached positions P."""
        return self.layers[0][0].shape[2] if self.layers else 0


NOTHING = Cached(())
"""An empty cache: all positions are computed."""


@torch.no_grad()
def cache(model: Any, ids: Tensor) -> Cached:
    """Keys and values of a prompt's first P positions, given by their token ids [P]."""
    if not len(ids):
        return NOTHING
    x = model.text_model.embeddings.token_embedding(ids)[None]  # [1, P, D]
    keys_values: list[tuple[Tensor, Tensor]] = []
    run(model, x, NOTHING, keep=keys_values)
    return Cached(tuple(keys_values))


def run(model: Any, tokens: Tensor, before: Cached, keep: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
    """Hidden states [N, S, D] after the last layer, before the final norm.

    Args:
        model: A `CLIPTextModelWithProjection`.
        tokens: Token embeddings of the positions P to P + S, [N, S, D], without position embeddings.
        before: Keys and values of the first P positions.
        keep: A list to which the keys and values of each layer are appended.
    """
    text = model.text_model
    first, size = before.length, tokens.shape[1]
    x = tokens + text.embeddings.position_embedding.weight[first : first + size]  # [N, S, D]
    mask = None
    if first:
        # `is_causal` aligns the triangle with the first key, but with P cached keys the first query is at position P.
        mask = torch.ones(size, first + size, dtype=torch.bool, device=x.device).tril(first)
    for index, layer in enumerate(text.encoder.layers):
        attention = layer.self_attn
        h = layer.layer_norm1(x)
        q, k, v = (
            _heads(project(h), attention.num_heads)  # [N, H, S, K]
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if keep is not None:
            keep.append((k, v))
        if first:
            # both [N, H, P + S, K]
            k, v = (
                # All N prompts share the cached part of one prompt; `expand` copies nothing.
                torch.cat([old.to(new.dtype).expand(len(new), -1, -1, -1), new], dim=2)
                for old, new in zip(before.layers[index], (k, v))
            )
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not first)
        x = x + attention.out_proj(a.transpose(1, 2).flatten(2))  # [N, S, D]
        x = x + layer.mlp(layer.layer_norm2(x))
    return x


def pool(model: Any, hidden: Tensor, ends: Tensor) -> Tensor:
    """Projected embeddings [N, E] at each prompt's end-of-text position.

    Args:
        model: A `CLIPTextModelWithProjection`.
        hidden: Hidden states of `run`, [N, S, D].
        ends: Index of the end-of-text token among the S computed positions, int64 [N].
    """
    at_end = hidden[torch.arange(len(hidden), device=hidden.device), ends]  # [N, D]
    return model.text_projection(model.text_model.final_layer_norm(at_end))


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)
