"""Random text encoders with a real BPE vocabulary, for trials (`encoders: [tiny]`), tests and benchmarks.

Their embeddings are meaningless; shapes, vocabularies and files have the form of the real encoders.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch

from fine_dist.creative.pairs import read_concepts

WORDS = ("a photo of a creative mixture", "a creative blend of", "an image that looks like both", "the")
START, END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(words: Iterable[str] = ()) -> Any:
    """A `CLIPTokenizer` whose byte-pair encoding is learned from the project's concepts, a few prompts and `words`.

    The vocabulary has CLIP's layout: bytes, bytes that end a word, merged pieces in order, start and end of text.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    merges = _merges(tuple(words))
    pieces = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(pair) for pair in merges), START, END]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    made: Any = list(merges)
    return CLIPTokenizer(vocab=vocabulary, merges=made, model_max_length=77)


@lru_cache
def _merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    texts = " ".join([*WORDS, *read_concepts(None), *words]).lower()
    return learn_merges(Counter(re.findall("[a-z]+", texts)))


def learn_merges(words: Mapping[str, int]) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al., arXiv 1508.07909): the most frequent pair of pieces is merged until each
    word is one piece. Ties are broken alphabetically, so that every process learns the same merges.

    Args:
        words: Count of each word.
    """
    split = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    merges = []
    while any(len(pieces) > 1 for pieces in split.values()):
        counts: Counter[tuple[str, str]] = Counter()
        for word, pieces in split.items():
            for pair in itertools.pairwise(pieces):
                counts[pair] += words[word]
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for pieces in split.values():
            for at in range(len(pieces) - 2, -1, -1):
                if tuple(pieces[at : at + 2]) == best:
                    pieces[at : at + 2] = ["".join(best)]
    return merges


def make_model(
    tokenizer: Any, *, width: int, layers: int, heads: int, projection: int, seed: int, vocab_size: int | None = None
) -> Any:
    """A random `CLIPTextModelWithProjection` for a tokenizer, with `eos_token_id` 2 as published configs have it.

    Its weights are large enough that different prompts have clearly different embeddings.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=projection,
        bos_token_id=0,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPTextModelWithProjection(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("token_embedding.weight"):
                    parameter.normal_(std=0.5)
                elif parameter.ndim == 2:
                    parameter.normal_(std=2 * parameter.shape[1] ** -0.5)
    return model


def make_encoders() -> list[tuple[Any, Any]]:
    """Two encoders of different widths with their tokenizers, as SD3 has two; the same at every call."""
    sizes = [
        {"width": 32, "layers": 2, "heads": 2, "projection": 24, "seed": 3},
        {"width": 48, "layers": 3, "heads": 3, "projection": 40, "seed": 4},
    ]
    encoders = []
    for size in sizes:
        tokenizer = make_tokenizer()
        encoders.append((make_model(tokenizer, **size), tokenizer))
    return encoders
