"""A method in one file and one line: it goes from condense to a study, and nothing else is touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

TOYS = '''
"""Three toy methods."""

from __future__ import annotations

from typing import Literal

from fine_dist.methods.base import Condensation, Descent, Method, MethodConfig, Traits


class RepeatConfig(MethodConfig):
    """Blocks of a shallow model, repeated."""

    name: Literal["repeat"] = "repeat"
    """Repeat."""


class Repeat(Method[RepeatConfig]):
    Config, label, paper, summary = RepeatConfig, "repeated", "a toy", "a shallow model's blocks, in turn"
    traits = Traits(parents=("learngene",), varies=frozenset({"depth"}), condenses=True)

    def condense(self, arch, ancestor, generator):
        from fine_dist.model.dit import DiT

        return Condensation(DiT(arch, generator=generator))

    def descend(self, parent, target, generator):
        from fine_dist.model.dit import DiT
        from fine_dist.model.roles import of_role

        model, source = DiT(target, generator=generator), parent.module
        state = {**model.state_dict(), **of_role(source, "shell")}
        for layer in range(target.num_layers):
            block = source.blocks[layer % parent.arch.num_layers].state_dict()
            state |= {f"blocks.{layer}.{name}": tensor for name, tensor in block.items()}
        model.load_state_dict(state)
        return Descent(model)


class BlocksConfig(MethodConfig):
    """As `repeat`, and stage 2 trains whole blocks."""

    name: Literal["blocks"] = "blocks"
    """Blocks."""


class Blocks(Repeat):
    Config, label, paper, summary = BlocksConfig, "blocks", "a toy", "the same, and its blocks train"

    def descend(self, parent, target, generator):
        from fine_dist.model.roles import train_only

        return Descent(train_only(super().descend(parent, target, generator).model, "weight", "bias"), "some")


class WidenConfig(MethodConfig):
    """A dense model, grown in width."""

    name: Literal["widen"] = "widen"
    """Widen."""


class Widen(Method[WidenConfig]):
    Config, label, paper, summary = WidenConfig, "widened", "a toy", "a dense model in the corner of a wider one"
    traits = Traits(parents=("model",), varies=frozenset({"width"}))

    def descend(self, parent, target, generator):
        from fine_dist.model.dit import DiT

        model = DiT(target, generator=generator)
        for name, tensor in parent.artifact.tensors.items():
            own = model.get_parameter(name)
            own.data[tuple(slice(0, size) for size in tensor.shape)] = tensor
        return Descent(model)
'''

DRIVE = """
import json, sys
from pathlib import Path
from fine_dist.core.config import validate
from fine_dist.encode import EncodeConfig, run as encode
from fine_dist.condense import CondenseConfig, run as condense
from fine_dist.init import InitConfig, run as init
from fine_dist.train import TrainConfig, run as train
from fine_dist.study.config import StudyConfig
from fine_dist.study.running import run_study
from fine_dist.artifacts.load import load_model
from fine_dist.model.artifact import load_artifact

root = Path(sys.argv[1])
arch = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "patch_size": 4, "in_channels": 1, "input_size": 8,
        "num_classes": 10, "learn_sigma": False}
encode(EncodeConfig(out=str(root / "data")))
data = {"shards": str(root / "data/train"), "held_out": str(root / "data/held_out")}
engine = {"device": "cpu", "log_every": 1}
base = {"data": data, "batch": 8, "steps": 2, "engine": {**engine, "preview_every": 1000}}
said = {}
for name in ("repeat", "blocks"):
    own = {"run_dir": str(root / name), "arch": arch, "method": {"name": name}}
    folder = condense(validate(CondenseConfig, {**base, **own}))
    family = {"parent": str(folder), "depths": [3], "data": data, "batch": 8, "steps": 2, "engine": engine}
    init(validate(InitConfig, {**family, "run_dir": str(root / f"{name}-init")}))
    target = root / f"{name}-init" / "L3-s0-lr0.01"
    train(validate(TrainConfig, {**base, "run_dir": str(root / f"{name}-train"), "parent": str(target)}))
    before, after = load_artifact(folder).tensors, load_model(target)[0].state_dict()
    said[name] = {
        "kept": bool(before["final.linear.weight"].equal(after["final.linear.weight"])),
        "moved": not before["blocks.0.qkv.weight"].equal(after["blocks.0.qkv.weight"]),
        "trained": load_model(root / f"{name}-train")[0].arch.num_layers,
    }
model = str(root / "repeat-train")
wide = {**arch, "num_layers": 3, "hidden_size": 32}
init(validate(InitConfig, {"parent": model, "method": {"name": "widen"}, "arch": wide, "depths": [3], "data": data,
                           "run_dir": str(root / "widen-init"), "engine": engine}))
