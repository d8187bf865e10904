"""Whatever a user hands in, there is an answer in words: never a traceback, and nothing in a file is ever executed.

Bounded and seeded: the same examples at every run (`derandomize`), a few hundred in all. `make fuzz` (FINE_DIST_FUZZ=N)
tries N times as many, other ones each time, and counts them for docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fine_dist.__main__ import CONFIGURED
from fine_dist.core.arguments import parse
from fine_dist.core.errors import ArtifactError, ConfigError, DataError
from fine_dist.core.help import Setting
from fine_dist.core.help import settings as settings_of
from fine_dist.data.manifest import Manifest
from fine_dist.data.stream import read_all
from fine_dist.encode import EncodeConfig
from fine_dist.encode import main as encode_main
from fine_dist.family.config import InitConfig
from fine_dist.launchers.worker import config_class, import_module
from fine_dist.model.artifact import load_artifact, save_artifact
from fine_dist.model.factors import FactoredDiT
from tests.conftest import lively, tiny_arch
from tests.core.test_config import Toy
from tests.data.making import SHAPE, make, make_foreign, npy, sample
from tests.fuzzing import TIMES, Trap, answered, changed, damaged, fuzz, nothing_is_executed, trees  # noqa: F401 - a fixture

KINDS = (Toy, InitConfig, EncodeConfig)

# --- configs and flags ---------------------------------------------------------------------------------------------

YAMLS = (
    "optim: {lr: 1e-3, betas: [0.9, 0.95]}\nmethod: {name: fine, rank: 8}\narch: {name: DiT-S/2, num_classes: 3}\n",
    "depths: [2, 4]\nstop: {window: 5}\ndomains: {a: {data: {shards: x}, labels: new}}\nlaunch: {env: {A: b}}\n",
    "x: &x {lr: 1}\noptim:\n  <<: *x\n  eps: 2e-8\nengine: {time_limit_min: 3.5, deepspeed: {stage: 2}}\n",
    "a: !!python/object/apply:os.mkdir [executed]\nb: !!binary aGk=\nc: !!timestamp 2001-12-14\n",
)


@fuzz(150)
@given(
    st.one_of(
        st.sampled_from(YAMLS).flatmap(lambda text: damaged(text.encode())),
        trees.map(lambda tree: yaml.safe_dump(tree).encode()),
        st.sampled_from(YAMLS[:2]).flatmap(lambda t: changed(yaml.safe_load(t))).map(lambda t: json.dumps(t).encode()),
        st.binary(max_size=60),
        st.just(pickle.dumps(Trap())),
    ),
    st.sampled_from(KINDS),
)
def test_any_file_as_a_config_is_a_config_or_one_message(content, kind):
    Path("c.yaml").write_bytes(content)
    answered(lambda: parse(kind, ["--config", "c.yaml"], "toy") and None)


FLAGS = [
    *sorted({f"--{s.path.replace('_', '-')}" for kind in KINDS for s in settings_of(kind)}),
    "--config", "--dry-run", "--launcher", "--method.name", "--domains.a.data.shards", "--no-yes", "--launch.env.A",
]  # fmt: skip


@fuzz(150)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(FLAGS),
            st.sampled_from(["1", "-1", "none", "true", "A=1", "[", "{a: 1}", "!!python/name:os.system", "&a [*a]"]),
            st.text(max_size=8),
            st.builds(lambda flag, word: f"{flag}={word}", st.sampled_from(FLAGS), st.text(max_size=5)),
        ),
        max_size=6,
    ),
    st.sampled_from(KINDS),
)
def test_any_words_as_flags_are_a_config_or_one_message(argv, kind):
    answered(lambda: parse(kind, argv, "toy") and None)


EDGES = (
    "-1", "0", "1", "1e12", "1" + "0" * 30, "nan", ".inf", "-.inf", "\u0661\u0662", "\uff11", "1_0", "", " ", "0x10",
    "0o17", "1e400",
    "true", "none", "9" * 5000, "[1, 2]", "{a: 1}", "x" * 10_000, "." * 10_000, "a\0b", "\udcff",
)  # fmt: skip


def every_setting() -> dict[str, list[Setting]]:
    """Command -> its settings, those that commands share at the first of them."""
    seen: set[tuple[str, str]] = set()
    found: dict[str, list[Setting]] = {}
    for command in CONFIGURED:
        own = list(settings_of(config_class(import_module(f"fine_dist.{command}"))))
        found[command] = [setting for setting in own if (setting.path, setting.about) not in seen]
        seen |= {(setting.path, setting.about) for setting in own}
    return found


@pytest.mark.parametrize("command", CONFIGURED)
def test_every_setting_of_every_command_answers_every_edge(command):
    kind = config_class(import_module(f"fine_dist.{command}"))
    for setting in every_setting()[command]:
        for value in EDGES if TIMES > 1 or "INT" in setting.shape or "NUMBER" in setting.shape else EDGES[-6:]:
            flag = f"--{setting.path.replace('_', '-')}={value}"
            answered(lambda flag=flag: parse(kind, [flag], command) and None)


UNBOUNDED = {
    *("seed", "seeds", "split_seed", "tune_seed", "projection_seed", "cache_bytes", "budget", "classes", "layers"),
    *("table", "deploy", "limit", "num_classes", "guidance_channels", "window", "shard_samples"),
}
"""Whole numbers that are no sizes of anything that is made: larger ones than there are cost nothing."""


@pytest.mark.parametrize("command", CONFIGURED)
def test_a_count_that_no_machine_holds_is_refused_by_every_command_and_so_by_its_dry_run(command):
    kind = config_class(import_module(f"fine_dist.{command}"))
    for setting in every_setting()[command]:
        words = setting.shape.replace("|none", "").replace("|auto", "")
        if words not in ("INT", "INT ...") or setting.path.rpartition(".")[2] in UNBOUNDED:
            continue
        with pytest.raises(ConfigError, match=r"less than or equal to|legal"):
            parse(kind, [f"--{setting.path.replace('_', '-')}", "1000000000000"], command)


@pytest.mark.parametrize("pattern", [
    "d/{000000..999999999}.tar", "d/{0..9999}{0..9999}.tar", "d/{" + "9" * 40 + "..1}.tar",
    "d/" + "{a,b}" * 40 + ".tar",
    "{a,{b,c}}.tar", "d/{..}.tar", "d/{1..2", "d/}{.tar", "{0..5..0}.tar",
])  # fmt: skip
def test_brace_patterns_are_counted_before_they_are_expanded(pattern):
    said = answered(lambda: encode_main(["--inspect", pattern]))
    assert said.startswith("error: ")
    said = answered(lambda: encode_main(["--source", pattern, "--out", "o", "--launcher", "here"]))
    assert said.startswith("error: ")


# --- shards --------------------------------------------------------------------------------------------------------


def looked_at(folder: Path) -> None:
    """Everything that reads shards: inspecting, checking, reading."""
    answered(lambda: encode_main(["--inspect", str(folder)]))
    answered(lambda: encode_main(["--verify", str(folder)]))
    with contextlib.suppress(DataError):
        read_all(str(folder))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Shards of ours, of another program, and an artifact, all sound."""
    root = tmp_path_factory.mktemp("sound")
    make(root / "ours", [5, 9])
    make_foreign(root / "foreign", [[sample(i) for i in range(6)], [sample(i) for i in range(6, 12)]])
    model = lively(FactoredDiT(tiny_arch(num_layers=1), 4))
    save_artifact(
        root / "gene",
        kind="learngene",
        method={"name": "fine", "rank": 4},
        arch=model.arch,
        tensors=model.state_dict(),
        extra={"losses": {"a": 1.0}},
    )
    return root


