"""The command line: flags are the file's keys in the file's words, help is short and whole, remedies work."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from fine_dist.__main__ import CONFIGURED
from fine_dist.core.arguments import parse
from fine_dist.core.config import load
from fine_dist.core.errors import ConfigError
from fine_dist.core.help import settings
from fine_dist.family.config import InitConfig
from tests.conftest import kind_of
from tests.core.test_config import Toy

ROOT = Path(__file__).resolve().parents[2]
KINDS = CONFIGURED


def init(*argv: str) -> InitConfig:
    return parse(InitConfig, list(argv), "fine-dist init").config


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        ("--depths 2 4 6", "depths", (2, 4, 6)),
        ("--depths=[2,4]", "depths", (2, 4)),
        ("--lrs 1e-3 3e-2", "lrs", (1e-3, 3e-2)),
        ("--only", "only", ()),
        ("--yes", "yes", True),
        ("--yes True", "yes", True),
        ("--yes false", "yes", False),
        ("--no-yes", "yes", False),
        ("--launch.wait", "launch.wait", True),
        ("--no-launch.snapshot", "launch.snapshot", False),
        ("--launch.no-snapshot", "launch.snapshot", False),
        ("--engine.threads none", "engine.threads", None),
        ("--engine.activation-checkpointing none", "engine.activation_checkpointing", "none"),
        ("--engine.deepspeed.stage 3", "engine.deepspeed.stage", 3),
        ("--optim.lr=-0 --optim.lr 1e-4", "optim.lr", 1e-4),
        ("--optim.betas 0.8 0.95", "optim.betas", (0.8, 0.95)),
        ("--parent 123", "parent", "123"),
        ("--parent none", "parent", None),
        ("--launch.env A=1 B=x=y", "launch.env", {"A": "1", "B": "x=y"}),
        ("--launch.env A 1 B 2", "launch.env", {"A": "1", "B": "2"}),
        ("--launch.env.A_b-c 1", "launch.env", {"A_b-c": "1"}),
        ("--stop '{window: 2}'", "stop.window", 2),
        ("--stop.window 2", "stop.window", 2),
        ("--domains.my-web.data.shards x", "domains", "my-web"),
        ("--method.name fine --method.rank 8", "method.rank", 8),
        ("--method.rank 8 --method.name fine", "method.rank", 8),
        ("--arch DiT-S/2 --arch.num-classes 10", "arch.hidden_size", 384),
        ("--arch.num-classes 10 --arch DiT-S/2", "arch.num_classes", 10),
        ("--arch.name DiT-S/2 --arch.num-classes 10", "arch.hidden_size", 384),
        ("--arch.hidden-size 64 --arch.num-heads 4", "arch.hidden_size", 64),
    ],
)
def test_values_are_written_as_people_write_them(argv, key, value):
    found = init(*shlex.split(argv))
    for part in key.split("."):
        found = getattr(found, part)
    assert (value in found) if key == "domains" else found == value


def test_flags_lie_over_what_the_file_says_key_by_key(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("arch: DiT-S/2\nlaunch: {env: {A: '1', B: '2'}}\nmethod: {name: fine, rank: 4, sweeps: 7}\n")
    config = init("--config", str(file), "--arch.num-classes", "7", "--launch.env", "B=3", "--method.rank", "9")
    assert (config.arch.hidden_size, config.arch.num_classes) == (384, 7)
    assert config.launch.env == {"A": "1", "B": "3"}
    assert (config.method.rank, config.method.sweeps) == (9, 7)


def test_a_group_keeps_its_own_defaults_where_only_some_of_its_keys_are_given(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("optim: {eps: 1e-6}\nengine: {log_every: 5}\n")
    for config in (load(InitConfig, file), init("--optim.eps", "1e-6", "--engine.log-every", "5")):
        assert (config.optim.lr, config.optim.eps) == (1e-2, 1e-6)  # sigma's own rate, not that of all weights
        assert (config.engine.checkpoint_every, config.engine.log_every) == (100, 5)
    assert Toy.model_validate({"method": {"rank": 3}}).method.rank == 3


PATHS = {
    *("run_dir", "shards", "held_out", "out", "source", "vae", "model", "parent", "ancestor", "learngene", "reference"),
    *("inception", "dinov2", "classifier", "extra", "concepts", "pairs", "models", "compare", "encoders", "baselines"),
}


@pytest.mark.parametrize("command", KINDS)
def test_home_and_variables_are_expanded_in_every_key_that_is_a_path(command, monkeypatch):
    monkeypatch.setenv("MODELS", "/m")
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.delenv("NOT_SET_HERE", raising=False)  # it may be set where the job runs
    kind, found = kind_of(command), 0
    for setting in settings(kind):
        if setting.path.rpartition(".")[2] not in PATHS or "TEXT" not in setting.shape or "NAME" in setting.path:
            continue
        for word, path in (("$MODELS/a", "/m/a"), ("~/a", "/h/a"), ("$NOT_SET_HERE/a", "$NOT_SET_HERE/a")):
            value = parse(kind, [f"--{setting.path.replace('_', '-')}", word], command).config
            for part in setting.path.split("."):
                value = getattr(value, part)
            assert value in (path, (path,)), setting.path
        found += 1
    assert found


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ("--optim.lr abc", "optim: {lr: abc}"),
        ("--optim.lr -1", "optim: {lr: -1}"),
        ("--optim.lr nan", "optim: {lr: nan}"),
        ("--optim.lr .inf", "optim: {lr: .inf}"),
        ("--optim.lrr 1", "optim: {lrr: 1}"),
        ("--optim.lr.deep 1", "optim: {lr: {deep: 1}}"),
        ("--optim 3x", "optim: 3x"),
        ("--optim.betas 0.9", "optim: {betas: [0.9]}"),
        ("--optim.betas 0.9 high", "optim: {betas: [0.9, high]}"),
        ("--engine.compile maybe", "engine: {compile: maybe}"),
        ("--engine.deepspeed.stage 7", "engine: {deepspeed: {stage: 7}}"),
        ("--engine.precision fp8", "engine: {precision: fp8}"),
        ("--engine.micro-batch 0.5", "engine: {micro_batch: 0.5}"),
        ("--method.name fien", "method: {name: fien}"),
        ("--method.rank 0", "method: {rank: 0}"),
        ("--method.rnk 3", "method: {rnk: 3}"),
        ("--arch DiT-Q/2", "arch: DiT-Q/2"),
        ("--arch.num-heads 5", "arch: {num_heads: 5}"),
        ("--arch.num-layers 1000000", "arch: {num_layers: 1000000}"),
    ],
)
def test_an_error_of_a_flag_is_worded_as_the_same_error_in_yaml(argv, text, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    said = []
    for words in (["--config", str(file)], argv.split()):
        with pytest.raises(ConfigError) as caught:
            parse(Toy, words, "toy")
        said.append(str(caught.value))
    in_file, by_flag = said
    assert in_file.removeprefix(f"{file}: ") == by_flag.removeprefix("command line: ")
    assert in_file.startswith(str(file)) and by_flag.startswith("command line: ")
    for text in said:
        assert "\n" not in text and "http" not in text and "pydantic" not in text and "│" not in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--lrr 1", "lrr: unknown key (value 1)"),
        ("--dry-rn", "did you mean 'dry-run'?"),
        ("--optim.lr", "optim.lr: a value is needed after --optim.lr"),
        ("--optim.lr 1 2", "optim.lr: one value is needed (got 2: 1 2)"),
        ("stray", "'stray' belongs to no setting"),
        ("--optim.lr=1 2", "'2' after --optim.lr=1 belongs to no setting"),
        ("--config", "--config: a value is needed after it"),
        ("--no-engine.compile yes", "--no-engine.compile takes no value"),
        ("--method.name scratsh", "no variant is called 'scratsh'; did you mean 'scratch'? legal: "),
    ],
)
def test_a_flag_that_cannot_be_meant_is_one_line(argv, words):
    with pytest.raises(ConfigError) as caught:
        parse(Toy, argv.split(), "toy")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_errors_of_the_file_and_of_flags_are_told_apart(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("optim: {eps: -1}\n")
    with pytest.raises(ConfigError) as caught:
        parse(Toy, ["--config", str(file), "--optim.lr", "abc"], "toy")
    lines = sorted(line.strip().partition(": input")[0] for line in str(caught.value).splitlines())
    assert lines == sorted([f"{file}: optim.eps", "command line: optim.lr"])
