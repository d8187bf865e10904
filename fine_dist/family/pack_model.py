"""Trains the sigma of many targets as one model: U and V are shared, and every sample uses the sigma of its own job.

A pack is J targets of one width that share their frozen genes. Their batches are concatenated, deepest job first, so
that the jobs that have a given layer are a prefix of the batch; the samples of the others are cut off by a slice. Jobs
are independent: rows of products, normalization and attention each belong to one sample, and every sum over samples is
within one job. A job's trajectory therefore equals that of a run of its own, up to rounding.

Shapes: J jobs, B samples a job, N = J B, T tokens, S = B T rows of a job, D width, K = 5 matrices, L layers of the
deepest job, R rank, m out and n in features, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fine_dist.core.errors import ArtifactError
from fine_dist.engine.compiling import compile_or_fall_back
from fine_dist.family.index_cache import IndexCache
from fine_dist.model.arch import MATRICES
from fine_dist.model.dit import DiT, is_recomputed
from fine_dist.model.factors import SharedForm, cheaper_path
from fine_dist.model.layers import FactoredProduct, attention, compute_dtype, gated_add, modulate

_MAX_SELECTIONS = 64
"""Maximum number of selections of jobs whose stacked biases are cached."""


@dataclass(frozen=True)
class PackInputs:
    """The inputs of J jobs: z noised latents [J, B, C, H, H], t times [J, B], y labels [J, B]."""

    z: Tensor
    t: Tensor
    y: Tensor


class PackedBlock(nn.Module):
    """A DiT block of J jobs: `model.dit.block_forward` with `W_j = U diag(sigma_j) V^T` in every matrix.

    It has no parameters: factors, biases and sigma are inputs, so all layers and all selections of jobs share one
    compiled function.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(
        self,
        x: Tensor,
        gate: Tensor,
        sigma: Sequence[Tensor],
        biases: Sequence[Tensor],
        factors: Sequence[tuple[Tensor, Tensor]],
        composed: Sequence[bool],
    ) -> Tensor:
        """Run the block on the samples of J jobs.

        Args:
            x: Tokens, fp32 [N, T, D].
            gate: adaLN's input times its V, [N, R].
            sigma: fp32 [J, R] of each matrix, in the order of `MATRICES`, as are the following.
            biases: [J, m], in the products' dtype.
            factors: (u [m, R], v [n, R]), in the products' dtype.
            composed: Whether W is computed.

        Returns:
            Tokens, fp32 [N, T, D].
        """
        # Tensors come as lists in the order of MATRICES and not in a dictionary, so that torch.compile sees tensors.
        index_of = {name: index for index, name in enumerate(MATRICES)}

        def product(name: str, h: Tensor, has_v: bool = True) -> Tensor:
            i, jobs = index_of[name], len(sigma[0])
            # The samples of a job are consecutive, so splitting the batch into jobs and rows is a view.
            rows = h.reshape(jobs, -1, h.shape[-1])  #                                                    [J, S, n]
            u, v = factors[i]
            y = packed_product(rows, sigma[i], biases[i], u, v if has_v else None, composed[i])
            return y.reshape(*h.shape[:-1], -1)

        # `gate` is already multiplied by V, because that product is the same at every layer.
        modulation = product("adaln", gate, has_v=False).to(x.dtype).unsqueeze(1)  #                       [N, 1, 6 D]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=2)  #               6 x [N, 1, D]
        attended = attention(product("qkv", modulate(x, shift_a, scale_a)), self.num_heads)  #               [N, T, D]
        x = gated_add(x, gate_a, product("o", attended))
        h = F.gelu(product("in", modulate(x, shift_m, scale_m)), approximate="tanh")  #                    [N, T, 4 D]
        return gated_add(x, gate_m, product("out", h))


