"""Configs: files, dotted flags over them, and errors that say where, what, and what would be right."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from pydantic import Field

from fine_dist.core.arguments import parse
from fine_dist.core.config import Config, dump_yaml, load, validate
from fine_dist.core.errors import ConfigError
from fine_dist.core.settings import LaunchConfig
from fine_dist.core.yaml_files import parse_yaml, to_yaml
from fine_dist.data.settings import DataConfig
from fine_dist.engine.settings import EngineConfig, OptimConfig
from fine_dist.methods import AnyMethod
from fine_dist.methods.fine.config import FineConfig
from fine_dist.model.arch import Arch

ROOT = Path(__file__).resolve().parents[2]


class Toy(Config):
    """A command's config."""

    arch: Arch = Field(default_factory=Arch)
    """Shape."""
    method: AnyMethod = FineConfig()  # type: ignore[valid-type]
    """Method."""
    optim: OptimConfig = OptimConfig()
    """Optimiser."""
    data: DataConfig = DataConfig()
    """Data."""
    engine: EngineConfig = EngineConfig()
    """Engine."""


def toy(*argv: str) -> Toy:
    return parse(Toy, list(argv), "toy").config


def test_flags_lie_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("optim: {lr: 1e-3, eps: 1e-6}\nmethod: {name: fine, rank: 8}\narch: DiT-S/2-L4\n")
    config = toy("--config", str(file), "--optim.lr", "0.5", "--method.sigma", "random")
    assert (config.optim.lr, config.optim.eps, config.optim.weight_decay) == (0.5, 1e-6, 0.0)
    assert (config.method.rank, config.method.sigma) == (8, "random")
    assert (config.arch.hidden_size, config.arch.num_layers) == (384, 4)


