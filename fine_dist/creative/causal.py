"""The arithmetic of a CLIP text encoder from any position on, over transformers' own weights.

A text encoder's attention is causal: what stands at position i depends on positions up to i alone. So whatever stands
before the first trainable position is the same at every step: its keys and values are computed once (`Cached`) and
the rest attends to them; and nothing after the end of a prompt needs computing at all. Both are exact.

N prompts, S positions from the first computed one, P positions cached before, D width, H heads, K = D / H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Cached:
    """Keys and values [1, H, P, K] of the positions before, a pair a layer."""

    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def length(self) -> int:
        """P."""
        return self.layers[0][0].shape[2] if self.layers else 0


NOTHING = Cached(())
"""No position before."""


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
        tokens: Embeddings of the tokens at positions P to P + S, [N, S, D], without their positions' embedding.
        keep: Takes the keys and values of each layer.
    """
    text = model.text_model
    first, size = before.length, tokens.shape[1]
    x = tokens + text.embeddings.position_embedding.weight[first : first + size]  # [N, S, D]
    mask = None
    if first:
        # `is_causal` aligns the triangle with the first key, and with P cached keys the first query is at position P.
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
                # Expanded, which copies nothing: the cached part is one prompt's, and all N prompts share it.
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
        ends: int64 [N], its place among the S computed positions.
    """
    at_end = hidden[torch.arange(len(hidden), device=hidden.device), ends]  # [N, D]
    return model.text_projection(model.text_model.final_layer_norm(at_end))


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)
