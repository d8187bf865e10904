"""Learngenes on disk: what is written comes back, and what was damaged is refused in words."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from fine_dist.artifacts.load import load_model
from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.model import arch as zoo
from fine_dist.model.arch import check_size
from fine_dist.model.artifact import load_artifact, save_artifact
from fine_dist.model.dit import DiT
from fine_dist.model.factors import FactoredDiT
from tests.conftest import lively, tiny_arch


@pytest.fixture
def saved(tmp_path):
    model = lively(FactoredDiT(tiny_arch(), 16))
    save_artifact(
        tmp_path / "learngene",
        kind="learngene",
        method={"name": "fine", "rank": 16},
        arch=model.arch,
        tensors=model.state_dict(),
        extra={"ancestor": "none"},
    )
    return tmp_path / "learngene", model


def test_every_tensor_and_setting_comes_back(saved):
    folder, model = saved
    artifact = load_artifact(folder, "learngene")
    assert artifact.arch == model.arch and artifact.method["rank"] == 16 and artifact.extra == {"ancestor": "none"}
    assert all(torch.equal(artifact.tensors[k], v) for k, v in model.state_dict().items())
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "tensors.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["learngene"]  # nothing temporary is left


def test_writing_again_replaces_the_folder_whole(saved):
    folder, model = saved
    first = load_artifact(folder).hash
    save_artifact(folder, kind="model", method={"name": "scratch"}, arch=model.arch, tensors={"a": torch.ones(2)})
    again = load_artifact(folder)
    assert again.kind == "model" and again.hash != first and list(again.tensors) == ["a"]


def damage_tensors(folder):
    data = bytearray((folder / "tensors.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "tensors.safetensors").write_bytes(bytes(data))


def truncate_tensors(folder):
    data = (folder / "tensors.safetensors").read_bytes()
    (folder / "tensors.safetensors").write_bytes(data[: len(data) // 2])


def other_format(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


def change(**fields):
    """Change fields of the manifest; one that becomes None goes."""

    def damage(folder):
        manifest = {**json.loads((folder / "manifest.json").read_text()), **fields}
        kept = {key: value for key, value in manifest.items() if value is not None}
        (folder / "manifest.json").write_text(json.dumps(kept))

    return damage


def narrower(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(arch={**manifest["arch"], "hidden_size": 16})(folder)


def more_classes_in_an_older_manifest(folder):
    """As `narrower`, where the manifest has no hash of its settings: the tensors tell."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]["settings"]
    change(arch={**manifest["arch"], "num_classes": 11}, sha256=manifest["sha256"])(folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "manifest.json").write_text("[]"), "a JSON object is needed"),
        (lambda f: (f / "manifest.json").write_text('{"format": 1}'), "kind is missing"),
        (lambda f: (f / "manifest.json").write_bytes(b"\x80\x02\xff"), "damaged"),
        (lambda f: (f / "manifest.json").write_text("[" * 100000), "damaged"),
        (change(sha256=None), "sha256 is missing"),
        (change(sha256={}), "no sha256 of tensors"),
        (change(arch={"hidden_size": "wide"}), "arch: hidden_size: input should be a valid integer"),
        (change(method=["fine"]), "method is"),
        (change(kind="sigma"), "was edited after writing"),
        (narrower, "was edited after writing"),
        (more_classes_in_an_older_manifest, r"label.weight is \[11, 32\], and \[12, 32\] by the arch"),
        (damage_tensors, "edited or half copied"),
        (truncate_tensors, "edited or half copied"),
        (lambda f: (f / "tensors.safetensors").unlink(), "no tensors.safetensors"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "damaged"),
        (other_format, "format 99"),
    ],
)
def test_a_damaged_folder_is_refused_and_named(saved, damage, words):
    folder, _ = saved
    damage(folder)
    with pytest.raises(ArtifactError, match=words) as caught:
        load_artifact(folder)
    assert str(folder) in str(caught.value)


def test_a_model_where_a_learngene_is_needed_is_refused(saved):
    folder, _ = saved
    with pytest.raises(ArtifactError, match="is a learngene, and a model is needed"):
        load_artifact(folder, "model")


