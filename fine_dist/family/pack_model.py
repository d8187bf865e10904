"""Many sigma-initializations as one program: U and V once, every sample uses its own job's sigma.

A pack is J targets of one width that share their frozen genes. Their batches lie behind one another, deepest job
first, so the jobs that are still deep enough at a layer are a prefix of the batch, and the others leave through a
slice. Nothing couples two jobs: a row of a product, a layer's normalization and a sample's attention belong to one
sample, and every sum over samples is a sum within one job. A job's trajectory is therefore its solo run's, up to
rounding.

Shapes: J jobs, B samples a job, N = J B, T tokens, S = B T rows of a job, D width, K = 5 matrices, L layers of the
deepest job, R rank, m out and n in features, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fine_dist.core.errors import ArtifactError
from fine_dist.family.index_cache import IndexCache
from fine_dist.model.arch import MATRICES
from fine_dist.model.dit import DiT
from fine_dist.model.factors import SharedForm, cheaper_path
from fine_dist.model.layers import FactoredProduct, attention, compute_dtype, gated_add, modulate

_KEPT_SELECTIONS = 64
"""Selections of jobs whose biases are kept stacked."""


@dataclass(frozen=True)
class PackInputs:
    """What J jobs see in a step, a row a job: z noised latents [J, B, C, H, H], t times [J, B], y labels [J, B]."""

    z: Tensor
    t: Tensor
    y: Tensor


class PackedBlock(nn.Module):
    """A DiT block of J jobs: `model.dit.block_forward` with `W_j = U diag(sigma_j) V^T` in every matrix.

    It owns nothing: factors, biases and sigma are its inputs, so all layers and all selections of jobs share one
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
        """x [N, T, D] -> [N, T, D] in fp32; gate: adaLN's input times its V, [N, R].

        sigma [J, R] fp32; biases [J, m] and factors (u [m, R], v [n, R]) in the products' dtype; composed: whether W is
        made; all in the order of `MATRICES`.
        """
        known = {name: index for index, name in enumerate(MATRICES)}

        def product(name: str, h: Tensor, has_v: bool = True) -> Tensor:
            i, jobs = known[name], len(sigma[0])
            rows = h.reshape(jobs, -1, h.shape[-1])  #                                                    [J, S, n]
            u, v = factors[i]
            y = packed_product(rows, sigma[i], biases[i], u, v if has_v else None, composed[i])
            return y.reshape(*h.shape[:-1], -1)

        modulation = product("adaln", gate, has_v=False).to(x.dtype).unsqueeze(1)  #                       [N, 1, 6 D]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=2)  #               6 x [N, 1, D]
        attended = attention(product("qkv", modulate(x, shift_a, scale_a)), self.num_heads)  #               [N, T, D]
        x = gated_add(x, gate_a, product("o", attended))
        h = F.gelu(product("in", modulate(x, shift_m, scale_m)), approximate="tanh")  #                    [N, T, 4 D]
        return gated_add(x, gate_m, product("out", h))


def packed_product(x: Tensor, sigma: Tensor, bias: Tensor, u: Tensor, v: Tensor | None, composed: bool) -> Tensor:
    """`x W_j^T + bias_j` [J, S, m] of x [J, S, n], in the dtype of u; x V itself [J, S, R] where v is None."""
    dtype = u.dtype
    if composed:
        assert v is not None
        weight = (u * sigma[:, None]).to(dtype) @ v.T  #                                                     [J, m, n]
        return torch.baddbmm(bias[:, None], x.to(dtype), weight.transpose(1, 2))
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        product: Tensor = FactoredProduct.apply(x, sigma, bias, u, v, dtype)
        return product
    thin = x.to(dtype) if v is None else x.to(dtype) @ v  #                                                 [J, S, R]
    return torch.baddbmm(bias[:, None], (thin * sigma[:, None]).to(dtype), u.T.expand(len(sigma), *u.T.shape))


