"""Sums gradients over ranks while the backward pass is running.

Gradients are views of a few flat buckets. A backward pass completes them from the last layer to the first, so buckets
are filled in that order, and the all-reduce of a complete bucket overlaps with the computation of earlier layers. All
ranks send buckets in the same order, whichever parameters each has used, because collectives are matched by order.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed
from torch import Tensor, nn

from fine_dist.engine.settings import BUCKET_BYTES
from fine_dist.engine.weight_copies import add_gradients


class GradientBuckets:
    """The gradients of a model's parameters, summed over all ranks of the process group.

    A step calls `start`, runs the backward pass of its last micro-batch, calls `send_rest`, and reads gradients after
    `wait`. Backward passes of earlier micro-batches run before `start` and only add.

    Args:
        parameters: The trained parameters, in the order of the forward pass.
        dtype: Data type of the all-reduce; gradients are fp32 before and after. bf16 halves the traffic and rounds each
            rank's gradient to 8 bits.
        bucket_bytes: Size of a bucket, unless one parameter is larger.
        copies: Of some parameters, the bf16 copies that receive their gradients (`weight_copies`). A bucket takes them
            in when it is sent.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        dtype: torch.dtype = torch.float32,
        bucket_bytes: int = BUCKET_BYTES,
        copies: dict[nn.Parameter, nn.Parameter] | None = None,
    ) -> None:
        self.dtype = dtype
        members: list[list[nn.Parameter]] = [[]]
        size = 0
        # The backward pass completes gradients from the last layer to the first.
        for p in reversed(parameters):
            num_bytes = p.numel() * p.element_size()
            # One dtype a bucket, since the bucket is one flat tensor.
            if members[-1] and (size + num_bytes > bucket_bytes or p.dtype != members[-1][0].dtype):
                members.append([])
                size = 0
            members[-1].append(p)
            size += num_bytes
        copies = copies or {}
        self.buckets = [_Bucket(group, {p: copies[p] for p in group if p in copies}) for group in members]
        self._bucket_of = {p: bucket for bucket in self.buckets for p in bucket.parameters}
        self._sending = False
        self._next = 0
        for p in parameters:
            # This hook runs after autograd has added the gradient into the bucket's view; a hook
            # on the gradient itself would run before, and the message could leave without it.
            copies.get(p, p).register_post_accumulate_grad_hook(partial(self._complete, p))
        self.zero()

    @property
    def flat(self) -> list[Tensor]:
        """All gradients, one flat tensor per bucket."""
        return [bucket.flat for bucket in self.buckets]

    def zero(self) -> None:
        """Zero all gradients; a parameter that no sample uses keeps a zero gradient."""
        # Zeroed in place and never set to None: `p.grad` must remain a view of the bucket,
        # or autograd allocates a new tensor and the bucket that is sent stays zero.
        torch._foreach_zero_(self.flat)
        for bucket in self.buckets:
            bucket.attach()

    def start(self) -> None:
        """From now on send each bucket as soon as the backward pass completes it."""
        self._sending, self._next = True, 0
        for bucket in self.buckets:
            bucket.missing = set(bucket.parameters)

    def send_rest(self) -> None:
        """Send the buckets that hold a gradient which this rank's backward pass did not reach."""
        self._sending = False
        while self._next < len(self.buckets):
            self._send_next()

    def wait(self) -> None:
        """Make later work wait for the sums; on a GPU it is queued behind them and the host does not wait."""
        for bucket in self.buckets:
            bucket.wait()

    def _complete(self, p: nn.Parameter, receives: Tensor) -> None:
        """Called by autograd when a parameter, or the copy that receives it, has its whole gradient of this pass."""
        if not self._sending:
            return
        self._bucket_of[p].missing.discard(p)
        # A bucket that is complete early waits for those before it. Ranks may finish theirs in different orders when
        # their samples use different parameters, and the n-th collective of every rank must be the same bucket.
        while self._next < len(self.buckets) and not self.buckets[self._next].missing:
            self._send_next()

    def _send_next(self) -> None:
        self.buckets[self._next].send(self.dtype)
        self._next += 1


class _Bucket:
    """Gradients of some parameters in one flat tensor."""

    def __init__(self, parameters: list[nn.Parameter], copies: dict[nn.Parameter, nn.Parameter]) -> None:
        self.parameters, self._copies = parameters, copies
        self.missing: set[nn.Parameter] = set()
        first = parameters[0]
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        parts = self.flat.split([p.numel() for p in parameters])
        self._views = [part.view(p.shape) for p, part in zip(parameters, parts)]
        self._message = self.flat
        self._work: torch.distributed.Work | None = None

    def attach(self) -> None:
        for p, view in zip(self.parameters, self._views):
            p.grad = view

    def send(self, dtype: torch.dtype) -> None:
        add_gradients(self._copies.items())
        self._message = self.flat.to(dtype)  # the same tensor if it already has this dtype
        # It runs on NCCL's stream, after the work that is queued now and in parallel with the rest of the backward
        # pass.
        self._work = torch.distributed.all_reduce(self._message, async_op=True)

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._message is not self.flat:
            self.flat.copy_(self._message)
            self._message = self.flat
