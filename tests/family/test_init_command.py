"""The targets, files and listings that `fine-dist init` leaves.

Most commands run in this process (`run_here`); one that leaves a process group behind gets its own (`start_process`).
"""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fine_dist.artifacts.targets import load_target
from fine_dist.core.errors import ArtifactError
from fine_dist.data.settings import DataConfig
from fine_dist.data.stream import read_all
from fine_dist.diffusion.held_out import HeldOutLoss
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine import dist
from fine_dist.family.config import DomainConfig, InitConfig
from fine_dist.family.family_plan import Family
from fine_dist.family.summary import list_family
from fine_dist.family.train_family import run_pack
from fine_dist.launchers.state_table import StateTable
from fine_dist.model.artifact import load_artifact
from fine_dist.model.dit import DiT
from tests.conftest import logged_rows
from tests.family.tools import NAMES, STEPS, init_argv, largest_difference, run_here, sigma_of, solo, start_process


def test_every_target_is_what_its_solo_run_would_have_made(family, learngene, shards):
    for name in NAMES:
        point = (int(name[1]), int(name[4]), 0.01)
        losses, model = solo(learngene, point, shards / "train", STEPS)
        saved = load_artifact(family / name / "target", "target")
        assert [row["loss"] for row in logged_rows(family / name)] == pytest.approx(losses, rel=1e-5)
        trained = sigma_of(model)
        assert largest_difference({key: saved.tensors[key] for key in trained}, trained) < 1e-4


def test_the_held_out_loss_is_known_before_the_first_step_on_the_way_and_at_the_end(family):
    for name in NAMES:
        looks = {row["step"]: row["held_out_loss"] for row in logged_rows(family / name, "held_out_loss")}
        assert list(looks) == [0, 5, 10, STEPS]
        assert looks[STEPS] == json.loads((family / name / "DONE.json").read_text())["held_out_loss"] < looks[0]


def test_a_target_names_its_learngene_and_merges_into_a_dense_model_of_the_stated_loss(family, learngene, shards):
    measure = HeldOutLoss(*read_all(str(shards / "held_out")), DiffusionConfig())
    for name in NAMES:
        dense, artifact = load_target(family / name)
        assert type(dense) is DiT and artifact.extra["parent"]["hash"] == learngene.hash
        done = json.loads((family / name / "DONE.json").read_text())
        assert measure(dense)["held_out_loss"] == pytest.approx(done["held_out_loss"], rel=1e-5)
        assert sum(p.numel() for p in dense.parameters()) == dense.arch.count()


