"""A model of another project is an ancestor, a parent, a model to draw from, to measure and to export, as ours are."""

from __future__ import annotations

import pytest
import torch

from fine_dist.artifacts.card import ModelCard
from fine_dist.artifacts.diffusers_export import write_diffusers
from fine_dist.artifacts.dit_pt import write_dit
from fine_dist.artifacts.load import load_model
from fine_dist.artifacts.reading import facts_of, hash_of
from fine_dist.artifacts.settings import HintsConfig
from fine_dist.model.artifact import load_artifact, read_manifest
from fine_dist.model.dit import DiT
from tests.commands.conftest import ARCH, FAST, command, data, refused
from tests.conftest import inputs, lively, tiny_arch

HEADS = ["--hints.num-heads", "4"]


@pytest.fixture(scope="module")
def dense():
    return lively(DiT(tiny_arch(num_layers=3)), std=0.05)


@pytest.fixture(scope="module")
def pt(dense, tmp_path_factory):
    """In the original DiT's layout; its time frequencies are the original's."""
    path = tmp_path_factory.mktemp("pt") / "model.pt"
    write_dit(path, dense.arch, dense.state_dict())
    return path


@pytest.fixture(scope="module")
def folder(dense, tmp_path_factory):
    """A diffusers folder whose card names a licence."""
    path = tmp_path_factory.mktemp("diffusers") / "model"
    write_diffusers(path, dense.arch, dense.state_dict(), card=ModelCard(licence="cc-by-nc-4.0"))
    return path


def test_a_checkpoint_of_the_original_is_condensed_with_its_own_shape_and_licence(pt, dense, digit_shards, tmp_path):
    argv = ["condense", *FAST, *data(digit_shards), "--run-dir", str(tmp_path / "c"), "--ancestor", str(pt), *HEADS]
    argv += ["--hints.licence", "cc-by-nc-4.0", "--method.initial", "decompose", "--method.rank", "8"]
    assert command([*argv, "--loss.output", "1"]) == 0
    learngene = load_artifact(tmp_path / "c" / "learngene")
    assert learngene.arch == dense.arch
    assert learngene.extra["licence"] == learngene.extra["ancestor"]["licence"] == "cc-by-nc-4.0"
    assert learngene.extra["ancestor"]["hash"] == hash_of(pt, HintsConfig(num_heads=4))
    assert learngene.extra["ancestor"]["imported"]["layout"] == "dit"


def test_the_licence_goes_from_the_ancestor_to_the_family_to_the_export(folder, digit_shards, tmp_path):
    condense = ["condense", *FAST, *data(digit_shards), "--run-dir", str(tmp_path / "c"), "--ancestor", str(folder)]
    assert command([*condense, "--loss.output", "1", "--method.rank", "8"]) == 0
    init = ["init", "--parent", str(tmp_path / "c"), *data(digit_shards), "--run-dir", str(tmp_path / "i")]
    assert command([*init, "--depths", "2", "--steps", "2", "--batch", "16", "--engine.device", "cpu"]) == 0
    target = next((tmp_path / "i").glob("L2*"))
    assert read_manifest(target / "target")["extra"]["licence"] == "cc-by-nc-4.0"
    train = ["train", "--parent", str(target), *FAST, *data(digit_shards), "--run-dir", str(tmp_path / "t")]
    assert command(train) == 0
    assert read_manifest(tmp_path / "t" / "model")["extra"]["licence"] == "cc-by-nc-4.0"
    assert command(["export", "--model", str(tmp_path / "t"), "--out", str(tmp_path / "e")]) == 0
    assert read_manifest(tmp_path / "e")["extra"]["licence"] == "cc-by-nc-4.0"


def test_every_source_of_one_model_computes_the_same(pt, folder, dense):
    batch = inputs(dense.arch)
    ours = dense(*batch)
    for source, hints in ((pt, HintsConfig(num_heads=4)), (folder, HintsConfig())):
        model, about = load_model(source, hints=hints)
        assert torch.equal(model(*batch), ours)
        assert about["hash"] == facts_of(source, hints).hash and about["kind"] == "model"