@fuzz(60)
@given(st.data())
def test_any_manifest_of_shards_is_read_or_refused_in_words(sound, data):
    for name in ("ours", "foreign"):
        copied(sound / name, "d")
        path = Path("d/manifest.json")
        text = path.read_text()
        if data.draw(st.booleans()):
            path.write_text(json.dumps(data.draw(changed(json.loads(text)))))
        else:
            path.write_bytes(data.draw(damaged(text.encode())))
        looked_at(Path("d"))


def copied(folder: Path, to: str) -> None:
    """A fresh copy; one that an earlier example left is gone."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)


def rewritten(folder: Path, name: str, content: bytes) -> None:
    """Put bytes into a shard and let the manifest agree with them, so that the content itself is looked at."""
    (folder / name).write_bytes(content)
    path = folder / "manifest.json"
    manifest = Manifest.parse(path.read_bytes(), "")
    digest = hashlib.sha256(content).hexdigest()
    shards = tuple(
        s.model_copy(update={"bytes": len(content), "sha256": digest}) if s.name == name else s for s in manifest.shards
    )
    manifest.model_copy(update={"shards": shards}).save(folder)


@fuzz(50)
@given(st.data())
def test_any_damage_to_a_tar_is_seen_or_harmless(sound, data):
    for name, shard in (("ours", "latents-000001.tar"), ("foreign", "other-1.tar")):
        copied(sound / name, "d")
        rewritten(Path("d"), shard, data.draw(damaged((sound / name / shard).read_bytes())))
        looked_at(Path("d"))
        Path("d/manifest.json").unlink()
        answered(lambda: encode_main(["--index", "d"]))


def test_a_tar_of_another_program_with_fewer_samples_than_its_manifest_says_is_refused(sound):
    copied(sound / "foreign", "d")
    rewritten(Path("d"), "other-1.tar", b"\0" * 10_240)
    said = answered(lambda: encode_main(["--inspect", "d"]))
    assert said.startswith("error: ") and "the manifest says 6 samples; it has 0" in said
    looked_at(Path("d"))


npys = st.one_of(
    st.just(npy(np.zeros(SHAPE, np.float16))),
    st.just(npy(np.array([Trap()], object), allow_pickle=True)),
    st.just(pickle.dumps(Trap())),
    st.text(max_size=200).map(lambda t: b"\x93NUMPY\x01\0" + len(t.encode()).to_bytes(2, "little") + t.encode()),
    st.builds(
        lambda shape, descr: (
            header := f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}}}".encode(),
            b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header + b"\0" * 32,
        )[1],
        st.tuples(st.integers(-(2**70), 2**70), st.integers(0, 8), st.integers(0, 8)) | st.just(()) | st.just((1.5,)),
        st.sampled_from(["<f2", "<f4", ">f2", "|O", "<U9", "f16", "V99999", "nonsense", "<M8[ns]", "i4,f4", 7, None]),
    ),
    st.just(b"\x93NUMPY\x01\0\x80\x02" + b"(" * 640),
    st.binary(max_size=40),
)


@fuzz(60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "../a", "/etc/a", "x/y", ".", "é"]),
            st.sampled_from(["latent.npy", "cls", "pkl", "pt", "pyd", "LATENT.npy", ""]),
            npys | st.sampled_from([b"1", b"-1", b"", b"9" * 5000, b"\xff", b"1e3", b" 2\n"]),
            st.dictionaries(st.sampled_from(["size", "path", "mtime", "é"]), st.text(max_size=9), max_size=2),
        ),
        max_size=6,
    )
)
def test_any_entries_of_a_tar_are_indexed_or_refused_in_words(entries):
    shutil.rmtree("d", ignore_errors=True)
    Path("d").mkdir()
    with tarfile.open("d/x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for stem, ending, content, pax in entries:
            info = tarfile.TarInfo(f"{stem}.{ending}")
            info.size = len(content)
            info.pax_headers = pax
            tar.addfile(info, io.BytesIO(content))
    answered(lambda: encode_main(["--index", "d"]))
    if Path("d/manifest.json").exists():
        looked_at(Path("d"))


# --- artifacts -----------------------------------------------------------------------------------------------------


@fuzz(80)
@given(st.data())
def test_any_artifact_is_read_whole_or_refused_in_words(sound, data):
    copied(sound / "gene", "g")
    manifest, tensors = Path("g/manifest.json"), Path("g/tensors.safetensors")
    fields = json.loads(manifest.read_text())
    what = data.draw(st.sampled_from(["tree", "text", "tensors", "pickle"]))
    if what == "tree":
        manifest.write_text(json.dumps(data.draw(changed(fields))))
    elif what == "text":
        manifest.write_bytes(data.draw(damaged(manifest.read_bytes())))
    else:
        content = pickle.dumps(Trap()) if what == "pickle" else data.draw(damaged(tensors.read_bytes()))
        tensors.write_bytes(content)
        fields["sha256"]["tensors.safetensors"] = hashlib.sha256(content).hexdigest()
        manifest.write_text(json.dumps(fields))
    try:
        artifact = load_artifact("g")
    except ArtifactError as error:
        assert "g" in str(error)
    else:
        assert all(isinstance(tensor, torch.Tensor) for tensor in artifact.tensors.values())
        assert what in ("tensors", "text", "tree")
        # what says how the numbers are to be read is as it was written
        assert (artifact.kind, artifact.arch) == ("learngene", tiny_arch(num_layers=1))