said["widen"] = load_model(root / "widen-init" / "L3-s0-lr0.01")[0].arch.hidden_size
stages = {"condense": {"arch": arch, "batch": 8, "engine": {**engine, "eval_every": 1}},
          "init": {"batch": 8, "engine": engine},
          "train": {"arch": arch, "batch": 8, "engine": {**engine, "eval_every": 1}}}
entries = [{"name": "ours", "method": {"name": "blocks"}, "condense": {"steps": 2}, "init": {"steps": 2}, "train": [2]},
           {"name": "scratch", "method": {"name": "scratch"}, "train": [2]}]
study = validate(StudyConfig, {"title": "toys", "run_dir": str(root / "study"), "data": {"data": {"source": "digits"}},
    "depths": [3], "seeds": [0], "steps": {"N": 2}, "stages": stages, "main": "ours", "baseline": "scratch",
    "entries": entries, "features": None, "pictures": 0})
page = run_study(study, "here")
rows = json.loads((page.parent / "results.json").read_text())["measurements"]
said["study"] = {row["method"] for row in rows} == {"ours", "scratch"}
print("SAID " + json.dumps(said))
"""


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the code with the toys in one file, and three lines in the dict of methods."""
    for name in ("fine_dist", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    methods = tmp_path / "fine_dist" / "methods"
    (methods / "toys.py").write_text(TOYS)
    text = (methods / "__init__.py").read_text()
    lines = "".join(f'    "{name.lower()}": ({name}Config, "toys:{name}"),\n' for name in ("Repeat", "Blocks", "Widen"))
    start = "_METHODS: dict[str, tuple[type[MethodConfig], str]] = {\n"
    assert start in text
    text = text.replace(start, start + lines)
    wanted = "from fine_dist.methods.toys import BlocksConfig, RepeatConfig, WidenConfig"
    text = text.replace("\nif TYPE_CHECKING:", f"\n{wanted}\n\nif TYPE_CHECKING:")
    (methods / "__init__.py").write_text(text)
    return tmp_path


def test_toys_go_from_condense_to_a_study_without_another_file_touched(house: Path) -> None:
    (house / "drive.py").write_text(DRIVE)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(house)}
    command = [sys.executable, "drive.py", str(house / "runs")]
    done = subprocess.run(command, cwd=house, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = json.loads(done.stdout.split("SAID ")[1].splitlines()[0])
    assert said["repeat"] == {"kept": True, "moved": False, "trained": 3}  # nothing trains after descending
    assert said["blocks"] == {"kept": True, "moved": True, "trained": 3}  # whole blocks train, the shell does not
    assert said["widen"] == 32 and said["study"]


def installed(folder: Path, line: str) -> dict[str, str]:
    """The environment of a process in which a package of toys is installed, with one entry point."""
    (folder / "toys.py").write_text(TOYS)
    about = folder / "toys-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[fine_dist.methods]\n{line}\n")
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}


def test_a_method_of_another_package_is_listed_and_used_like_a_built_in_one(tmp_path: Path) -> None:
    code = """
from fine_dist.core.config import validate
from fine_dist.methods import METHODS, build
from fine_dist.stages.settings import CondenseConfig
config = validate(CondenseConfig, {"method": {"name": "repeat"}})
print(type(build(config.method)).__module__, "repeat" in METHODS)
"""
    env = installed(tmp_path, "repeat = toys:Repeat")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["toys", "True"], done.stderr
    words = [sys.executable, "-m", "fine_dist.init", "--help"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert "repeat" in done.stdout and "Blocks of a shallow model, repeated." in done.stdout, done.stderr


CONTRACT = """
import toys
from fine_dist.testing import MethodContract

class TestRepeat(MethodContract):
    name = "repeat"
    depths = (2, 6)

def test_a_merge_that_loses_weights_is_found(monkeypatch):
    right = toys.Repeat.merge
    monkeypatch.setattr(toys.Repeat, "merge", lambda self, model: {k: v * 0 for k, v in right(self, model).items()})
    try:
        TestRepeat().test_merging_gives_an_ordinary_model_with_the_same_outputs()
    except AssertionError as error:
        assert "L2" in str(error)
    else:
        raise RuntimeError("nothing was found")
"""


def test_the_contract_is_run_by_the_tests_of_another_package(tmp_path: Path) -> None:
    env = {**installed(tmp_path, "repeat = toys:Repeat"), "OMP_NUM_THREADS": "1"}
    (tmp_path / "test_theirs.py").write_text(CONTRACT)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_theirs.py"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "13 passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize(
    ("line", "words"),
    [("fine = toys:Repeat", "a method of that name exists"), ("repeat = toys:TOYS_PATH", "no attribute")],
)
def test_an_entry_point_that_cannot_serve_is_named(tmp_path: Path, line: str, words: str) -> None:
    env = installed(tmp_path, line)
    done = subprocess.run(
        [sys.executable, "-m", "fine_dist.init", "--help"], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and words in done.stderr
