"""What commands print: the remedies in their messages work, and every way of ending is one line."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
import yaml

from fine_dist.__main__ import CONFIGURED
from fine_dist.core.arguments import parse
from fine_dist.core.config import load, validate
from fine_dist.core.errors import guard
from fine_dist.core.help import settings
from fine_dist.launchers.worker import import_module
from fine_dist.plan import ONLY_WITH_SCALE
from tests.conftest import kind_of
from tests.data.making import make_foreign, sample

ROOT = Path(__file__).resolve().parents[2]
KINDS = CONFIGURED


def run(command: str, argv: list[str], capsys) -> tuple[int, str]:
    code = importlib.import_module("fine_dist." + command.replace("-", "_")).main(argv)
    said = capsys.readouterr()
    return code, said.err or said.out


@pytest.mark.parametrize(
    ("command", "argv", "words"),
    [
        ("init", "--dry-run --parent nowhere --depths 2 4 6 --seeds {seeds}", ""),
        ("encode", "--dry-run", ""),
        ("condense", "--dry-run --method.initial decompose", "{tmp}"),
        ("evaluate", "--launcher here", "{tmp}"),
        ("sample", "--launcher here", "{tmp}"),
        ("export", "", "{tmp}"),
    ],
)
def test_the_flags_that_a_message_tells_to_add_are_what_it_takes(command, argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = argv.format(seeds=" ".join(map(str, range(101)))).split()
    code, said = run(command, argv, capsys)
    if command == "condense" and code == 0:
        code, said = run(command, [*argv[1:], "--launcher", "here"], capsys)
    assert code == 2, said
    told = re.findall(r"(--[a-z][\w.-]*)(?: ([\w/.]+))?", said)
    assert told, said
    more = []
    for flag, value in told:
        more += [flag] if value == "to" else [flag, str(tmp_path) if value in ("", "FOLDER", "and") else value]
    again, then = run(command, [*argv, *more], capsys)
    assert "command line" not in then, then
    assert again == 0 or (again == 2 and then != said), then


def test_shards_are_made_by_following_what_the_messages_say(tmp_path, capsys, monkeypatch):
    """From a folder that is not there to shards, by nothing but the commands that are printed."""
    monkeypatch.chdir(tmp_path)
    code, said = run("encode", ["--inspect", "data/digits/train"], capsys)
    assert code == 2
    module = re.search(r"`fine-dist (\w+)`", said)
    assert module is not None
    code, said = run(module[1], ["--launcher", "here"], capsys)
    assert code == 2
    told = re.search(r"for example (--out [\w/]+)", said)
    assert told is not None
    assert run("encode", [*told[1].split(), "--launcher", "here"], capsys)[0] == 0
    assert run("encode", ["--inspect", "data/digits/train"], capsys)[0] == 0


def test_a_manifest_is_written_by_the_command_that_its_absence_or_damage_prints(tmp_path, capsys):
    make_foreign(tmp_path / "d", [[sample(i) for i in range(4)]], manifest=False)
    for damage in (None, "[]"):
        if damage:
            (tmp_path / "d" / "manifest.json").write_text(damage)
        code, said = run("encode", ["--inspect", str(tmp_path / "d")], capsys)
        told = re.search(r"`fine-dist encode (--index .*?)`", said)
        assert code == 2 and told is not None
        filled = {"FOLDER": str(tmp_path / "d"), "N": "10", "F": "0.5"}
        assert run("encode", [filled.get(word, word) for word in told[1].split()], capsys)[0] == 0
        assert run("encode", ["--verify", str(tmp_path / "d")], capsys)[0] == 0


def test_every_flag_in_a_message_is_one_that_some_command_has():
    known = {
        "--help",
        "--help-all",
        "--config",
        "--dry-run",
        "--launcher",
        "--list",
        "--inspect",
        "--verify",
        "--index",
    }
    known |= {"--stage", "--rate", "--json", "--watch", "--all", "--for", "--template"}  # of plan, status and study
    known |= {"--scale", *ONLY_WITH_SCALE}  # of plan
    known |= {"--evaluate", "--images", "--clip", "--set", "--pty"}  # of creative and benchmark
    for command in KINDS:
        known |= {f"--{setting.path.replace('_', '-')}" for setting in settings(kind_of(command))}
    for path in [*(ROOT / "fine_dist").rglob("*.py"), *(ROOT / "launchers").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Raise):
                continue
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9._-]*[a-z0-9]", part.value):
                        assert flag in known, f"{path}:{part.lineno}: {flag}"


def test_published_configs_say_the_same_by_file_and_by_flags():
    """Every key of every published config, given as flags, resolves to what the file does."""
    for path in sorted((ROOT / "configs").glob("*/*.yaml")):
        if path.parent.name not in KINDS:
            continue  # a table of runs is a file, no list of flags
        command = path.parent.name
        kind, words = kind_of(command), []
        for key, value in flat(yaml.safe_load(path.read_text())):
            words += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
        assert parse(kind, words, command).config == load(kind, path), path


def flat(values: dict, path: str = "") -> list[tuple[str, object]]:
    return [
        pair
        for key, value in values.items()
        for pair in (flat(value, f"{path}{key}.") if isinstance(value, dict) else [(path + key, value)])
    ]


# --- how a command ends --------------------------------------------------------------------------------------------


def raising(error: BaseException):
    def body() -> int:
        raise error

    return body


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("status", "run_dir"),
        ("status somewhere --jsn", "did you mean '--json'?"),
        ("plan --scale x", "--scale: invalid int value: 'x'"),
        ("plan --zero 1 --stage train", "--zero: needs --scale P"),
        ("plan", ""),
        ("init-project", "DIR"),
    ],
)
def test_commands_without_settings_speak_as_the_others_do(argv, words, capsys):
    module, *rest = argv.split()
    code, said = ended(module, rest, capsys)
    if words:
        assert code == 2 and said.startswith("error: ") and words in said and said.count("\n") == 1, said
    for flag in ("--help", "--help-all"):
        code, said = ended(module, [flag], capsys)
        assert code == 0 and said.startswith(f"usage: fine-dist {module} "), said
        assert ("--bandwidth" in said) == (module == "plan" and flag == "--help-all")


def ended(command: str, argv: list[str], capsys) -> tuple[int, str]:
    try:
        return run(command, argv, capsys)
    except SystemExit as stop:
        return int(stop.code or 0), capsys.readouterr().out


@pytest.mark.parametrize("argv", ["", "prepare", "spread", "spred x", "prepare a b --help", "spread a b c", "--spread"])
def test_submit_without_a_verb_it_has_is_one_line(argv, capsys):
    code, said = run("submit", argv.split(), capsys)
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said


@pytest.mark.parametrize("command", [name for name in KINDS if name not in ("demo", "export", "doctor", "init")])
def test_every_command_ends_by_saying_the_next_one_and_its_flags_exist(command):
    values = {"models": ["m"]} if command == "evaluate" else {}
    lines = import_module(f"fine_dist.{command}").result_lines(validate(kind_of(command), values | OF.get(command, {})))
    last = lines[-1].split()
    assert last[:2] == ["next:", "fine-dist"]
    flags = {f"--{setting.path.replace('_', '-')}" for setting in settings(kind_of(last[2]))} | {"--evaluate", "--list"}
    assert {word for word in last[3:] if word.startswith("--")} <= flags


OF = {"encode": {"out": "data/x"}, "sample": {"model": "m"}, "condense": {"run_dir": "r"}, "train": {"run_dir": "r"}}


def test_ctrl_c_promises_only_what_the_command_says(capsys):
    for promise, said in (("", "interrupted\n"), ("all is kept", "interrupted; all is kept\n")):
        assert guard(raising(KeyboardInterrupt()), promise) == 130
        assert capsys.readouterr().err == said
        assert guard(raising(KeyboardInterrupt()), lambda promise=promise: promise) == 130
        assert capsys.readouterr().err == said


def test_a_pipe_that_breaks_elsewhere_is_not_taken_for_a_reader_that_has_gone():
    with pytest.raises(BrokenPipeError):
        guard(raising(BrokenPipeError(32, "a worker is gone")))


def test_memory_that_is_not_there_is_one_line(capsys):
    assert guard(raising(MemoryError("Unable to allocate 6.94 EiB"))) == 2
    assert capsys.readouterr().err.startswith("error: not enough memory: Unable to allocate 6.94 EiB;")