@pytest.mark.parametrize("fields", [{}, {"learn_sigma": True, "num_layers": 2, "hidden_size": 48}])
def test_what_a_shape_counts_is_what_a_model_has(fields):
    arch = tiny_arch(**fields)
    assert arch.count() == sum(p.numel() for p in DiT(arch).parameters())
    assert arch.count(24) == sum(p.numel() for p in FactoredDiT(arch, 24).parameters())
    state = DiT(arch).state_dict()
    assert all(tuple(state[name].shape) == shape for name, shape in arch.shell_shapes().items())


def test_a_size_that_no_memory_holds_is_refused_before_it_is_made():
    check_size(tiny_arch().count(), "a model that fits")
    with pytest.raises(ConfigError, match=r"method.rank 1000000000: .* GiB as float32, and this machine has .* GiB"):
        check_size(tiny_arch().count(10**9), "method.rank 1000000000")


@pytest.mark.parametrize("fields", [{"num_layers": 10**6}, {"hidden_size": 10**12}, {"num_classes": 10**15}])
def test_a_shape_beyond_all_bounds_is_refused_at_once(fields):
    with pytest.raises(ConfigError, match=rf"arch: {next(iter(fields))}: input should be less than or equal to"):
        zoo.arch("DiT-B/2", **fields)
    with pytest.raises(ConfigError, match="num_layers: input should be less"):
        tiny_arch().with_depth(100000)


def test_an_error_of_a_name_is_one_line_without_addresses():
    for name in ("DiT-B/3", "DiT-Q/2", "DiT-B/2-L0", "B"):
        with pytest.raises(ConfigError) as caught:
            zoo.arch(name)
        assert "\n" not in str(caught.value) and "http" not in str(caught.value)


def test_a_manifest_of_a_version_that_knew_fewer_settings_is_whole(saved):
    """Its hash is of what it says, not of what a later version would add by default."""
    folder, model = saved
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["arch"]["frequency_shift"]
    text = json.dumps([manifest["kind"], manifest["method"], manifest["arch"]], sort_keys=True)
    manifest["sha256"]["settings"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert load_artifact(folder).arch == model.arch


ODD = {
    "int": lambda x: x.to(torch.int32),
    "bool": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex64),
    "no dimension": lambda x: x.flatten()[0].clone(),
    "one dimension more": lambda x: x[None].clone(),
    "no entries": lambda x: x[:0].clone(),
    "not a number": lambda x: x * torch.nan,
    "gone": None,
}


@pytest.mark.parametrize("how", ODD)
def test_a_learngene_or_target_with_an_odd_tensor_is_refused_in_one_line_that_names_the_folder(tmp_path, saved, how):
    gene, model = saved
    sigma = {name: x for name, x in model.state_dict().items() if name.endswith("sigma")}
    inherited = [name for name in model.state_dict() if name not in sigma]
    about = {"parent": {"hash": load_artifact(gene).hash, "path": str(gene), "from_here": str(gene)}}
    shown = {"gene": model.state_dict(), "target": sigma}
    for kind, state in shown.items():
        for name in {name.rpartition(".")[2] if "blocks" in name else name: name for name in state}.values():
            change = ODD[how]
            altered = {key: change(x) if key == name else x for key, x in state.items() if change or key != name}
            folder = tmp_path / "altered"
            save_artifact(
                folder, kind="learngene" if kind == "gene" else "target", method={"name": "fine", "rank": 16},
                arch=model.arch, tensors=altered, extra={**about, "inherited": inherited},
            )  # fmt: skip
            with pytest.raises(ArtifactError) as refusal:
                load_model(folder)
            assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value), (name, str(refusal.value))


def test_a_learngene_in_eight_bits_is_read_as_what_it_rounds_to(saved):
    gene, model = saved
    eight = {name: x.to(torch.float8_e4m3fn) for name, x in model.state_dict().items()}
    save_artifact(gene, kind="learngene", method={"name": "fine", "rank": 16}, arch=model.arch, tensors=eight)
    merged, _ = load_model(gene)
    whole = FactoredDiT(model.arch, 16)
    whole.load_state_dict({name: x.float() for name, x in eight.items()})
    assert all(torch.equal(merged.state_dict()[name], x) for name, x in whole.merge().items())
