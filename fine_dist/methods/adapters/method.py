"""Five adapters of Hugging Face's peft on a DiT: LoRA, PiSSA, OFT, BOFT and VeRA, for a new domain at the same size.

peft builds, computes and merges the layers; this file defines which matrices they wrap (`qkv`, `o`, `in` and `out` of
every block), what they cost, and how they are saved. Settings are peft's defaults, which are those of the papers.

Trained numbers of a matrix of m x n, with r the rank: LoRA and PiSSA r (m + n); VeRA r + m; OFT n (k - 1) / 2, k the
side of a block; BOFT n b + m, b the side of a block. A saved target holds these, VeRA's one shared pair of projections,
and for PiSSA the residual base, which differs from the parent's weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fine_dist.methods.adapters.config import BoftConfig, LoraConfig, OftConfig, PissaConfig, VeraConfig
from fine_dist.methods.adapters.wrapping import BASE, Adapted, adapt, share
from fine_dist.methods.base import Descent, M, Method, MethodConfig, Parent, Traits, needed
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT
from fine_dist.model.roles import of_role, train_only

TARGETS = r"blocks\.\d+\.(qkv|o|in|out)"
"""The matrices that are wrapped, by their whole name."""


class Adapters(Method[M]):
    """Base class of the five methods."""

    peft_config: ClassVar[str]
    """Class of peft's config."""

    @property
    def traits(self) -> Traits:
        return Traits(parents=("model",), varies=frozenset())

    @abstractmethod
    def options(self, fresh: bool) -> dict[str, Any]:
        """Fields of peft's config.

        Args:
            fresh: Whether the adapter is initialized from its parent's weights; else its values are loaded afterwards.
        """

    @abstractmethod
    def macs(self, rows: int, m: int, n: int, backward: bool) -> int:
        """Multiply-adds of the adapter alone, without its frozen base, for one product of `rows` rows."""

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        model = DiT(target, generator=generator)
        model.load_state_dict(needed(parent).module.state_dict())
        # peft draws from torch's global generator, so it is seeded from the target's generator.
        seed = int(torch.randint(2**31, (1,), generator=generator, device="cpu"))
        return Descent(train_only(self.adapted(model, seed, fresh=True), "scaler"), "some")

    def module(self, arch: Arch, tensors: dict[str, Tensor]) -> nn.Module:
        return self.adapted(DiT(arch), 0, fresh=False)

    def adapted(self, model: DiT, seed: int, fresh: bool) -> DiT:
        """The same model with adapters in it; `seed` determines their random values."""
        import peft  # an optional dependency that no other method needs
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        config = getattr(peft, self.peft_config)(target_modules=TARGETS, **self.options(fresh))
        if self.peft_config == "VeraConfig":
            config.save_projection = False  # peft would save the shared matrices once a layer; `share` saves them once
        # The caller's global random state is restored afterwards.
        with torch.random.fork_rng(devices=[]), _plain_butterflies():
            torch.manual_seed(seed)
            tuner = adapt(model, PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type], config, self.macs)
        self.finish(model, tuner)
        return model

    def finish(self, model: DiT, tuner: Any) -> None:
        """Hook for changes to the model after peft has wrapped it."""

    def merge(self, model: nn.Module) -> dict[str, Tensor]:
        state = {name: tensor.clone() for name, tensor in of_role(model, "shell", "weight", "bias").items()}
        for name, module in model.named_modules():
            if isinstance(module, Adapted):
                merged = module.merged()
                for leaf in ("weight", "bias"):
                    state.pop(f"{name}.{BASE}{leaf}")
                    state[f"{name}.{leaf}"] = getattr(merged, leaf).detach()
        return state


@contextmanager
def _plain_butterflies() -> Iterator[None]:
    """Tell peft that BOFT's CUDA extension is not available. peft would compile it while building a layer, and again
    for every layer if that fails; one butterfly factor does not need it."""
    from peft.tuners.boft import layer

    before = layer._FBD_CUDA
    layer._FBD_CUDA = False  # type: ignore[assignment]
    try:
        yield
    finally:
        layer._FBD_CUDA = before


# --- LoRA and PiSSA ----------------------------------------------------------------------------------------------


