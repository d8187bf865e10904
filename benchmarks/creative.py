"""`python -m benchmarks creative`: training of a CreTok token, compared with other loops.

The text encoder is random and has CLIP-L's shape. All loops compute the same updates (AdamW, fp32), which is checked
before anything is timed. An update has 2 pairs of concepts, each in both orders, on a CPU, and 16 as in the paper on a
GPU.

Shapes: N prompts, E features of an embedding, O orders of a pair.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.rows import BenchmarkRow, interleaved, median, median_of_ratios, say, seconds
from fine_dist.creative.config import CreativeConfig, Template
from fine_dist.creative.encoders import TextEncoder
from fine_dist.creative.pairs import Pairs, PairStream, make_pairs
from fine_dist.creative.tiny import make_model, make_tokenizer
from fine_dist.creative.tokens import RowSpec, TokenObjective, Tokens, per_row
from fine_dist.engine.plain_backend import PlainBackend
from fine_dist.engine.settings import OptimConfig
from fine_dist.engine.world import World

TOKEN, START, MAX_COSINE, PACK = "<CreTok>", "creative", 0.5, 8
OPTIM = OptimConfig(lr=1e-2, clip_norm=None)


def run(quick: bool) -> list[BenchmarkRow]:
    """All rows.

    Args:
        quick: Whether to use a smaller encoder and fewer rounds.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = 16 if device.type == "cuda" else 2
    width, layers, heads = (256, 4, 4) if quick else (768, 12, 12)
    say(f"updates of a token on an encoder of {layers} layers, width {width}")
    tokenizer = make_tokenizer()
    model = make_model(
        tokenizer, width=width, layers=layers, heads=heads, projection=width, seed=0, vocab_size=49408
    ).to(device)
    encoder = TextEncoder("clip_l", model, tokenizer, TOKEN)
    pairs = make_pairs(CreativeConfig())
    ours = {
        "ours": Ours(encoder, pairs, batch, [0], cache=True),
        "uncached": Ours(encoder, pairs, batch, [0], cache=False),
        "packed": Ours(encoder, pairs, batch, list(range(PACK)), cache=True),
        "packed, uncached": Ours(encoder, pairs, batch, list(range(PACK)), cache=False),
    }
    others: dict[str, Whole] = {"plain": Whole(encoder, pairs, batch), "inversion": Inversion(encoder, pairs, batch)}
    _check_equal(ours, others)
    repeats = {name: 10 if name in ours else 1 for name in [*ours, *others]}
    bodies: dict[str, Callable[[], float]] = {**ours, **others}
    times = interleaved(
        {name: _timed(bodies[name], repeats[name], device) for name in bodies}, rounds=3 if quick else 5
    )
    label = f"{layers} layers, width {width}, {batch} pairs"
    packed = PACK / median_of_ratios(times["packed"], times["ours"])
    return [
        BenchmarkRow(f"updates a second, {label}", 1 / median(times["ours"]), "1/s"),
        BenchmarkRow("the same without the cached positions before the token", 1 / median(times["uncached"]), "1/s"),
        BenchmarkRow("plain loop: whole prompts, the row alone trains", 1 / median(times["plain"]), "1/s"),
        BenchmarkRow(
            "textual inversion's loop: whole prompts, the whole table trains", 1 / median(times["inversion"]), "1/s"
        ),
        # Without a target: the time of an update with a single row is mostly that of reading the weights, with a cache
        # or without.
        BenchmarkRow("cached / not cached, one run", median_of_ratios(times["uncached"], times["ours"]), "x"),
        BenchmarkRow(
            f"cached / not cached, {PACK} runs packed",
            median_of_ratios(times["packed, uncached"], times["packed"]),
            "x",
            1.0,
        ),
        BenchmarkRow("ours / plain loop", median_of_ratios(times["plain"], times["ours"]), "x", 1.0),
        BenchmarkRow("ours / textual inversion's loop", median_of_ratios(times["inversion"], times["ours"]), "x", 1.0),
        BenchmarkRow(f"{PACK} runs packed / one after the other", packed, "x", 1.0),
    ]


def _timed(body: Callable[[], Any], repeats: int, device: torch.device) -> Callable[[], float]:
    """A function that measures the seconds of one update, as the mean of `repeats` updates."""

    def several() -> None:
        for _ in range(repeats):
            body()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return lambda: seconds(several) / repeats


def _check_equal(ours: dict[str, Ours], others: dict[str, Whole]) -> None:
    """Check that the first two losses of all loops are equal, except for rounding errors.

    Raises:
        RuntimeError: A loop computes other losses.
    """
    bodies: dict[str, Callable[[], float]] = {**ours, **others}
    losses = {name: [body() for _ in range(2)] for name, body in bodies.items() if "packed" not in name}
    for name, pair in losses.items():
        for a, b in zip(pair, losses["ours"]):
            # AdamW's first update divides by the gradient's size, so that rounding errors grow in the second loss.
            if abs(a - b) > 1e-3 * abs(b):
                raise RuntimeError(f"{name} computes another update: losses {pair}, ours {losses['ours']}")


