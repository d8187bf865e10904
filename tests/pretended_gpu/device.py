"""A pretended GPU: the product's code takes its CUDA branches on a machine, and with a torch, that has no CUDA.

Tensors on `cuda` have a shape, a dtype, strides and a device, and no values (torch's FakeTensor); tensors in host
memory are real. A `Trace` records what a real GPU would have been asked to do: kernels, waits of the host, copies,
products, collectives and bytes held. An operator that mixes devices raises, as it does on a GPU.

    with pretended_gpu() as trace:
        model.to("cuda")(x).sum().backward()
    trace.launches, trace.waits

What cannot be seen: values, the kernels' own failures, code that Triton would generate, NCCL itself, races between
streams, and the fragmentation of memory.
"""

from __future__ import annotations

from tests.pretended_gpu import loading

loading.load()  # before torch, which asks once whether there is CUDA

import concurrent.futures  # noqa: E402
import contextlib  # noqa: E402
import threading  # noqa: E402
import traceback  # noqa: E402
import weakref  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402
from unittest import mock  # noqa: E402

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

from tests.pretended_gpu.operators import (  # noqa: E402
    DATA_DEPENDENT,
    INDEXING,
    NO_KERNEL,
    PRODUCTS,
    READS,
    SEVERAL_KERNELS,
)

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


class Wait(NamedTuple):
    """A place where the host stands still until the device has caught up."""

    what: str
    where: str


class Collective(NamedTuple):
    """One collective: the kinds of device its tensors lie on, and their bytes."""

    name: str
    devices: str
    where: str
    num_bytes: int


@dataclass
class Trace:
    """What the pretended GPU was asked to do."""

    kernels: Counter[str] = field(default_factory=Counter)
    waits: list[Wait] = field(default_factory=list)
    overlapped: list[Wait] = field(default_factory=list)
    """Copies and event waits that leave the device busy: page-locked and asynchronous, or of work long queued."""
    collectives: list[Collective] = field(default_factory=list)
    products: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Matrix products by (dtype, precision of fp32 products at that time)."""
    live_bytes: int = 0
    peak_bytes: int = 0

    @property
    def launches(self) -> int:
        return sum(self.kernels.values())

    def mixed_collectives(self) -> list[str]:
        """Collectives that no process group takes: their tensors lie on two kinds of device."""
        return [f"{c.name} of {c.devices} in {c.where}" for c in self.collectives if "+" in c.devices]

    def host_collectives(self) -> list[str]:
        """Collectives that a group of NCCL alone would refuse: their tensors lie in host memory."""
        return [f"{c.name} in {c.where}" for c in self.collectives if c.devices == "cpu"]


def _where() -> str:
    """The innermost line of the product on the stack; autograd's own threads have none."""
    product = [str(ROOT / "fine_dist"), str(ROOT / "launchers")]
    for frame in reversed(traceback.extract_stack()):
        if any(frame.filename.startswith(room) for room in product):
            return f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
    return "backward" if threading.current_thread() is not threading.main_thread() else "torch"


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


class _Pinned:
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


class _Dispatch(TorchDispatchMode):
    """Sends operators on tensors of the device to FakeTensorMode, all others to the processor, and records both."""

    def __init__(self, trace: Trace, pinned: _Pinned, value: float) -> None:
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
        self.trace.waits.append(Wait(what, _where()))

    def _copy(self, host: torch.Tensor, asynchronous: bool) -> None:
        if asynchronous and self.pinned.has(host):
            self.trace.overlapped.append(Wait("asynchronous copy", _where()))
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
        self.trace.collectives.append(Collective(name, devices, _where(), size))
        stand_in = {id(x): torch.zeros(x.shape, dtype=x.dtype) for x in tensors if isinstance(x, FakeTensor)}
        original = {id(stand_in[id(x)]): x for x in tensors if id(x) in stand_in}
        given, named = tree_map(lambda x: stand_in.get(id(x), x), (args, kwargs))
        return tree_map(lambda x: original.get(id(x), x), func(*given, **named))


# --- torch.cuda -----------------------------------------------------------------------------------------------------


class _Event:
    """An event of the one stream. Waiting for it is free when work was queued behind it, for the device stays busy."""

    def __init__(self, trace: Trace) -> None:
        self._trace, self._at = trace, 0

    def record(self, *_: Any) -> None:
        self._at = self._trace.launches

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        behind = self._trace.launches - self._at
        kept = self._trace.overlapped if behind else self._trace.waits
        kept.append(Wait("wait for an event", _where()))

    def wait(self, *_: Any) -> None: ...

    def elapsed_time(self, other: Any) -> float:
        return 1.0


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """The kernels that a GPU chooses; FakeTensor would take the one that it can compute anywhere."""
    if not isinstance(query, FakeTensor) or args or kwargs:
        return _PLAIN_ATTENTION(query, key, value, *args, **kwargs)
    if query.dtype in (torch.bfloat16, torch.float16):
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    with_statistics = torch.is_grad_enabled()
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, with_statistics)[0]