class _ThinProducts(Adapters[M]):
    """A product of two matrices of a small rank beside each frozen one."""

    def macs(self, rows: int, m: int, n: int, backward: bool) -> int:
        rank: int = self.config.rank  # type: ignore[attr-defined]
        return rows * rank * (m + n) * (3 if backward else 1)


class Lora(_ThinProducts[LoraConfig]):
    """`W + (alpha / r) B A`, B from zero."""

    Config: ClassVar[type[MethodConfig]] = LoraConfig
    label: ClassVar[str] = "LoRA"
    paper: ClassVar[str] = "LoRA, arXiv 2106.09685"
    summary: ClassVar[str] = "transfer: low-rank updates train"
    peft_config: ClassVar[str] = "LoraConfig"

    def options(self, fresh: bool) -> dict[str, Any]:
        return {"r": self.config.rank, "lora_alpha": self.config.alpha}


class Pissa(_ThinProducts[PissaConfig]):
    """`(W - B A) + B A`, B A the best approximation of W of rank r (eqs. 2 to 4)."""

    Config: ClassVar[type[MethodConfig]] = PissaConfig
    label: ClassVar[str] = "PiSSA"
    paper: ClassVar[str] = "PiSSA, arXiv 2404.02948"
    summary: ClassVar[str] = "transfer: principal components train"
    peft_config: ClassVar[str] = "LoraConfig"

    def options(self, fresh: bool) -> dict[str, Any]:
        rank = self.config.rank
        return {"r": rank, "lora_alpha": rank, "init_lora_weights": "pissa" if fresh else True}


# --- rotations ---------------------------------------------------------------------------------------------------


class Oft(Adapters[OftConfig]):
    """`W R`, R block-diagonal and orthogonal by Cayley's transform, from the identity."""

    Config: ClassVar[type[MethodConfig]] = OftConfig
    label: ClassVar[str] = "OFT"
    paper: ClassVar[str] = "OFT, arXiv 2306.07280"
    summary: ClassVar[str] = "transfer: block rotations train"
    peft_config: ClassVar[str] = "OFTConfig"

    def options(self, fresh: bool) -> dict[str, Any]:
        return {"r": 0, "oft_block_size": self.config.block}

    def macs(self, rows: int, m: int, n: int, backward: bool) -> int:
        # the rotation of the rows, and three products in each block for the five terms of the transform's series
        k = min(self.config.block, n)
        return (rows * n * k + 3 * n * k * k) * (3 if backward else 1)


class Boft(Adapters[BoftConfig]):
    """`diag(s) W R`, R from the identity, s from one."""

    Config: ClassVar[type[MethodConfig]] = BoftConfig
    label: ClassVar[str] = "BOFT"
    paper: ClassVar[str] = "BOFT, arXiv 2311.06243"
    summary: ClassVar[str] = "transfer: butterfly rotations train"
    peft_config: ClassVar[str] = "BOFTConfig"

    def options(self, fresh: bool) -> dict[str, Any]:
        return {"boft_block_size": self.config.block, "boft_n_butterfly_factor": 1, "init_weights": True}

    def macs(self, rows: int, m: int, n: int, backward: bool) -> int:
        # peft rotates rows by a dense n x n matrix. It takes three n x n products, each with a constant (a permutation,
        # its transpose, the identity), so the backward pass needs one product for each of them, not two.
        return rows * n * n * (3 if backward else 1) + 3 * n**3 * (2 if backward else 1)


# --- VeRA --------------------------------------------------------------------------------------------------------


class Vera(Adapters[VeraConfig]):
    """`W + diag(b) B diag(d) A`, A and B shared by all matrices, b from zero."""

    Config: ClassVar[type[MethodConfig]] = VeraConfig
    label: ClassVar[str] = "VeRA"
    paper: ClassVar[str] = "VeRA, arXiv 2310.11454"
    summary: ClassVar[str] = "transfer: scales of shared random projections train"
    peft_config: ClassVar[str] = "VeraConfig"

    def options(self, fresh: bool) -> dict[str, Any]:
        config = self.config
        return {"r": config.rank, "d_initial": config.d_initial, "projection_prng_key": config.projection_seed}

    def macs(self, rows: int, m: int, n: int, backward: bool) -> int:
        return rows * self.config.rank * (m + n) * (2 if backward else 1)

    def finish(self, model: DiT, tuner: Any) -> None:
        share(model, ("vera_A", "vera_B"))