class PackedDiT(nn.Module):
    """J targets of one width and any depths, in shared form, as one module.

    forms: the targets, as `Method.pack` gives them; equal factors and equal shells, except label embedders that train.
           They are read one at a time and not kept: an iterator costs one model's memory.

    Trained are `sigma [J, L K R]` (a shallower job's rows beyond its depth are zero, and stay so) and, when the jobs
    train their label embedders, `labels [J, C+1, D]`. Jobs keep the order in which they are given; inside, they are
    sorted by depth. `ArtifactError` when two jobs cannot share a pack.

    recompute: `none`, `blocks` or `every_other`: whose activations are computed again in the backward pass.
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
                self._adopt(form)
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
        width = max(len(s) for s in sigmas)
        self.sigma = nn.Parameter(torch.stack([F.pad(s, (0, width - len(s))) for s in sigmas]))
        self.labels = nn.Parameter(torch.stack(tables)) if tables else None
        self.blocks = nn.ModuleList([PackedBlock(self.arch.num_heads)])
        """One block, called once a layer; a list, because that is where compilation looks for blocks."""
        self.index = IndexCache()
        self._stacked: dict[tuple[tuple[int, ...], torch.dtype], list[list[Tensor]]] = {}
        self._cast: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}

    def factors(self, matrix: str) -> tuple[Tensor, Tensor]:
        """U [m, R] and V [n, R] of a matrix."""
        return self.get_buffer(f"U_{matrix}"), self.get_buffer(f"V_{matrix}")

    def trained(self) -> list[Tensor]:
        """What stage 2 trains, each with a row a job."""
        return [self.sigma] if self.labels is None else [self.sigma, self.labels]

    def _adopt(self, form: SharedForm) -> None:
        """Take what all jobs share from the first."""
        self.identity = shared_identity(form)
        self.arch, self.rank = form.arch, form.rank
        self._label_name = form.labels[0] if form.labels else ""
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
        named = list(range(len(self.depths))) if jobs is None else list(jobs)
        order = sorted(range(len(named)), key=lambda i: -self.depths[named[i]])
        if order == list(range(len(order))):
            return self._forward_sorted(inputs, named)
        in_order = PackInputs(*(self.index.take(x, order) for x in (inputs.z, inputs.t, inputs.y)))
        out = self._forward_sorted(in_order, [named[i] for i in order])
        return self.index.take(out, sorted(range(len(order)), key=lambda i: order[i]))

    def _forward_sorted(self, inputs: PackInputs, jobs: list[int]) -> Tensor:
        """The same of jobs that come deepest first.

        The layer loop runs to the deepest job's last layer. `alive` counts the jobs that have such a layer: they are a
        prefix, so a job that has reached its depth leaves by a slice at the end, and nothing is masked.
        """
        batch = inputs.t.shape[1]
        x, c = self._embed(inputs, jobs)  #                                                       [N, T, D], [N, D]
        # adaLN's input is the same at every layer, so its product with V is made once.
        gate = F.silu(c) @ self.factors("adaln")[1]  #                                                        [N, R]
        dtype = compute_dtype(gate)
        gate, factors, biases = gate.to(dtype), self._factors_in(dtype), self._stacked_biases(jobs, dtype)
        composed = self._composed(batch * x.shape[1])
        layers = self.index.take(self.sigma, jobs).unflatten(1, (-1, len(MATRICES), self.rank)).unbind(1)
        finished: list[Tensor] = []
        alive = len(jobs)
        [block] = self.blocks
        # Inside a block every cast is written down, where it is needed; autocast would add one to each operand.
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            for layer in range(self.depths[jobs[0]]):
                deep = sum(self.depths[j] > layer for j in jobs)
                if deep < alive:
                    x, done = x.split([deep * batch, (alive - deep) * batch])
                    finished.append(done)
                    alive = deep
                sigma = layers[layer][:alive].unbind(1)  #                                              K x [J', R]
                given = (x, gate[: alive * batch], sigma, biases[layer], factors, composed)
                again = self.recompute == "blocks" or (self.recompute == "every_other" and layer % 2 == 0)
                if again and torch.is_grad_enabled():
                    x = checkpoint(block, *given, use_reentrant=False)
                else:
                    x = block(*given)  #                                                                 [N, T, D]
        x = torch.cat([x, *reversed(finished)]) if finished else x
        output: Tensor = self.shell.unpatchify(self.shell.final(x, c)).unflatten(0, (len(jobs), batch))
        return output

    def _embed(self, inputs: PackInputs, jobs: list[int]) -> tuple[Tensor, Tensor]:
        """Tokens [N, T, D] and conditioning [N, D]."""
        x = self.shell.patch(self.shell.patchify(inputs.z.flatten(0, 1))) + self.shell.pos
        c = self.shell.time(inputs.t.flatten())
        if self.labels is None:
            return x, c + self.shell.label(inputs.y.flatten())
        table = self.index.take(self.labels, jobs)  #                                                   [J', C+1, D]
        first = torch.arange(len(jobs), device=inputs.y.device)[:, None] * table.shape[1]
        return x, c + F.embedding((inputs.y + first).flatten(), table.flatten(0, 1))

    def _composed(self, rows: int) -> tuple[bool, ...]:
        """Of each matrix, whether W is made for so many rows of a job. adaLN's product with V is made once for all."""
        how = {"train_factors": False, "train_scalers": True, "backward": torch.is_grad_enabled()}
        sides = {name: (*self.arch.matrix(name), self.rank) for name in MATRICES}
        return tuple(n != "adaln" and cheaper_path(rows, *size, **how) == "composed" for n, size in sides.items())

    def _factors_in(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """The frozen factors in the products' dtype, in the order of `MATRICES`; cast once."""
        if dtype not in self._cast or self._cast[dtype][0][0].device != self.sigma.device:
            self._cast[dtype] = [(u.to(dtype), v.to(dtype)) for u, v in map(self.factors, MATRICES)]
        return self._cast[dtype]

    def _stacked_biases(self, jobs: list[int], dtype: torch.dtype) -> list[list[Tensor]]:
        """Per layer, the biases [J', m] of the jobs that reach it; made once for each selection of jobs."""
        key = (tuple(jobs), dtype)
        if key not in self._stacked:
            if len(self._stacked) >= _KEPT_SELECTIONS:
                self._stacked.clear()
            deep = [[j for j in jobs if self.depths[j] > layer] for layer in range(self.depths[jobs[0]])]
            self._stacked[key] = [
                [torch.stack([self._biases[j][layer][m] for j in reach]).to(self.sigma.device, dtype) for m in MATRICES]
                for layer, reach in enumerate(deep)
            ]
        return self._stacked[key]

    def fixed(self, job: int) -> list[Tensor]:
        """A job's own tensors that do not train: its biases, one after another."""
        return [bias for layer in self._biases[job] for bias in layer.values()]

    # --- one job ----------------------------------------------------------------------------------------------------

    def fingerprint(self, job: int) -> str:
        """A hash of all that is a job's own, as it is now: jobs of equal hash are one model."""
        digest = hashlib.sha256(str(self.depths[job]).encode())
        for tensor in [*(p[job] for p in self.trained()), *self.fixed(job)]:
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def scalers(self, job: int) -> dict[str, Tensor]:
        """What a job trained, by the names of its own model's state dict (copies, on the CPU)."""
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
    """One job of a pack as a model of its own, `(z, t, y) -> out`, for measuring it."""

    def __init__(self, pack: PackedDiT, job: int):
        super().__init__()
        self.pack, self.job = pack, job

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        output: Tensor = self.pack(PackInputs(z[None], t[None], y[None]), [self.job])[0]
        return output


def shared_identity(form: SharedForm) -> str:
    """A hash of what jobs of one pack share: factors, shell, and whether labels train."""
    own = form.labels[0] if form.labels else None
    digest = hashlib.sha256(f"{form.arch.with_depth(1)} {form.rank} {own}".encode())
    shared = {f"{side}.{matrix}": x for matrix, pair in form.factors.items() for side, x in zip("UV", pair)}
    shell = {name: x for name, x in form.shell.items() if name != own}
    for name, tensor in sorted({**shared, **shell}.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
