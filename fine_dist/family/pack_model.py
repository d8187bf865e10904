"""Many sigma-initialisations as one program: U and V once, every sample carrying its own job's sigma.

A pack is J targets of one width that share their frozen genes. Their batches lie behind one another, deepest job
first, so the jobs that are still deep enough at a layer are a prefix of the batch and the others leave through a slice.
Nothing couples two jobs: a row of a product, a layer's normalisation and a sample's attention belong to one sample, and
every sum over samples is a sum within one job. A job's trajectory is therefore its solo run's, up to rounding.

Shapes: J jobs, B samples a job, N = J B, T tokens, D width, K = 5 matrices, L layers of the deepest job, R rank,
m out and n in features, C classes.
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
from fine_dist.family.pack_ops import Frozen, block
from fine_dist.model.arch import MATRICES
from fine_dist.model.dit import DiT
from fine_dist.model.factors import SharedForm, cheaper_path
from fine_dist.model.layers import compute_dtype

_KEPT_SELECTIONS = 64
"""Selections of jobs whose biases are kept stacked."""


@dataclass(frozen=True)
class Inputs:
    """What J jobs see in a step, by *feed*: jobs of one data set, seed and step share a feed, so F <= J.

    z: noised latents [F, B, C, H, H].  t: timesteps [F, B].  y: labels, null where dropped [F, B].
    """

    z: Tensor
    t: Tensor
    y: Tensor


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
            elif identity(form) != self.identity:
                raise ArtifactError(
                    f"a target of {form.arch.num_layers} layers does not share the pack's genes; plan it apart"
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
        self._stacked: dict[tuple[int, ...], list[dict[str, Tensor]]] = {}

    def factors(self, matrix: str) -> tuple[Tensor, Tensor]:
        """U [m, R] and V [n, R] of a matrix."""
        return self.get_buffer(f"U_{matrix}"), self.get_buffer(f"V_{matrix}")

    def trained(self) -> list[Tensor]:
        """What stage 2 trains, each with a row a job."""
        return [self.sigma] if self.labels is None else [self.sigma, self.labels]

    def _adopt(self, form: SharedForm) -> None:
        """Take what all jobs share from the first."""
        self.identity = identity(form)
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

    def forward(self, inputs: Inputs, feeds: Sequence[int], jobs: Sequence[int] | None = None) -> Tensor:
        """Outputs [J', B, C or 2C, H, H] of some jobs, in the order in which they are named.

        feeds: for each of the jobs, which of `inputs` it sees.  jobs: indices into the pack; all when none.
        """
        named = list(range(len(self.depths))) if jobs is None else list(jobs)
        order = sorted(range(len(named)), key=lambda i: -self.depths[named[i]])
        inner = [named[i] for i in order]
        out = self._forward_sorted(inputs, [feeds[i] for i in order], inner)
        back = sorted(range(len(order)), key=lambda i: order[i])
        return out if back == list(range(len(back))) else out[back]

    def _forward_sorted(self, inputs: Inputs, feeds: list[int], jobs: list[int]) -> Tensor:
        batch = inputs.t.shape[1]
        x, c = self._embed(inputs, feeds, jobs)  #                                              [N, T, D], [N, D]
        # adaLN's input is the same at every layer, so its product with V is made once.
        gate = F.silu(c) @ self.factors("adaln")[1]  #                                                        [N, R]
        dtype = compute_dtype(gate)
        known = ((name, self.factors(name)) for name in MATRICES)
        factors = {name: (u.to(dtype), v.to(dtype)) for name, (u, v) in known}
        composed = self._composed(batch * x.shape[1])
        layers = self.sigma[jobs].unflatten(1, (-1, len(MATRICES), self.rank)).unbind(1)  #         L x [J', K, R]
        finished: list[Tensor] = []
        alive = len(jobs)
        biases = self._stacked_biases(jobs)
        for layer in range(self.depths[jobs[0]]):
            deep = sum(self.depths[j] > layer for j in jobs)
            if deep < alive:
                x, done = x.split([deep * batch, (alive - deep) * batch])
                finished.append(done)
                alive = deep
            sigma = layers[layer][:alive].unbind(1)  #                                                  K x [J', R]
            matrices = {name: Frozen(*factors[name], biases[layer][name], composed[name]) for name in MATRICES}
            given = (x, gate[: alive * batch], dict(zip(MATRICES, sigma)), matrices, self.arch.num_heads)
            again = self.recompute == "blocks" or (self.recompute == "every_other" and layer % 2 == 0)
            if again and torch.is_grad_enabled():
                x = checkpoint(block, *given, use_reentrant=False)
            else:
                x = block(*given)  #                                                                     [N, T, D]
        x = torch.cat([x, *reversed(finished)]) if finished else x
        return self.shell.unpatchify(self.shell.final(x, c)).unflatten(0, (len(jobs), batch))

    def _embed(self, inputs: Inputs, feeds: list[int], jobs: list[int]) -> tuple[Tensor, Tensor]:
        """Tokens [N, T, D] and conditioning [N, D]; what jobs share is computed once a feed."""
        f, b = inputs.t.shape
        x = self.shell.patch(self.shell.patchify(inputs.z.flatten(0, 1))) + self.shell.pos
        c = self.shell.time(inputs.t.flatten()).unflatten(0, (f, b))
        if self.labels is None:
            c = (c + self.shell.label(inputs.y))[feeds]
        else:
            rows = torch.arange(len(jobs), device=inputs.y.device)[:, None]
            c = c[feeds] + self.labels[jobs][rows, inputs.y[feeds]]
        return x.unflatten(0, (f, b))[feeds].flatten(0, 1), c.flatten(0, 1)

    def _composed(self, rows: int) -> dict[str, bool]:
        """Of each matrix, whether W is made for so many rows of a job. adaLN's product with V is made once for all."""
        how = {"train_factors": False, "train_scalers": True, "backward": torch.is_grad_enabled()}
        sides = {name: (*self.arch.matrix(name), self.rank) for name in MATRICES}
        return {n: n != "adaln" and cheaper_path(rows, *size, **how) == "composed" for n, size in sides.items()}

    def _stacked_biases(self, jobs: list[int]) -> list[dict[str, Tensor]]:
        """Per layer, `{matrix: [J', m]}` of the jobs that reach it; made once for each selection of jobs."""
        if tuple(jobs) not in self._stacked:
            if len(self._stacked) >= _KEPT_SELECTIONS:
                self._stacked.clear()
            self._stacked[tuple(jobs)] = [
                {
                    matrix: torch.stack([self._biases[j][layer][matrix] for j in jobs if self.depths[j] > layer]).to(
                        self.sigma.device
                    )
                    for matrix in MATRICES
                }
                for layer in range(self.depths[jobs[0]])
            ]
        return self._stacked[tuple(jobs)]

    def fixed(self, job: int) -> list[Tensor]:
        """A job's own tensors that do not train: its biases, one after another."""
        return [bias for layer in self._biases[job] for bias in layer.values()]

    # --- a job alone ------------------------------------------------------------------------------------------------

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
        return self.pack(Inputs(z[None], t[None], y[None]), [0], [self.job])[0]


def identity(form: SharedForm) -> str:
    """A hash of what jobs of one pack share: factors, shell, and whether labels train."""
    own = form.labels[0] if form.labels else None
    digest = hashlib.sha256(f"{form.arch.with_depth(1)} {form.rank} {own}".encode())
    shared = {f"{side}.{matrix}": x for matrix, pair in form.factors.items() for side, x in zip("UV", pair)}
    shell = {name: x for name, x in form.shell.items() if name != own}
    for name, tensor in sorted({**shared, **shell}.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
