"""What stage 1 takes from an ancestor: blocks where shapes allow, else embedders and final layer; once in a run."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from fine_dist.core.config import validate
from fine_dist.core.errors import ConfigError
from fine_dist.engine.world import World
from fine_dist.methods.fine import method as fine
from fine_dist.model.artifact import load_artifact, save_artifact
from fine_dist.model.dit import DiT
from fine_dist.stages.carry_over import START, start_from_ancestor
from fine_dist.stages.condense import CondenseStage, run
from fine_dist.stages.settings import CondenseConfig
from tests.conftest import lively, tiny_arch

MIDGET = {"hidden_size": 32, "num_heads": 4, "num_layers": 3, "in_channels": 1, "input_size": 8, "patch_size": 2}


def ancestor(folder: Path, **fields: Any) -> Path:
    model = lively(DiT(tiny_arch(**{**MIDGET, **fields})))
    state: Any = model.state_dict()
    save_artifact(
        folder, kind="model", method={"name": "scratch"}, arch=tiny_arch(**{**MIDGET, **fields}), tensors=state
    )
    return folder


def settings(shards: Path, run_dir: Path, **more: Any) -> CondenseConfig:
    base = {
        "run_dir": str(run_dir), "steps": 2, "batch": 8, "data": {"shards": str(shards / "train")},
        "engine": {"device": "cpu", "log_every": 1, "preview_every": 1000}, "optim": {"lr": 1e-7},
    }  # fmt: skip
    return validate(CondenseConfig, {**base, **more})


def condense(*args: Any, **more: Any) -> Any:
    config = settings(*args, **more)
    return load_artifact(run(config), weights="raw")


def test_an_ancestor_of_the_same_shape_is_decomposed_and_imitated_unless_said_otherwise(digit_shards, tmp_path, capsys):
    where = ancestor(tmp_path / "a")
    stage = CondenseStage(settings(digit_shards, tmp_path / "r", ancestor=str(where)))
    assert (stage.weights.diffusion, stage.weights.output) == (1.0, 1.0)
    assert stage.resolved_method.config.initial == "decompose"
    learngene = condense(digit_shards, tmp_path / "r", ancestor=str(where), method={"name": "fine", "rank": 96})
    said = "ancestor: embedders and final layer copied, block biases copied, block weights decomposed"
    assert said in capsys.readouterr().out
    assert learngene.method["initial"] == "decompose"  # stage 2 knows how it was made
    assert learngene.extra["carried_over"].startswith(said.removeprefix("ancestor: "))
    theirs = load_artifact(where).tensors
    for name in ("label.weight", "final.linear.weight", "blocks.1.qkv.bias"):
        torch.testing.assert_close(learngene.tensors[name], theirs[name], atol=1e-5, rtol=0)  # 2 steps of 1e-7
    u, v = learngene.tensors["genes.in.U"], learngene.tensors["genes.in.V"]
    made = (u * learngene.tensors["blocks.2.in.sigma"]) @ v.T
    assert float((made - theirs["blocks.2.in.weight"]).norm() / theirs["blocks.2.in.weight"].norm()) < 0.01


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_layers": 5}, "ancestor: embedders and final layer copied, blocks random"),
        ({"hidden_size": 48, "num_heads": 4}, "ancestor: no weights copied, the loss alone imitates it"),
    ],
)
def test_an_ancestor_of_another_shape_gives_what_fits_and_the_log_says_so(fields, said, digit_shards, tmp_path, capsys):
    where = ancestor(tmp_path / "a", **fields)
    arch = tiny_arch(**MIDGET).model_dump()
    learngene = condense(digit_shards, tmp_path / "r", ancestor=str(where), arch=arch)
    assert said in capsys.readouterr().out
    assert learngene.method["initial"] == "joint"
    theirs = load_artifact(where).tensors["label.weight"]
    own = learngene.tensors["label.weight"]
    assert (own.shape == theirs.shape and torch.allclose(own, theirs, atol=1e-5)) == ("copied, blocks" in said)


@pytest.mark.parametrize("name", ["tleg", "sws", "kind"])
def test_other_methods_get_the_same_copy_of_what_lies_outside_the_blocks(name, digit_shards, tmp_path):
    where = ancestor(tmp_path / "a")
    method = {"name": name, **({"stages": (1, 2)} if name == "sws" else {})}
    learngene = condense(digit_shards, tmp_path / "r", ancestor=str(where), method=method)
    theirs = load_artifact(where).tensors["final.adaln.weight"]
    torch.testing.assert_close(learngene.tensors["final.adaln.weight"], theirs, atol=1e-5, rtol=0)
    drawn = condense(digit_shards, tmp_path / "s", ancestor=str(where), method=method, shell="scratch")
    assert not drawn.tensors["final.adaln.weight"].abs().max() > 1e-4  # DiT's own start: zero


def test_an_ancestor_of_which_nothing_would_be_used_is_refused(digit_shards, tmp_path):
    where = ancestor(tmp_path / "a")
    unused = {"ancestor": str(where), "shell": "scratch", "loss": {"output": 0}, "method": {"initial": "joint"}}
    with pytest.raises(ConfigError, match=r"would be ignored: .*Set --loss.output 1 to distill from it"):
        run(settings(digit_shards, tmp_path / "r", **unused))


def test_a_decomposition_is_made_once_in_a_run_and_kept(digit_shards, tmp_path, monkeypatch):
    where = ancestor(tmp_path / "a")
    once = condense(digit_shards, tmp_path / "r", ancestor=str(where))

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("the ancestor is decomposed a second time")

    monkeypatch.setattr(fine, "decompose", again)
    longer = condense(digit_shards, tmp_path / "r", ancestor=str(where), steps=4)  # continues from its checkpoint
    assert longer.extra["decomposition_error"] == once.extra["decomposition_error"]
    (tmp_path / "r" / START).unlink()  # and with a checkpoint alone
    condense(digit_shards, tmp_path / "r", ancestor=str(where), steps=6)
    shutil.rmtree(tmp_path / "r" / "checkpoints")
    with pytest.raises(AssertionError, match="a second time"):
        condense(digit_shards, tmp_path / "r", ancestor=str(where), steps=8)


def test_ranks_but_the_first_wait_for_its_decomposition_and_read_no_weights(tmp_path):
    arch = tiny_arch(**MIDGET)
    old, method = lively(DiT(arch)), fine.Fine(fine.FineConfig(initial="decompose"))
    found = [method.condense(arch, old, torch.Generator().manual_seed(0)) for _ in range(2)]
    genes = {name: p.detach().clone() for name, p in found[1].module.named_parameters() if name.startswith("genes.")}

    def start(rank: int) -> None:
        world = World(rank, 2, rank, 2, torch.device("cpu"))
        start_from_ancestor(old, found[rank], method, tmp_path, 0, True, world)

    waiting = threading.Thread(target=start, args=(1,), daemon=True)
    waiting.start()
    waiting.join(timeout=1)
    assert waiting.is_alive()  # nothing to read yet
    start(0)
    waiting.join(timeout=60)
    assert not waiting.is_alive()
    first, second = (dict(start.module.named_parameters()) for start in found)
    assert all(torch.equal(second[name], own) and not torch.equal(first[name], own) for name, own in genes.items())
    assert found[0].report == found[1].report  # the training loop sends the weights themselves