class Ours:
    """A call is one update as the engine computes it; it returns the mean loss.

    Args:
        encoder: The text encoder.
        pairs: Pairs of concepts.
        batch: Number of pairs in an update.
        seeds: Seeds of the runs that are packed; one row is trained for each.
        cache: Whether to cache the encoder's result for the positions before the token, which no update changes.
    """

    def __init__(self, encoder: TextEncoder, pairs: Pairs, batch: int, seeds: list[int], *, cache: bool) -> None:
        specs = [RowSpec(Template(), seed) for seed in seeds]
        self.model = Tokens([encoder], specs, pairs.all, token=TOKEN, start=START, cache=cache)
        self.backend = PlainBackend(self.model, OPTIM, World(device=encoder.device))
        self.objective = TokenObjective(MAX_COSINE, len(seeds))
        self.batch = batch
        self.batches = PairStream(seeds, len(pairs.trained), global_batch=batch).batches()

    def __call__(self) -> float:
        losses = self.objective(self.backend.model, next(self.batches).to(self.backend.world.device))  # type: ignore[arg-type]
        self.backend.backward(losses, global_batch=self.batch, last=True)
        self.backend.step(OPTIM.lr)
        return float(losses.detach().mean())


class Whole:
    """A plain loop: the encoder computes every position of every padded prompt; only the token's row is trained.

    Args:
        encoder: The text encoder.
        pairs: Pairs of concepts.
        batch: Number of pairs in an update, whose gradients are accumulated.
    """

    def __init__(self, encoder: TextEncoder, pairs: Pairs, batch: int) -> None:
        self.encoder, self.pairs, self.template = encoder, pairs, Template()
        self.model = copy.deepcopy(encoder.model)
        if encoder.token_id >= len(encoder.table):
            self.model.resize_token_embeddings(encoder.token_id + 1, mean_resizing=False)
            self.model.requires_grad_(False)
        self.start = encoder.single(START, "start")
        self.prepare()
        self.batches = PairStream([0], len(pairs.trained), global_batch=batch).batches()

    def prepare(self) -> None:
        """Make the row a parameter, which a hook inserts into the embeddings of each prompt."""
        table = self.model.get_input_embeddings()
        self.row = torch.nn.Parameter(table.weight[self.start].detach().clone())
        self.optimizer = torch.optim.AdamW([self.row], lr=OPTIM.lr, weight_decay=0.0)
        token = self.encoder.token_id
        table.register_forward_hook(lambda module, args, out: torch.where((args[0] == token)[..., None], self.row, out))

    def embed(self, prompts: list[str]) -> torch.Tensor:
        """Normalized embeddings of the prompts [N, E]."""
        ids = self.encoder.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        return F.normalize(self.model(ids.to(self.encoder.device)).text_embeds, dim=1)

    def __call__(self) -> float:
        batch = [self.pairs.trained[i] for i in next(self.batches).pairs[:, 0].tolist()]
        total = 0.0
        for first, second in batch:
            orders = ((first, second), (second, first))
            with torch.no_grad():
                targets = self.embed([self.template.restrictive.format(t1=t1, t2=t2) for t1, t2 in orders])
            adaptive = self.embed([self.template.adaptive.format(token=TOKEN, t1=t1, t2=t2) for t1, t2 in orders])
            cosines = (adaptive * targets).sum(1)  # [O]
            loss = per_row(cosines[None, None, :, None], MAX_COSINE).mean() / len(batch)
            loss.backward()
            total += loss.item()
        self.update()
        return total

    def update(self) -> None:
        """One step of the optimizer, after which gradients are zero."""
        self.optimizer.step()
        self.optimizer.zero_grad()


class Inversion(Whole):
    """The loop of diffusers' example of textual inversion: the table gets one more row, all rows are trained, and after
    each step the other rows are restored."""

    def prepare(self) -> None:
        token = self.encoder.token_id
        table = self.model.get_input_embeddings().weight
        with torch.no_grad():
            table[token] = table[self.start]
        table.requires_grad_(True)
        self.table, self.original = table, table.detach().clone()
        self.others = torch.ones(len(table), dtype=torch.bool, device=table.device)
        self.others[token] = False
        self.optimizer = torch.optim.AdamW([table], lr=OPTIM.lr, weight_decay=0.0)

    def update(self) -> None:
        super().update()
        with torch.no_grad():
            self.table[self.others] = self.original[self.others]