def test_a_family_is_made_from_a_foreign_parent_and_read_again_where_it_has_moved(pt, digit_shards, tmp_path):
    away = tmp_path / "away" / "renamed.pt"
    away.parent.mkdir()
    away.write_bytes(pt.read_bytes())
    init = ["init", "--parent", str(away), *HEADS, *data(digit_shards), "--run-dir", str(tmp_path / "i")]
    init += [
        "--method.name",
        "copied_shell",
        "--depths",
        "2",
        "--steps",
        "2",
        "--batch",
        "16",
        "--engine.device",
        "cpu",
    ]
    assert command(init) == 0
    target = next((tmp_path / "i").glob("L2*"))
    before, _ = load_model(target)
    moved = away.rename(tmp_path / "moved.pt")
    after, _ = load_model(target, learngene=moved)
    assert all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values()))


def test_training_goes_on_from_a_folder_of_diffusers(folder, dense, digit_shards, tmp_path):
    argv = ["train", "--parent", str(folder), *FAST, *data(digit_shards), "--run-dir", str(tmp_path / "t")]
    assert command(argv) == 0
    extra = load_artifact(tmp_path / "t" / "model").extra
    assert extra["ancestor"]["imported"]["layout"] == "diffusers" and extra["origin"] == hash_of(folder)
    assert command(argv) == 0  # the same run, although its parent is a foreign one


def test_a_dry_run_knows_the_ancestors_shape(folder, capsys):
    assert command(["condense", "--ancestor", str(folder), "--loss.output", "1", "--dry-run"]) == 0
    assert "DiT-D32/2-L3" in capsys.readouterr().out


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_name_on_the_hub_without_a_network_is_one_line_with_what_to_download(monkeypatch, capsys, tmp_path):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    argv = ["condense", "--ancestor", "facebook/DiT-XL-2-256", "--loss.output", "1", "--dry-run"]
    message = refused(argv, capsys)
    assert "facebook/DiT-XL-2-256" in message and "hf download" in message and "copy the folder here" in message


def test_what_the_file_does_not_say_is_asked_for_in_words_that_work(pt, capsys, digit_shards, tmp_path):
    argv = ["train", "--parent", str(pt), *FAST, *data(digit_shards), "--run-dir", str(tmp_path / "t")]
    assert "--hints.num-heads" in refused(argv, capsys)
    assert command([*argv, *HEADS]) == 0


def test_a_checkpoint_with_code_in_it_is_refused_and_nothing_runs(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    argv = ["export", "--model", str(tmp_path / "evil.pt"), "--out", str(tmp_path / "out")]
    assert "nothing in it was run" in refused(argv, capsys)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command_line", [["sample", "--model"], ["evaluate", "--models"], ["export", "--model"]])
def test_another_networks_checkpoint_is_refused_by_the_names_of_its_tensors(command_line, tmp_path, capsys):
    torch.save({"down_blocks.0.weight": torch.zeros(2)}, tmp_path / "unet.pt")
    more = ["--out", str(tmp_path / "o")] if command_line[0] == "export" else ["--run-dir", str(tmp_path / "o")]
    message = refused([*command_line, str(tmp_path / "unet.pt"), *more], capsys)
    assert "down_blocks.0.weight" in message or "held-out" in message


def test_a_sit_is_sampled_as_the_flow_it_is(dense, tmp_path, capsys):
    path = tmp_path / "SiT-tiny.pt"
    write_dit(path, dense.arch, dense.state_dict())
    sample = ["sample", "--model", str(path), *HEADS, "--classes", "1", "--sampler.steps", "2", "--run-dir"]
    assert command([*sample, str(tmp_path / "s")]) == 0
    assert "euler 2 steps" in drawn_title(path) and capsys.readouterr().out
    assert "does not sample a model of process flow" in refused(
        [*sample, str(tmp_path / "d"), "--sampler.scheduler", "ddim"], capsys
    )


def drawn_title(path) -> str:
    """The title of a grid of a model's samples."""
    from fine_dist.sampling import drawing, renderer

    config = drawing.SampleConfig(model=str(path), hints={"num_heads": 4}, sampler={"steps": 2})
    return drawing.grid_title(renderer.make_renderer(config, str(path), torch.device("cpu")), config)


def test_an_arch_that_contradicts_the_ancestor_is_refused(folder, digit_shards, tmp_path, capsys):
    argv = ["condense", *ARCH, "--arch.input-size", "16", *FAST, *data(digit_shards), "--run-dir", str(tmp_path / "r")]
    argv += ["--ancestor", str(folder), "--loss.output", "1"]
    assert "has input_size 8, and arch says 16" in refused(argv, capsys)
