"""The pages of `--help` and `--help-all`, and completions: short, with examples that run, and no setting missing."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fine_dist.__main__ import CONFIGURED as KINDS
from fine_dist.__main__ import main as fine_dist
from fine_dist.core.arguments import parse
from fine_dist.core.config import Config
from fine_dist.core.help import PAGES, settings
from fine_dist.methods import METHODS, build
from tests.conftest import kind_of

ROOT = Path(__file__).resolve().parents[2]


def helped(command: str, flag: str, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        parse(kind_of(command), [flag], f"fine-dist {command}")
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", KINDS)
def test_help_is_short_and_its_examples_and_settings_exist(command, capsys):
    text, page, kind = helped(command, "--help", capsys), PAGES[command], kind_of(command)
    assert len(text.splitlines()) <= 90
    assert len(page.usual) >= 2 and len(page.examples) == 3
    known = {setting.path for setting in settings(kind)}
    assert set(page.usual) <= known
    for key in page.usual:
        assert f"--{key.replace('_', '-')}" in text

    def own(parser):
        for name in ("--list", "--inspect", "--verify", "--index", "--evaluate"):
            parser.add_argument(name)

    for words in page.examples:
        assert f"fine-dist {command} {words}".rstrip() in text
        parse(kind, [str(ROOT / w) if w.startswith("configs/") else w for w in words.split()], command, options=own)


@pytest.mark.parametrize("command", ["condense", "init"])
def test_help_lists_the_methods_that_can(command, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(f"fine_dist.{command}").main(["--help"])
    text = capsys.readouterr().out
    listed = re.findall(r"^  (\w+) +[A-Z]", text.partition("\nmethods")[2], re.M)
    able = [name for name in METHODS if command == "init" or build(METHODS[name].Config()).traits.condenses]
    assert listed == able


def leaves(kind: type[Config], config: Config | dict, path: str = "") -> list[str]:
    """Keys of a resolved config that hold no group, by their flags."""
    values = config.model_dump() if isinstance(config, Config) else config
    found = []
    for key, value in values.items():
        here = f"{path}{key.replace('_', '-')}"
        found += leaves(kind, value, here + ".") if isinstance(value, dict) and value else [f"--{here}"]
    return found


@pytest.mark.parametrize("command", KINDS)
def test_help_all_has_every_setting(command, capsys):
    text = helped(command, "--help-all", capsys)
    flags = set(re.findall(r"^  (--[\w.-]+)", text, re.M))
    undocumented = [each.path for each in settings(kind_of(command)) if not each.about.partition(" (default")[0]]
    assert not undocumented
    missing = {flag for flag in leaves(kind_of(command), kind_of(command)()) if flag not in flags}
    # groups that are none or empty by default; below
    assert missing <= {"--diffusion", "--domains", "--method", "--stop", "--templates"}
    if command == "init":
        for flag in ("--domains.NAME.data.shards", "--domains.NAME.labels", "--stop.window", "--arch.hidden-size"):
            assert flag in flags
        assert {"--arch", "--method.rank", "--engine.deepspeed.offload-params", "--launch.env"} <= flags


@pytest.mark.parametrize("command", ["-m fine_dist", "-m fine_dist.condense", "-m fine_dist.init"])
@pytest.mark.parametrize("reader", ["head -1", "true"])
def test_help_into_a_reader_that_goes_ends_quietly(command, reader):
    script = f"{shlex.quote(sys.executable)} {command} --help | {reader}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == ""


# --- completions ---------------------------------------------------------------------------------------------------


def test_completions_know_every_flag_of_every_command_and_the_values_of_some(capsys):
    pytest.importorskip("shtab")
    assert fine_dist(["completion", "bash"]) == 0
    text = capsys.readouterr().out
    for command in KINDS:
        for setting in settings(kind_of(command)):
            assert f"--{setting.path.replace('_', '-')}" in text
    assert re.search(r"condense___engine_precision_choices=.*fp32.*bf16", text) and "learngene_pool" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_help_of_completions_says_how_to_use_them(capsys):
    assert fine_dist(["completion", "--help"]) == 0
    assert "source <(fine-dist completion bash)" in capsys.readouterr().out


def test_the_line_of_a_setting_that_several_methods_have_is_the_default_methods(capsys):
    with pytest.raises(SystemExit):
        fine_dist(["condense", "--help"])
    said = capsys.readouterr().out
    assert re.search(r"--method\.rank INT\|none +Components R", said) and "One of the list below" in said


def test_a_shell_without_completions_is_refused_with_those_that_have(capsys):
    assert fine_dist(["completion", "fsh"]) == 2
    assert "legal: bash, tcsh, zsh" in capsys.readouterr().err
