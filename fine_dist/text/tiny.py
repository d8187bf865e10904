"""Random text encoders with a real BPE vocabulary, to try things out: `encoders: [tiny]`, tests and benchmarks.

Nothing they say means anything; shapes, vocabularies and files are those of the real ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch

from fine_dist.text.pairs import read_concepts

WORDS = ("a photo of a creative mixture", "a creative blend of", "an image that looks like both", "the")
START, END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(words: Iterable[str] = (), *, merges: int = 2000) -> Any:
    """A `CLIPTokenizer` whose byte-pair encoding is learned from the project's concepts, a few prompts and `words`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    like = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = like.normalizer, like.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=merges,
        end_of_word_suffix="</w>",
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator([*WORDS, *read_concepts(None), *words] * 4, trainer)
    learned = json.loads(learner.to_str())["model"]
    vocabulary = dict(learned["vocab"])
    for byte in pre_tokenizers.ByteLevel.alphabet():  # so that any text has tokens, as in CLIP's own vocabulary
        vocabulary.setdefault(f"{byte}</w>", len(vocabulary))
    for special in (START, END):
        vocabulary[special] = len(vocabulary)
    merged: Any = [tuple(pair) for pair in learned["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merged, model_max_length=77)


def make_model(
    tokenizer: Any, *, width: int, layers: int, heads: int, projection: int, seed: int, vocab_size: int | None = None
) -> Any:
    """A random `CLIPTextModelWithProjection` for a tokenizer, with `eos_token_id` 2 as published configs have it.

    Its embeddings are drawn large enough for different prompts to have different embeddings, as a trained one's do.
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
        {"width": 32, "layers": 2, "heads": 2, "projection": 24, "seed": 4},
        {"width": 48, "layers": 3, "heads": 3, "projection": 40, "seed": 2},
    ]
    made = []
    for size in sizes:
        tokenizer = make_tokenizer()
        made.append((make_model(tokenizer, **size), tokenizer))
    return made
