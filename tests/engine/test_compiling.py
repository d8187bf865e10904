"""Blocks that are compiled: once for all layers and depths, and back to eager when it fails."""

from __future__ import annotations

import pytest
import torch

from fine_dist.engine.allocator import keep_freed_memory
from fine_dist.engine.compiling import compile_or_fall_back, compiles
from fine_dist.engine.settings import EngineConfig
from fine_dist.model.dit import DiT
from fine_dist.model.factors import FactoredDiT
from tests.conftest import inputs, lively, tiny_arch


@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_all_layers_of_models_of_two_depths_share_one_compilation(kind):
    torch._dynamo.reset()
    compiled = []

    def backend(graph, examples):
        compiled.append(graph)
        return graph.forward

    for depth in (12, 6):
        arch = tiny_arch(num_layers=depth)
        model = lively(DiT(arch) if kind == "dense" else FactoredDiT(arch, 16))
        batch = inputs(arch)
        eager = model(*batch)
        compile_or_fall_back(list(model.blocks), backend)
        out = model(*batch)
        out.square().mean().backward()
        torch.testing.assert_close(out, eager, atol=1e-5, rtol=1e-5)
    assert len(compiled) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("recompute", ["none", "blocks", "every_other"])
def test_compiled_blocks_are_recomputed_as_eager_ones_are(recompute, caplog):
    """torch ends a recomputation by an exception of its own, which no wrapper of a block may take for a failure."""
    torch._dynamo.reset()
    grads = []
    for compiled in (False, True):
        model = lively(DiT(tiny_arch()))
        model.recompute = recompute
        if compiled:
            compile_or_fall_back(list(model.blocks), "aot_eager")
        model(*inputs(model.arch)).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    assert "torch.compile failed" not in caplog.text
    torch._dynamo.reset()


def test_running_out_of_memory_is_no_failure_of_the_compiler(caplog):
    class Hungry(torch.nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory")

    block = Hungry()
    compile_or_fall_back([block], "eager")
    with torch.compiler.set_stance("force_eager"), pytest.raises(torch.OutOfMemoryError):
        block(torch.ones(2))
    assert "torch.compile failed" not in caplog.text


def test_by_itself_it_compiles_on_a_gpu_alone():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not compiles(EngineConfig(), cpu)
    assert compiles(EngineConfig(compile=True), cpu)
    assert not compiles(EngineConfig(compile=False), gpu)
    assert not compiles(EngineConfig(backend="deepspeed"), gpu)


def test_freed_memory_is_used_again_without_page_faults():
    import resource

    if not keep_freed_memory():
        pytest.skip("this allocator has no such option")

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        x = torch.ones(48 * 2**20 // 4)
        del x
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # glibc 2.36 needs a few rounds until aligned blocks fit where freed ones lay.
    assert min(faults() for _ in range(12)) < 1000  # 48 MiB are 12,288 pages