def test_a_flag_may_choose_another_method(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("method: {name: fine, rank: 8}\n")
    assert toy("--config", str(file), "--method.name", "scratch").method.name == "scratch"
    assert toy("--config", str(file), "--method.name=fine").method.rank == 8


def test_what_is_resolved_reloads_equal(tmp_path):
    config = toy("--arch.hidden-size", "64", "--arch.num-heads", "4", "--optim.betas", "0.8", "0.95")
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert load(Toy, tmp_path / "config.yaml") == config
    with pytest.raises(Exception, match="frozen"):
        config.optim.lr = 1.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: {lrr: 1}", ["optim.lrr", "1", "did you mean 'lr'", "weight_decay"]),
        ("optmi: {lr: 1}", ["optmi", "did you mean 'optim'"]),
        ("method: {name: fine, rnk: 3}", ["method.rnk", "did you mean 'rank'"]),
        ("method: {name: fien}", ["method", "fien", "'fine'"]),
        ("method: {name: fine, rank: 0}", ["method.rank", "greater than or equal to 1", "0"]),
        ("optim: {lr: fast}", ["optim.lr", "number", "'fast'"]),
        ("engine: {deepspeed: {stage: 7}}", ["engine.deepspeed.stage", "0, 1, 2 or 3", "7"]),
        ("arch: {hidden_size: 64, num_heads: 5}", ["arch", "num_heads 5 does not divide hidden_size 64"]),
        ("arch: DiT-Q/2", ["arch", "DiT-Q/2"]),
        ("- a\n- b", ["a mapping"]),
        ("a: [", ["not YAML", "line 1"]),
        ("optim: {lr: 1, eps: 1, lr: 2}", ["key 'lr' is given twice", "line 1"]),
        ("steps: 1\nbatch: 2\nsteps: 3", ["key 'steps' is given twice, first in line 1", "line 3"]),
        ("a: " + "[" * 5000, ["too deep"]),
        ("a: " + "9" * 5000, ["not YAML"]),
        ("a: !!python/object/apply:os.mkdir [executed]", ["not YAML", "could not determine a constructor"]),
        ("arch: {num_layers: 1000000}", ["arch.num_layers", "less than or equal to 1000"]),
        ("arch: {hidden_size: 1000000000000}", ["arch.hidden_size", "less than or equal to 65536"]),
        ("arch: {name: 3}", ["arch", "a name such as DiT-B/2-L6"]),
        ("optim: 3", ["optim: a mapping of keys to values is needed (got 3); legal keys: lr, betas"]),
        ("method: {name: [fine]}", ["method.name", "['fine']"]),
        ("optim: {lr: .inf}", ["optim.lr", "finite number"]),
        ("1: 2", ["1: keys should be strings (got 1)"]),
    ],
)
def test_a_wrong_file_is_answered_with_path_value_and_what_would_be_right(text, words, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        toy("--config", str(file))
    for word in [*words, str(file)]:
        assert word in str(caught.value)


@pytest.mark.parametrize("content", [b"\x80\x02}q\x00.", bytes(range(256)), b"\xff\xfe\x00\x00", b"\0" * 10])
def test_a_file_that_is_no_text_is_refused_as_that(content, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"not text|not YAML") as caught:
        toy("--config", str(file))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_too_large_for_a_config_is_not_read(tmp_path):
    with open(tmp_path / "tensors.bin", "wb") as stream:
        stream.truncate(10 * 2**30)  # no byte of it is on the disk
    with pytest.raises(ConfigError, match="larger than 4 MiB"):
        toy("--config", str(tmp_path / "tensors.bin"))


def test_a_value_that_is_millions_of_others_is_cut_short_in_the_message(tmp_path):
    layers = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    layers += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (tmp_path / "c.yaml").write_text("\n".join([*layers, "optim: *a11"]))
    with pytest.raises(ConfigError, match="optim: a mapping of keys to values is needed") as caught:
        toy("--config", str(tmp_path / "c.yaml"))
    assert len(str(caught.value)) < 100_000


def test_depths_that_no_model_has_are_refused_at_once(capsys, tmp_path):
    from fine_dist.init import main

    started = time.monotonic()
    for depth in ("100000", "1000000"):
        assert (
            main(
                [
                    "--depths",
                    depth,
                    "--run-dir",
                    str(tmp_path),
                    "--dry-run",
                    "--method.name",
                    "scratch",
                    "--arch",
                    "DiT-B/2",
                ]
            )
            == 2
        )
        said = capsys.readouterr().err
        assert "less than or equal to 1000" in said and f"(got {depth})" in said
    assert time.monotonic() - started < 20


def test_every_mistake_of_a_file_is_named_at_once(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("optim: {lr: -1, epss: 1}\nengine: {keep_checkpoints: 0}\n")
    with pytest.raises(ConfigError) as caught:
        toy("--config", str(file))
    assert all(path in str(caught.value) for path in ("optim.lr", "optim.epss", "engine.keep_checkpoints"))


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--optim.lrr", "1"], "optim.lrr: unknown key"),
        (["--optim.lr", "fast"], "optim.lr: input"),
        (["--method.sigma", "lin"], "linear"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--method.name", "scratsh"], "'scratch'"),
        (["--method.rank", "0"], "rank"),
    ],
)
def test_a_wrong_flag_ends_with_code_2_and_no_traceback(argv, word):
    code = "import sys; from tests.core.test_config import toy; from fine_dist.core.errors import guard; "
    code += "sys.exit(guard(lambda: toy(*sys.argv[1:]) and 0))"
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_numbers_may_be_written_as_people_write_them(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("optim: {lr: 1e-4}\n")
    assert yaml.safe_load("lr: 1e-4")["lr"] == "1e-4"  # what the plain loader makes of it
    assert toy("--config", str(file)).optim.lr == 1e-4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("24:00:00", "24:00:00"), ("off", "off"), ("yes", "yes"), ("010", 10), ("0o17", 15), ("0x1f", 31), ("+5", 5),
        ("1_000", "1_000"), ("1e-4", 1e-4), ("5.", 5.0), (".5", 0.5), ("-.inf", -float("inf")), ("~", None),
        ("", None), ("True", True), ("false", False), ("2001-12-14", "2001-12-14"), ("'1e3'", "1e3"), (".", "."),
    ],
)  # fmt: skip
def test_yaml_is_that_of_version_1_2(text, value):
    found = parse_yaml(f"a: {text}", "here")["a"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("value", ["24:00:00", "off", "010", "1e-4", "0o17", "1_000", "~", "", "=", "é", 1e-8, -0.0, 7])
def test_what_is_written_is_read_alike_by_both_versions_of_yaml(value):
    text = to_yaml({"a": value})
    assert parse_yaml(text, "here") == {"a": value} == yaml.safe_load(text)


def test_times_and_words_of_a_config_are_what_was_typed(tmp_path):
    """What version 1.1 of YAML makes of them: 60 days, false, 8 and a number where a text belongs."""
    with pytest.raises(ConfigError, match=r"launch\.minutes.*24:00:00"):
        validate(Launched, parse_yaml("launch: {minutes: 24:00:00}", "here"))
    found = validate(Launched, parse_yaml("launch: {preflight: off, minutes: 010}", "here")).launch
    assert (found.preflight, found.minutes) == ("off", 10)
    text = "launch: {env: {OMP_NUM_THREADS: 4, DEBUG: true, SHARE: 0.5}, slurm: {time: 24:00:00, nice: 100}}"
    found = validate(Launched, parse_yaml(text, "here")).launch
    assert found.env == {"OMP_NUM_THREADS": "4", "DEBUG": "true", "SHARE": "0.5"}
    assert found.slurm == {"time": "24:00:00", "nice": "100"}
    with pytest.raises(ConfigError, match=r"launch\.env.*'A=B' is no name of an environment variable"):
        validate(Launched, {"launch": {"env": {"A=B": "1"}}})


class Launched(Config):
    """A config with what a job needs."""

    launch: LaunchConfig = LaunchConfig()
    """What a job needs."""


@pytest.mark.parametrize("word", ["a\0b", "a\udcffb"])
@pytest.mark.parametrize(
    "wrap", [lambda word: word, lambda word: [word], lambda word: {word: 1}, lambda word: {"a": word}]
)
def test_letters_that_no_file_can_hold_are_refused_with_their_key(word, wrap):
    with pytest.raises(ConfigError, match=r"data\b.*: .*(NUL|UTF-8)"):
        validate(Toy, {"data": wrap(word)})


def test_a_config_that_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, words in (
        (tmp_path / "pipe.yaml", "is a named pipe"),
        ("/dev/zero", "is a device"),
        (tmp_path, "irectory"),
    ):
        with pytest.raises(ConfigError, match=words):
            toy("--config", str(path))
    with pytest.raises(ConfigError, match="null byte"):
        toy("--config", "a\0b")


def test_a_value_error_of_a_config_names_its_place():
    with pytest.raises(ConfigError, match=r"arch: patch_size 3 does not divide input_size 32"):
        validate(Toy, {"arch": {"patch_size": 3}})