_PLAIN_ATTENTION = torch.nn.functional.scaled_dot_product_attention


def _at_once(self: Any, body: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A thread pool's work, done in the caller: two threads cannot share a FakeTensorMode while one computes."""
    future: Any = concurrent.futures.Future()
    try:
        future.set_result(body(*args, **kwargs))
    except BaseException as error:
        future.set_exception(error)
    return future


def _module_to(move: Callable[..., Any]) -> Callable[..., Any]:
    def to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """A module that is there already stays as it is: torch would exchange each parameter with itself, and
        cannot."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        held = [*self.parameters(), *self.buffers()]
        if dtype is None and device is not None and all(tensor.device.type == device.type for tensor in held):
            return self
        return move(self, *args, **kwargs)

    return to


def _names(trace: Trace, name: str, count: int, memory_gib: float) -> dict[str, Any]:
    """What `torch.cuda` says."""
    total = int(memory_gib * GIB)
    properties = type(
        "Properties",
        (),
        {"name": name, "total_memory": total, "major": 9, "minor": 0, "multi_processor_count": 132, "gcnArchName": ""},
    )
    return {
        "is_available": lambda: count > 0,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "is_initialized": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: name,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (total - trace.live_bytes, total),
        "memory_allocated": lambda device=None: trace.live_bytes,
        "max_memory_allocated": lambda device=None: trace.peak_bytes,
        "reset_peak_memory_stats": lambda device=None: setattr(trace, "peak_bytes", trace.live_bytes),
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: trace.waits.append(Wait("synchronize", _where())),
        "is_current_stream_capturing": lambda: False,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
        "Event": lambda *args, **kwargs: _Event(trace),
        "Stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "device": type("device", (contextlib.nullcontext,), {}),
    }


@contextlib.contextmanager
def pretended_gpu(
    name: str = "NVIDIA H100 80GB HBM3", *, count: int = 1, memory_gib: float = 80.0, value: float = 0.5
) -> Iterator[Trace]:
    """A context in which `torch.cuda` has GPUs.

    Args:
        name: What the driver calls them.
        count: How many this process sees.
        memory_gib: Memory of each, in GiB.
        value: What any read of the device gives, since nothing is computed.

    Yields:
        The record of what they were asked to do.
    """
    trace, pinned = Trace(), _Pinned()

    def pinning(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            made = make(*args, **kwargs)
            return pinned.add(made) if pin_memory else made

        return call

    plain_list = torch.Tensor.tolist

    def to_list(self: torch.Tensor) -> Any:
        if not isinstance(self, FakeTensor):
            return plain_list(self)
        trace.waits.append(Wait("tolist", _where()))
        return plain_list(torch.full(self.shape, value, dtype=self.dtype))

    patches: list[tuple[Any, str, Any]] = [
        (torch.cuda, *item) for item in _names(trace, name, count, memory_gib).items()
    ]
    patches += [
        (torch.cuda.nvtx, "range_push", lambda *args: 0),
        (torch.cuda.nvtx, "range_pop", lambda *args: 0),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.nn.functional, "scaled_dot_product_attention", _attention),
        (torch.nn.utils.clip_grad, "_has_foreach_support", lambda tensors, device: True),
        (torch.nn.Module, "to", _module_to(torch.nn.Module.to)),
        *((torch, make, pinning(getattr(torch, make))) for make in ("empty", "zeros", "ones", "full", "tensor")),
        (torch.Tensor, "pin_memory", lambda self, device=None: pinned.add(self.clone())),
        (torch.Tensor, "is_pinned", lambda self, device=None: pinned.has(self)),
        (torch.Tensor, "record_stream", lambda self, stream: None),
        (torch.Tensor, "tolist", to_list),
        (FakeTensor, "tolist", to_list),
        (concurrent.futures.ThreadPoolExecutor, "submit", _at_once),
    ]
    lifts_in_host_memory = torch._C._only_lift_cpu_tensors()
    with contextlib.ExitStack() as stack:
        for owner, key, new in patches:
            stack.enter_context(mock.patch.object(owner, key, new))
        # torch.tensor(..., device="cuda") is made in host memory and then copied: an operator that is seen here.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifts_in_host_memory)
        with _Dispatch(trace, pinned, value):
            yield trace
