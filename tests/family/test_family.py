"""A grid as named targets, and everything that is refused before one of them trains."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from fine_dist.core.config import validate
from fine_dist.core.errors import ArtifactError, ConfigError, DataError, RunDirError
from fine_dist.core.yaml_files import load_yaml
from fine_dist.data.settings import DataConfig
from fine_dist.diffusion.held_out import HeldOutLoss
from fine_dist.engine.settings import LoopConfig
from fine_dist.family.config import DomainConfig, InitConfig
from fine_dist.family.family_plan import Family
from fine_dist.family.members import expand
from fine_dist.family.packing import CACHE_NUMBERS, PackConfig, Shape, chunk_size, plan, sample_bytes
from fine_dist.family.train_family import run_family
from fine_dist.init import dry_run, main, tasks
from fine_dist.launchers.spec import Capacity
from fine_dist.methods.fine.config import FineConfig
from fine_dist.methods.settings import RandomGenesConfig, ScratchConfig
from fine_dist.model.arch import arch as named
from tests.conftest import tiny_arch


@pytest.fixture
def config(learngene, shards, tmp_path) -> InitConfig:
    return InitConfig(
        run_dir=str(tmp_path / "family"),
        parent=str(learngene.folder),
        depths=(2, 3),
        data=DataConfig(shards=str(shards / "train"), held_out=str(shards / "held_out")),
        steps=4,
        batch=8,
    )


def changed(config: InitConfig, **fields) -> InitConfig:
    return config.model_copy(update=fields)


def test_a_grid_is_every_combination_under_a_name_that_says_it(config):
    grid = changed(config, seeds=(0, 7), lrs=(1e-2, 0.003), variants={"sigma": ("linear", "segment")})
    members = expand(grid)
    assert len(members) == 2 * 2 * 2 * 2
    assert members[0].name == "L2-s0-lr0.01-linear" and members[-1].name == "L3-s7-lr0.003-segment"
    by_name = {member.name: member for member in members}
    one = by_name["L3-s7-lr0.003-linear"]
    assert (one.depth, one.seed, one.lr, one.variant) == (3, 7, 0.003, (("sigma", "linear"),))
    assert one.folder.name == one.name


def test_data_sets_are_an_axis_of_the_grid(config):
    domains = {"digits": DomainConfig(data=config.data), "again": DomainConfig(data=config.data, labels="new")}
    names = [member.name for member in expand(changed(config, domains=domains))]
    assert names == ["L2-digits-s0-lr0.01", "L2-again-s0-lr0.01", "L3-digits-s0-lr0.01", "L3-again-s0-lr0.01"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"depths": (0,)}, "depths: 0 is not a depth"),
        ({"depths": (2, 2)}, "listed twice"),
        ({"depths": ()}, "empty list"),
        ({"lrs": (1e-2, 1.0000000001e-2)}, "one name"),
        ({"lrs": (0.0,)}, "is not a learning rate"),
        ({"seeds": tuple(range(101)), "limit": 200}, "202 targets, more than limit: 200; add --yes"),
        ({"only": ("L2-s0-lr0.02",)}, "did you mean 'L2-s0-lr0.01'"),
        ({"domains": {"a/b": DomainConfig()}}, "letters, digits"),
    ],
)
def test_an_impossible_grid_is_refused_with_the_reason(config, fields, words):
    with pytest.raises(ConfigError, match=words):
        expand(changed(config, **fields))


def test_a_large_grid_runs_when_the_user_says_yes(config):
    assert len(expand(changed(config, seeds=tuple(range(101)), yes=True))) == 202


def check(config: InitConfig) -> None:
    Family(config).check()


def test_what_does_not_fit_is_refused_before_anything_is_written(config, shards, tmp_path):
    wide = tiny_arch(hidden_size=64)
    with pytest.raises(ArtifactError, match="hidden_size is 32 in the parent, 64 in the target"):
        check(changed(config, arch=wide))
    with pytest.raises(DataError, match=r"latents are 1x8x8, but the model takes 1x16x16"):
        check(changed(config, arch=tiny_arch(input_size=16)))
    with pytest.raises(DataError, match=r"data\.shards is not set"):
        check(changed(config, data=DataConfig()))
    with pytest.raises(DataError, match=str(tmp_path / "nowhere")):
        check(changed(config, data=DataConfig(shards=str(tmp_path / "nowhere"))))
    with pytest.raises(ConfigError, match="did you mean 'linear'"):
        check(changed(config, variants={"sigma": ("linera",)}))
    with pytest.raises(ConfigError, match="random_genes has no axis 'sigma'"):
        check(changed(config, method=RandomGenesConfig(), variants={"sigma": ("linear",)}))
    with pytest.raises(ConfigError, match="give the folder that condense wrote"):
        check(changed(config, parent=None))
    with pytest.raises(ConfigError, match="architecture of the targets must be given"):
        check(changed(config, parent=None, method=ScratchConfig()))
    assert not (tmp_path / "family").exists()


def test_a_learngene_that_was_edited_or_half_written_is_refused(config, learngene, tmp_path):
    edited = tmp_path / "edited"
    shutil.copytree(learngene.folder, edited)
    content = bytearray((edited / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (edited / "tensors.safetensors").write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match="not what its manifest says"):
        check(changed(config, parent=str(edited)))
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(learngene.folder / "tensors.safetensors", half)
    with pytest.raises(ArtifactError, match="holds no model, target or learngene"):
        check(changed(config, parent=str(half)))


def test_a_folder_made_with_other_settings_is_refused_naming_them(config):
    family = Family(config)
    member = family.members[0]
    member.folder.mkdir(parents=True)
    (member.folder / "target.json").write_text(json.dumps(family.identity(member)))
    check(config)
    with pytest.raises(RunDirError, match="batch: 8 there, 16 now"):
        check(changed(config, batch=16))
    check(changed(config, steps=5))  # a target may be trained for longer
    check(changed(config, depths=(2, 3, 4)))  # a family may grow


def test_a_dry_run_shows_targets_and_packs_and_writes_nothing(config, tmp_path):
    text = "\n".join(dry_run(config))
    assert "2 targets in" in text and "L3-s0-lr0.01: 4 steps of 8 at 0.01" in text
    assert "MiB of activations" in text and not (tmp_path / "family").exists()


def test_a_mistake_ends_the_command_with_code_2_and_one_message(config, capsys):
    argv = ["--run-dir", config.run_dir, "--parent", config.parent, "--data.shards", config.data.shards]
    assert main([*argv, "--depths", "0"]) == 2
    assert main([*argv, "--parent", "nowhere"]) == 2
    assert main(["--list", "nowhere"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)


def test_the_published_families_are_what_their_comments_say():
    family = validate(InitConfig, load_yaml("configs/init/dit_b_family.yaml"))
    assert [m.name for m in expand(family)][1] == "L6-s0-lr0.01"
    assert len(expand(validate(InitConfig, load_yaml("configs/init/dit_l_family.yaml")))) == 20


# --- packs ----------------------------------------------------------------------------------------------------------


def shapes(depths, group="fine", steps=300):
    archs = [tiny_arch(num_layers=depth) for depth in depths]
    return [
        Shape(f"{group}-L{arch.num_layers}-{i}", arch, group, steps, arch.num_layers * 1000, feed=f"seed {i}")
        for i, arch in enumerate(archs)
    ]


def planned(jobs, workers, **config):
    return plan(jobs, PackConfig(**config), workers=workers, batch=8, memory=2**30, cpu=False)


def test_packs_keep_workers_equally_busy_and_the_longest_comes_first():
    packs = planned(shapes([2, 4, 6, 8] * 3), workers=2)
    assert len(packs) == 2 and sum(len(p.jobs) for p in packs) == 12
    assert packs[0].layer_steps >= packs[1].layer_steps
    assert packs[0].layer_steps - packs[1].layer_steps <= 2 * 300  # 60 layers cannot be shared out more evenly
    one = planned(shapes([2, 4, 6, 8]), workers=1)
    assert [job.split("-")[1] for job in one[0].jobs] == ["L8", "L6", "L4", "L2"]


def test_every_target_is_in_exactly_one_pack_whatever_the_limits():
    jobs = shapes([1, 5, 9] * 5) + shapes([3, 3], group="random_genes")
    for workers in (1, 2, 3, 8, 40):
        packs = planned(jobs, workers, max_jobs=4)
        names = [name for pack in packs for name in pack.jobs]
        assert sorted(names) == sorted(job.name for job in jobs)
        assert all(len(pack.jobs) <= 4 for pack in packs)
        assert all(len({name.split("-")[0] for name in pack.jobs}) == 1 for pack in packs)


def test_the_same_family_is_packed_the_same_way_again():
    jobs = shapes([2, 4, 6, 8] * 3)
    assert planned(jobs, 3) == planned(jobs[::-1], 3)


def test_a_chunk_is_what_memory_holds():
    arch = named("DiT-B/2")
    shape = Shape("b", arch, "group", 300, sample_bytes(arch, 768))
    one = 16 * shape.sample_bytes
    assert chunk_size(shape, 10, 16, 3 * one + 1, cpu=False) == 3
    assert chunk_size(shape, 2, 16, 10 * one, cpu=False) == 2
    assert chunk_size(shape, 10, 16, one // 2, cpu=False) == 1
    # bf16 halves the products' part and leaves the norms' as it is
    assert 0.5 < sample_bytes(arch, 768, bf16=True) / sample_bytes(arch, 768) < 0.75


def test_a_chunk_on_a_gpu_fills_the_device_and_no_more():
    def chunk(arch, batch):
        return chunk_size(Shape("x", arch, "group", 300, 1), 12, batch, 2**50, cpu=False)

    large, small = named("DiT-XL/2"), shapes([4])[0].arch
    assert (chunk(large, 16), chunk(large, 64), chunk(small, 64)) == (4, 1, 12)
    jobs = [Shape(name, large, "group", 300, 1, feed=name) for name in ("a", "b")]
    [pack] = plan(jobs, PackConfig(), workers=1, batch=64, memory=2**50, cpu=False)
    assert pack.sequential  # each fills the device by itself: the loop trains them one after the other, compiled


def test_on_a_cpu_jobs_that_fill_the_cache_alone_are_planned_one_after_the_other():
    jobs = shapes([2, 4])

    def apart(batch: int, **how) -> bool:
        cpu = how.pop("cpu", True)
        [pack] = plan(how.pop("jobs", jobs), PackConfig(**how), workers=1, batch=batch, memory=2**30, cpu=cpu)
        return pack.sequential

    one = CACHE_NUMBERS // (jobs[0].arch.num_tokens * jobs[0].arch.hidden_size)  # the batch that fills it alone
    assert apart(one) and not apart(one // 2)
    assert not apart(one, cpu=False)  # what an accelerator gains is fewer launches
    assert not apart(one, chunk=1)  # as it was asked for
    assert not apart(one, jobs=[*jobs, replace(jobs[0], name="again")])  # two of one seed share their samples
    assert not apart(one, jobs=jobs[:1])


def test_control_methods_join_the_family_and_never_share_a_pack_with_other_genes(config):
    family = Family(changed(config, method=RandomGenesConfig(), seeds=(0, 1)))
    family.check()
    assert len({shape.group for shape in family.shapes()}) == 1  # told apart by their genes where they are built
    variants = Family(changed(config, method=FineConfig(), variants={"sigma": ("linear", "random")}))
    assert len({shape.group for shape in variants.shapes()}) == 1  # beginnings share genes, and a pack


def test_what_a_pack_does_not_offer_goes_through_the_loop_one_target_at_a_time(config):
    family = Family(changed(config, engine=LoopConfig(backend="deepspeed")))
    assert len({shape.group for shape in family.shapes()}) == len(family.members)
    with pytest.raises(ConfigError, match=r"engine\.ema_decay: unknown key"):
        validate(InitConfig, {"engine": {"ema_decay": 0.9}})


def test_packs_are_planned_for_the_machines_they_run_on(config):
    family = Family(changed(config, depths=(1, 2, 3, 4)))
    two = family.packs(Capacity(workers=2, accelerator_bytes=None, cpu=True, host_bytes=None))
    four = family.packs(Capacity(workers=4, accelerator_bytes=None, cpu=True, host_bytes=None))
    assert (len(two), len(four)) == (2, 4) and len(family.packs()) == 1
    shape = family.shapes()[-1]
    small = Capacity(1, accelerator_bytes=8 * shape.sample_bytes * 2.6 / 0.8, cpu=False, host_bytes=None)
    assert family.packs(small)[0].chunk == 2  # the accelerator there decides, not the machine this test runs on


def test_every_task_carries_its_targets_as_rows(config):
    found = tasks(changed(config, seeds=(0, 1)))
    assert sorted(row for task in found for row in task.rows) == sorted(
        m.name for m in expand(changed(config, seeds=(0, 1)))
    )
    for task in found:
        assert task.config.only == task.rows
        assert torch.is_tensor(torch.zeros(1)) and task.config.run_dir == config.run_dir


def test_targets_that_begin_as_one_model_are_looked_at_once(config, monkeypatch):
    looked = []
    measure = HeldOutLoss.__call__
    monkeypatch.setattr(
        HeldOutLoss, "__call__", lambda self, model, *how: looked.append(1) or measure(self, model, *how)
    )
    run_family(Family(changed(config, seeds=(0, 1), steps=1)), inside=False)
    # two depths begin alike whatever the seed, four targets end each in its own way
    assert len(looked) == 2 + 4
    firsts = {}
    for member in expand(changed(config, seeds=(0, 1))):
        rows = [json.loads(line) for line in (member.folder / "metrics.jsonl").read_text().splitlines()]
        firsts[member.depth, member.seed] = next(row["held_out_loss"] for row in rows if row["step"] == 0)
    assert firsts[2, 0] == firsts[2, 1] != firsts[3, 0] == firsts[3, 1]