def packed_product(x: Tensor, sigma: Tensor, bias: Tensor, u: Tensor, v: Tensor | None, composed: bool) -> Tensor:
    """`x W_j^T + bias_j` [J, S, m] of x [J, S, n], in the dtype of u. If v is None, x is already `x V` [J, S, R]."""
    dtype = u.dtype
    if composed:
        assert v is not None
        # J weights in one product. Composing is cheaper if a job has many rows.
        weight = (u * sigma[:, None]).to(dtype) @ v.T  #                                                     [J, m, n]
        return torch.baddbmm(bias[:, None], x.to(dtype), weight.transpose(1, 2))
    # FactoredProduct saves half as much for the backward pass; a compiler derives the same from the plain form below.
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        product: Tensor = FactoredProduct.apply(x, sigma, bias, u, v, dtype)
        return product
    thin = x.to(dtype) if v is None else x.to(dtype) @ v  #                                                 [J, S, R]
    return torch.baddbmm(bias[:, None], (thin * sigma[:, None]).to(dtype), u.T.expand(len(sigma), *u.T.shape))


class PackedDiT(nn.Module):
    """J targets of one width and any depths, in shared form, as one module.

    `sigma [J, L K R]` trains (beyond a shallower job's depth its row is zero and stays so), and, when the jobs train
    their label embedders, `labels [J, C+1, D]`. Jobs keep the order in which they are given; during the forward pass
    they are sorted by depth.

    Args:
        forms: The targets, as `Method.pack` gives them, with equal factors and shells (except label embedders that
            train). They are read one at a time and not kept, so an iterator costs the memory of one model.
        recompute: Blocks whose activations are computed again in the backward pass: `none`, `blocks` or `every_other`.

    Raises:
        ArtifactError: Two targets cannot share a pack.
    """

    def __init__(self, forms: Iterable[SharedForm], recompute: str = "none"):
        super().__init__()
        depths: list[int] = []
        sigmas: list[Tensor] = []
        tables: list[Tensor] = []
        self._biases: list[list[dict[str, Tensor]]] = []
        self._names: list[Callable[[int, str], str]] = []
        for form in forms:
            if not depths:
                self._share(form)
            # Compared by hash, so that only one target's factors are in memory at a time.
            elif shared_identity(form) != self.identity:
                raise ArtifactError(
                    f"a target of {form.arch.num_layers} layers does not share the pack's genes; plan it separately"
                )
            depths.append(form.arch.num_layers)
            sigmas.append(form.sigma.float().flatten())
            self._biases.append(form.biases)
            self._names.append(form.name_of)
            if form.labels is not None:
                tables.append(form.labels[1])
        self.depths, self.recompute = tuple(depths), recompute
        # One parameter [J, L K R] for all jobs, so that the number of the optimizer's kernels does not depend on J.
        # Padding gets no gradient, because no layer reads it.
        width = max(len(s) for s in sigmas)
        self.sigma = nn.Parameter(torch.stack([F.pad(s, (0, width - len(s))) for s in sigmas]))
        self.labels = nn.Parameter(torch.stack(tables)) if tables else None
        self.block = PackedBlock(self.arch.num_heads)
        """The one block module, called for every layer."""
        self.compiled = False
        self.index = IndexCache()
        self._stacked: dict[tuple[tuple[int, ...], torch.dtype], list[list[Tensor]]] = {}
        self._cast: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}

    def compile_block(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the block, once for all layers. `backend` is that of `torch.compile`."""
        compile_or_fall_back([self.block], backend)
        self.compiled = True

    def factors(self, matrix: str) -> tuple[Tensor, Tensor]:
        """U [m, R] and V [n, R] of a matrix."""
        return self.get_buffer(f"U_{matrix}"), self.get_buffer(f"V_{matrix}")

    def trained(self) -> list[Tensor]:
        """The parameters that stage 2 trains; row j of each belongs to job j."""
        return [self.sigma] if self.labels is None else [self.sigma, self.labels]

    def _share(self, form: SharedForm) -> None:
        """Set the factors and the shell that all jobs share from the first target."""
        self.identity = shared_identity(form)
        self.arch, self.rank = form.arch, form.rank
        self._label_name = form.labels[0] if form.labels else ""
        # A DiT of one layer is built for its embedders and final layer; the block is discarded.
        shell = DiT(form.arch.with_depth(1))
        shell.blocks = nn.ModuleList()
        shell.load_state_dict(form.shell)
        self.shell = shell.requires_grad_(False)
        for matrix, (u, v) in form.factors.items():
            self.register_buffer(f"U_{matrix}", u, persistent=False)
            self.register_buffer(f"V_{matrix}", v, persistent=False)

    # --- forward ----------------------------------------------------------------------------------------------------

    def forward(self, inputs: PackInputs, jobs: Sequence[int] | None = None) -> Tensor:
        """Outputs [J', B, C or 2C, H, H] of some jobs, in the order of `jobs`; the inputs have one row for each.

        Args:
            inputs: Inputs of these jobs.
            jobs: Indices into the pack. None: all jobs.
        """
        chosen = list(range(len(self.depths))) if jobs is None else list(jobs)
        # The sort is stable: jobs of one depth keep the caller's order, and so the order of their sums.
        order = sorted(range(len(chosen)), key=lambda i: -self.depths[chosen[i]])
        if order == list(range(len(order))):
            return self._forward_sorted(inputs, chosen)
        in_order = PackInputs(*(self.index.take(x, order) for x in (inputs.z, inputs.t, inputs.y)))
        out = self._forward_sorted(in_order, [chosen[i] for i in order])
        # The inverse permutation restores the caller's order.
        return self.index.take(out, sorted(range(len(order)), key=lambda i: order[i]))

    def _forward_sorted(self, inputs: PackInputs, jobs: list[int]) -> Tensor:
        """The outputs of jobs that are sorted by depth, deepest first.

        The loop runs to the deepest job's last layer; `alive` is the number of jobs that have the current layer.
        """
        batch = inputs.t.shape[1]
        x, c = self._embed(inputs, jobs)  #                                                       [N, T, D], [N, D]
        # adaLN's input is the same at every layer, so its product with V is computed once.
        gate = c @ self.factors("adaln")[1]  #                                                        [N, R]
        dtype = compute_dtype(gate)
        gate, factors, biases = gate.to(dtype), self._factors_in(dtype), self._stacked_biases(jobs, dtype)
        composed = self._composed(batch * x.shape[1])
        layers = self.index.take(self.sigma, jobs).unflatten(1, (-1, len(MATRICES), self.rank)).unbind(1)
        finished: list[Tensor] = []
        alive = len(jobs)
        # The block casts explicitly where it has to; autocast would add a cast for each operand.
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.compiled and torch.is_grad_enabled():
                # Nothing before the first block trains. Its input requires a gradient anyway, so that the first layer
                # shares the compiled function of the others.
                x = x.detach().requires_grad_(True)
            for layer in range(self.depths[jobs[0]]):
                # Jobs are sorted deepest first, so the first `deep` of them have this layer. The samples of the others
                # are cut off the end of the batch: no mask, no wasted product, and the rest stays contiguous.
                deep = sum(self.depths[j] > layer for j in jobs)
                if deep < alive:
                    x, done = x.split([deep * batch, (alive - deep) * batch])
                    finished.append(done)
                    alive = deep
                    # Only this layer's input is a view of another tensor, which would be compiled separately.
                    x = x.clone() if self.compiled else x
                sigma = layers[layer][:alive].unbind(1)  #                                              K x [J', R]
                args = (x, gate[: alive * batch], sigma, biases[layer], factors, composed)
                if is_recomputed(self.recompute, layer) and torch.is_grad_enabled():
                    x = checkpoint(self.block, *args, use_reentrant=False)
                else:
                    x = self.block(*args)  #                                                                  [N, T, D]
        # Shallow jobs finished first, so the reversed list restores the original order of the batch.
        x = torch.cat([x, *reversed(finished)]) if finished else x
        output: Tensor = self.shell.unpatchify(self.shell.final(x, c)).unflatten(0, (len(jobs), batch))
        return output

    def _embed(self, inputs: PackInputs, jobs: list[int]) -> tuple[Tensor, Tensor]:
        """Tokens [N, T, D] and the condition [N, D] of the blocks, after its SiLU."""
        x = self.shell.patch(self.shell.patchify(inputs.z.flatten(0, 1))) + self.shell.pos
        c = self.shell.time(inputs.t.flatten())
        if self.labels is None:
            return x, F.silu(c + self.shell.label(inputs.y.flatten()))
        table = self.index.take(self.labels, jobs)  #                                                   [J', C+1, D]
        # The label tables of the jobs are indexed as one long table, in which job j starts at row j (C + 1).
        first = torch.arange(len(jobs), device=inputs.y.device)[:, None] * table.shape[1]
        return x, F.silu(c + F.embedding((inputs.y + first).flatten(), table.flatten(0, 1)))

    def _composed(self, rows: int) -> tuple[bool, ...]:
        """For each matrix, whether composing W is cheaper for `rows` rows of a job; never for adaLN (see `gate`)."""
        how = {"train_factors": False, "train_scalers": True, "backward": torch.is_grad_enabled()}
        sides = {name: (*self.arch.matrix(name), self.rank) for name in MATRICES}
        return tuple(n != "adaln" and cheaper_path(rows, *size, **how) == "composed" for n, size in sides.items())

    def _factors_in(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """The frozen factors in the products' dtype, in the order of `MATRICES`; cast once."""
        # The factors are frozen, so one cast serves all steps. `.to(device)` of the pack invalidates it.
        if dtype not in self._cast or self._cast[dtype][0][0].device != self.sigma.device:
            self._cast[dtype] = [(u.to(dtype), v.to(dtype)) for u, v in map(self.factors, MATRICES)]
        return self._cast[dtype]

    def _stacked_biases(self, jobs: list[int], dtype: torch.dtype) -> list[list[Tensor]]:
        """For each layer, the biases [J', m] of the jobs that have it; cached for each selection of jobs."""
        key = (tuple(jobs), dtype)
        if key not in self._stacked:
            # Selections change only when a job ends; the bound is for packs whose hundreds of jobs end one by one.
            if len(self._stacked) >= _MAX_SELECTIONS:
                self._stacked.clear()
            deep = [[j for j in jobs if self.depths[j] > layer] for layer in range(self.depths[jobs[0]])]
            self._stacked[key] = [
                [torch.stack([self._biases[j][layer][m] for j in reach]).to(self.sigma.device, dtype) for m in MATRICES]
                for layer, reach in enumerate(deep)
            ]
        return self._stacked[key]

    def fixed(self, job: int) -> list[Tensor]:
        """The frozen tensors of a job: its biases, layer by layer."""
        return [bias for layer in self._biases[job] for bias in layer.values()]

    # --- one job ----------------------------------------------------------------------------------------------------

    def fingerprint(self, job: int) -> str:
        """sha256 of a job's current tensors; jobs with equal hashes are the same model."""
        digest = hashlib.sha256(str(self.depths[job]).encode())
        # Bits and not values are hashed: only models with the same bits may share a measured loss.
        for tensor in [*(p[job] for p in self.trained()), *self.fixed(job)]:
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def scalers(self, job: int) -> dict[str, Tensor]:
        """The trained tensors of a job by the names in its own model's state dict (copies, on the CPU)."""
        rows = self.sigma[job].detach().cpu().unflatten(0, (-1, len(MATRICES), self.rank))
        state = {
            self._names[job](layer, matrix): rows[layer, k].clone()
            for layer in range(self.depths[job])
            for k, matrix in enumerate(MATRICES)
        }
        if self.labels is not None:
            state[self._label_name] = self.labels[job].detach().cpu().clone()
        return state


class JobView(nn.Module):
    """One job of a pack as a separate model, `(z, t, y) -> out`, for evaluation."""

    def __init__(self, pack: PackedDiT, job: int):
        super().__init__()
        self.pack, self.job = pack, job

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        output: Tensor = self.pack(PackInputs(z[None], t[None], y[None]), [self.job])[0]
        return output


def shared_identity(form: SharedForm) -> str:
    """sha256 of everything that the jobs of one pack must share: factors, shell, and whether labels train."""
    labels = form.labels[0] if form.labels else None
    digest = hashlib.sha256(f"{form.arch.with_depth(1)} {form.rank} {labels}".encode())
    shared = {f"{side}.{matrix}": x for matrix, pair in form.factors.items() for side, x in zip("UV", pair)}
    shell = {name: x for name, x in form.shell.items() if name != labels}
    for name, tensor in sorted({**shared, **shell}.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