def test_scalers_are_refused_with_another_learngene_and_found_where_it_was_moved(family, learngene, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(family / NAMES[0], tmp_path / "target")
    shutil.copytree(learngene.folder, moved)
    load_target(tmp_path / "target", learngene=moved)
    content = bytearray((moved / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (moved / "tensors.safetensors").write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match="not what its manifest says"):
        load_target(tmp_path / "target", learngene=moved)
    from fine_dist.model.artifact import save_artifact

    other = {name: tensor + 1 for name, tensor in learngene.tensors.items()}
    save_artifact(moved, kind="learngene", method=learngene.method, arch=learngene.arch, tensors=other)
    with pytest.raises(ArtifactError, match=r"was made from the parent .* is another one .*--learngene"):
        load_target(tmp_path / "target", learngene=moved)


@pytest.mark.parametrize("file", ["DONE.json", "target.json"])
def test_a_damaged_word_of_a_target_is_one_line_and_names_the_file(file, family, learngene, shards, tmp_path):
    shutil.copytree(family, tmp_path / "family")
    (tmp_path / "family" / NAMES[0] / file).write_text('{"steps": 1')
    done = run_here(init_argv(learngene, shards, tmp_path / "family", "--seeds", "0", "1", "--launcher", "here"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(rf"error: .*{NAMES[0]}/{file} is damaged", done.stderr)


def test_the_list_shows_sizes_losses_and_the_storage_of_the_family(family):
    lines = list_family(family)
    assert sorted(line.split()[0] for line in lines[1:5]) == NAMES
    assert all(line.endswith("done") for line in lines[1:5])
    assert any("as dense models" in line for line in lines)
    assert lines[-1].startswith("n models by fine and n dense models: 1: ") and "; 100: " in lines[-1]
    sizes = [(family / name / "target" / "tensors.safetensors").stat().st_size for name in NAMES]
    assert all(size < 20_000 for size in sizes)


def test_tensorboard_has_a_run_a_target_with_its_hyperparameters_and_the_familys_figure(family):
    for name in NAMES:
        events = EventAccumulator(str(family / name))
        events.Reload()
        assert len(events.Scalars("train/loss")) == STEPS
        assert events.Scalars("final/held_out_loss")[0].value > 0
        assert "_hparams_/session_start_info" in events.summary_metadata
    figure = EventAccumulator(str(family))
    figure.Reload()
    assert figure.Tags()["images"] == ["family/loss_against_depth"]
    assert (family / "family.png").stat().st_size > 1000


def test_targets_that_cannot_share_a_pack_train_in_the_engines_loop_to_the_same_end(
    family, learngene, shards, tmp_path
):
    run_dir = tmp_path / "alone"
    done = start_process(
        init_argv(learngene, shards, run_dir, "--launcher", "here", "--engine.backend", "fsdp2", "--depths", "2")
    )
    _, stderr = done.communicate(timeout=240)
    assert done.returncode == 0, stderr
    ours, theirs = (load_artifact(place / NAMES[0] / "target").tensors for place in (run_dir, family))
    assert largest_difference(ours, theirs) < 1e-4
    assert list((run_dir / NAMES[0] / "checkpoints").glob("step_*"))


def test_a_target_that_fails_is_marked_and_the_family_ends_with_code_3(learngene, shards, tmp_path):
    run_dir = tmp_path / "failing"
    done = run_here(init_argv(learngene, shards, run_dir, "--lrs", "0.01", "1e30", "--launcher", "local"))
    assert done.returncode == 3, done.stdout + done.stderr
    rows = {row.name: row for row in StateTable(run_dir).rows()}
    assert {name for name, row in rows.items() if row.state == "failed"} == {"L2-s0-lr1e+30", "L3-s0-lr1e+30"}
    assert all("nan" in row.reason for row in rows.values() if row.state == "failed")
    assert rows["L2-s0-lr0.01"].state == "done" and (run_dir / "L2-s0-lr0.01" / "DONE.json").exists()
    assert "failed: step" in "\n".join(list_family(run_dir))


def test_controls_are_made_by_the_same_command(learngene, shards, tmp_path):
    for method in ("random_genes", "copied_shell", "scratch"):
        done = run_here(init_argv(learngene, shards, tmp_path / method, "--method.name", method, "--launcher", "here"))
        assert done.returncode == 0, done.stderr
    dense, artifact = load_target(tmp_path / "random_genes" / NAMES[0])
    assert artifact.method["name"] == "random_genes" and dense.arch.num_layers == 2
    for method in ("copied_shell", "scratch"):
        assert load_artifact(tmp_path / method / NAMES[0] / "model", "model").arch.num_layers == 2


def test_another_domain_gets_its_own_labels_and_keeps_them(learngene, shards, tmp_path):
    config = tmp_path / "domains.yaml"
    data = f"{{shards: {shards / 'train'}, held_out: {shards / 'held_out'}}}"
    config.write_text(f"domains:\n  same: {{data: {data}}}\n  other: {{data: {data}, labels: new}}\n")
    run_dir = tmp_path / "domains"
    command = init_argv(learngene, shards, run_dir, "--launcher", "here")
    done = run_here([*command, "--config", str(config)])
    assert done.returncode == 0, done.stderr
    same = load_artifact(run_dir / "L2-same-s0-lr0.01" / "target")
    other = load_artifact(run_dir / "L2-other-s0-lr0.01" / "target")
    assert "label.weight" in other.tensors and "label.weight" not in same.tensors
    dense, _ = load_target(run_dir / "L2-other-s0-lr0.01")
    assert torch.equal(dense.label.weight, other.tensors["label.weight"])
    assert not torch.equal(dense.label.weight, learngene.tensors["label.weight"])


def test_a_pack_over_two_processes_ends_as_a_pack_in_one(family, learngene, shards, tmp_path):
    run_dir = tmp_path / "two"
    command = init_argv(learngene, shards, run_dir, "--launcher", "local", "--launch.processes", "2")
    done = run_here(command)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("L2-s0-lr0.01", "L3-s0-lr0.01"):
        ours, theirs = (load_artifact(place / name / "target").tensors for place in (run_dir, family))
        assert largest_difference(ours, theirs) < 1e-4
        assert len(logged_rows(run_dir / name)) == STEPS


def test_a_data_set_that_broke_after_the_check_fails_its_own_targets_alone(learngene, shards, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(shards / "train", broken)
    domains = {
        "good": DomainConfig(data=DataConfig(shards=str(shards / "train"))),
        "broken": DomainConfig(data=DataConfig(shards=str(broken))),
    }
    config = InitConfig(
        run_dir=str(tmp_path / "run"), parent=str(learngene.folder), depths=(2,), domains=domains, steps=2, batch=8
    )
    family = Family(config)
    family.check()
    pack = family.packs()[0]
    (broken / "manifest.json").unlink()
    table = StateTable(tmp_path / "run")
    table.add([member.name for member in family.members])
    run_pack(Family(config), pack, table, dist.single_process("cpu"))
    rows = {row.name: row for row in table.rows()}
    assert rows["L2-good-s0-lr0.01"].state == "done"
    assert rows["L2-broken-s0-lr0.01"].state == "failed" and str(broken) in rows["L2-broken-s0-lr0.01"].reason
