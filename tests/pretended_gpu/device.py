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
from collections.abc import Callable, Iterator  # noqa: E402
from typing import Any  # noqa: E402
from unittest import mock  # noqa: E402

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor  # noqa: E402

from tests.pretended_gpu.dispatch import Dispatch, PinnedMemory  # noqa: E402
from tests.pretended_gpu.trace import Trace, Wait, where  # noqa: E402

GIB = 2**30


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
        kept.append(Wait("wait for an event", where()))

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
        "synchronize": lambda device=None: trace.waits.append(Wait("synchronize", where())),
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
    trace, pinned = Trace(), PinnedMemory()

    def pinning(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            made = make(*args, **kwargs)
            return pinned.add(made) if pin_memory else made

        return call

    plain_list = torch.Tensor.tolist

    def to_list(self: torch.Tensor) -> Any:
        if not isinstance(self, FakeTensor):
            return plain_list(self)
        trace.waits.append(Wait("tolist", where()))
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
        with Dispatch(trace, pinned, value):
            yield trace
