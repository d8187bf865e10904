"""Operators on a pretended GPU: which run on fake tensors, which on real ones, and what each is recorded as."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.pretended_gpu.operators import DATA_DEPENDENT, INDEXING, NO_KERNEL, PRODUCTS, READS, SEVERAL_KERNELS
from tests.pretended_gpu.trace import Collective, Trace, Wait, where


class _Memory:
    """Bytes of the storages on the device that somebody still holds, rounded up as torch's allocator does."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._known: set[int] = set()

    def hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // 512) * 512
        self._known.add(key)
        self._trace.live_bytes += size
        self._trace.peak_bytes = max(self._trace.peak_bytes, self._trace.live_bytes)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._trace.live_bytes -= size


class PinnedMemory:
    """Which storages in host memory were asked to be page-locked."""

    def __init__(self) -> None:
        self._storages: set[int] = set()

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        self._storages.add(tensor.untyped_storage().data_ptr())
        return tensor

    def has(self, tensor: torch.Tensor) -> bool:
        return not isinstance(tensor, FakeTensor) and tensor.untyped_storage().data_ptr() in self._storages


_LOCK = threading.RLock()
"""A FakeTensorMode belongs to one thread at a time; autograd's device threads share one here."""


class Dispatch(TorchDispatchMode):
    """Sends operators on tensors of the device to FakeTensorMode, all others to the processor, and records both."""

    def __init__(self, trace: Trace, pinned: PinnedMemory, value: float) -> None:
        super().__init__()
        self.trace, self.pinned, self.value = trace, pinned, value
        self.memory = _Memory(trace)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.fake.shape_env = None  # every shape is a number: nothing is symbolic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        space, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        to_device = asked is not None and asked.type == "cuda"
        if space == "c10d":
            return self._collective(func, name, tensors, args, kwargs)
        if not on_device and not to_device:
            return func(*args, **kwargs)
        self._refuse_a_generator_of_another_device(name, asked, on_device, kwargs)
        if name in READS:
            self._wait(f"{name} reads a number")
            return self._number(on_device[0].dtype) if name != "equal" else bool(self.value)
        if name == "_to_copy" and on_device and asked is not None and asked.type == "cpu":
            self._wait("copy to the host into memory that is not page-locked")
            return self._real(on_device[0], kwargs.get("dtype"))
        if name == "copy_" and isinstance(args[1], FakeTensor) != isinstance(args[0], FakeTensor):
            host = args[0] if isinstance(args[1], FakeTensor) else args[1]
            self._copy(host, asynchronous=bool(kwargs.get("non_blocking", len(args) > 2 and args[2])))
            if host is args[0]:
                return host.fill_(self.value)
        elif name == "_to_copy" and not on_device:
            self._copy(tensors[0], asynchronous=bool(kwargs.get("non_blocking")))
        elif name in DATA_DEPENDENT:
            self._wait(f"{name} has a shape that depends on values")
        elif name in INDEXING:
            self._index([index for index in args[1] if isinstance(index, torch.Tensor)])
        with _LOCK, self.fake:
            given, named = tree_map(self._on_fake, (args, kwargs))
            out = func(*given, **named)
        self._count(name, tensors, out)
        return tree_map(self._settle, out)

    # --- what is recorded -------------------------------------------------------------------------------------------

    def _wait(self, what: str) -> None:
        self.trace.waits.append(Wait(what, where()))

    def _copy(self, host: torch.Tensor, asynchronous: bool) -> None:
        if asynchronous and self.pinned.has(host):
            self.trace.overlapped.append(Wait("asynchronous copy", where()))
        else:
            self._wait("copy of memory that is not page-locked" if asynchronous else "blocking copy")

    def _index(self, indices: list[torch.Tensor]) -> None:
        if any(not isinstance(index, FakeTensor) for index in indices):
            self._wait("indices come from the host")
        elif any(index.dtype == torch.bool for index in indices):
            self._wait("a boolean mask has a shape that depends on values")

    def _count(self, name: str, tensors: list[torch.Tensor], out: Any) -> None:
        if name not in NO_KERNEL:
            self.trace.kernels[name] += SEVERAL_KERNELS.get(name, 1)
        if name in PRODUCTS:
            self.trace.products[str(tensors[-1].dtype), torch.get_float32_matmul_precision()] += 1
        for leaf in tree_leaves(out):
            if isinstance(leaf, FakeTensor) and leaf.device.type == "cuda":
                self.memory.hold(leaf)

    @staticmethod
    def _refuse_a_generator_of_another_device(
        name: str, asked: Any, tensors: list[Any], kwargs: dict[str, Any]
    ) -> None:
        """FakeTensor lets a processor's generator draw on a GPU, which a GPU does not."""
        generator = kwargs.get("generator")
        device = asked or (tensors[0].device if tensors else None)
        if generator is not None and device is not None and generator.device.type != device.type:
            raise RuntimeError(f"{name} on {device.type} cannot use a generator of {generator.device.type}")

    # --- between real and fake --------------------------------------------------------------------------------------

    def _on_fake(self, leaf: Any) -> Any:
        # A zero-dimensional tensor in host memory is an argument of a kernel and costs no copy; any other mixture is
        # refused by FakeTensor itself.
        real = isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor)
        return self.fake.from_tensor(leaf) if real else leaf

    def _settle(self, leaf: Any) -> Any:
        """A result in host memory becomes real again."""
        if isinstance(leaf, FakeTensor) and leaf.device.type == "cpu":
            return self._real(leaf)
        return leaf

    def _real(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.full(tensor.shape, self.value, dtype=dtype or tensor.dtype)

    def _number(self, dtype: torch.dtype) -> float | int | bool:
        if dtype == torch.bool:
            return bool(self.value)
        return self.value if dtype.is_floating_point else int(self.value)

    def _collective(self, func: Any, name: str, tensors: list[torch.Tensor], args: Any, kwargs: Any) -> Any:
        """Run with stand-ins in host memory, so that real ranks meet and the order of their calls is checked."""
        devices = "+".join(sorted({tensor.device.type for tensor in tensors}))
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.trace.collectives.append(Collective(name, devices, where(), size))
        stand_in = {id(x): torch.zeros(x.shape, dtype=x.dtype) for x in tensors if isinstance(x, FakeTensor)}
        original = {id(stand_in[id(x)]): x for x in tensors if id(x) in stand_in}
        given, named = tree_map(lambda x: stand_in.get(id(x), x), (args, kwargs))
        return tree_map(lambda x: original.get(id(x), x), func(*given, **named))
