"""DiT's own layout: an independent forward pass, bit-exact round trips, and files that are something else."""

from __future__ import annotations

import argparse
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch

from fine_dist.artifacts.dit_pt import read_dit, to_dit, write_dit
from fine_dist.artifacts.reading import import_model
from fine_dist.artifacts.settings import HintsConfig
from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT
from tests.conftest import inputs, lively, tiny_arch


def arch(**fields) -> Arch:
    return tiny_arch(num_layers=2, in_channels=4, num_classes=10, learn_sigma=True, **fields)


def original_forward(state: dict[str, torch.Tensor], heads: int, z, t, y) -> torch.Tensor:
    """DiT, one image after the other, one head after the other, with the original's names (arXiv 2212.09748)."""
    outs = []
    for image, time, label in zip(z, t.tolist(), y.tolist()):
        kernel = state["x_embedder.proj.weight"]
        d, _, p, _ = kernel.shape
        side = image.shape[1] // p
        tokens = []
        for row in range(side):
            for column in range(side):
                patch = image[:, row * p : (row + 1) * p, column * p : (column + 1) * p]
                tokens.append((kernel * patch).sum((1, 2, 3)) + state["x_embedder.proj.bias"])
        x = torch.stack(tokens) + state["pos_embed"][0]
        waves = [time * math.exp(-math.log(10000) * i / 128) for i in range(128)]
        wave = torch.tensor([math.cos(w) for w in waves] + [math.sin(w) for w in waves])
        h = torch.nn.functional.silu(state["t_embedder.mlp.0.weight"] @ wave + state["t_embedder.mlp.0.bias"])
        c = state["t_embedder.mlp.2.weight"] @ h + state["t_embedder.mlp.2.bias"]
        act = torch.nn.functional.silu(c + state["y_embedder.embedding_table.weight"][label])

        def layer(name, x):
            return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

        def norm(x, shift, scale, d=d):
            return torch.nn.functional.layer_norm(x, (d,), eps=1e-6) * (1 + scale) + shift

        for i in range(sum(name.endswith("attn.proj.bias") for name in state)):
            six = layer(f"blocks.{i}.adaLN_modulation.1", act).chunk(6)
            q, k, v = layer(f"blocks.{i}.attn.qkv", norm(x, six[0], six[1])).chunk(3, dim=1)
            size = d // heads
            seen = []
            for a in range(heads):
                at = slice(a * size, (a + 1) * size)
                seen.append((q[:, at] @ k[:, at].T / size**0.5).softmax(1) @ v[:, at])
            x = x + six[2] * layer(f"blocks.{i}.attn.proj", torch.cat(seen, 1))
            h = torch.nn.functional.gelu(layer(f"blocks.{i}.mlp.fc1", norm(x, six[3], six[4])), approximate="tanh")
            x = x + six[5] * layer(f"blocks.{i}.mlp.fc2", h)
        shift, scale = layer("final_layer.adaLN_modulation.1", act).chunk(2)
        x = layer("final_layer.linear", norm(x, shift, scale))
        out = torch.empty(x.shape[1] // (p * p), side * p, side * p)
        for n, token in enumerate(x):
            row, column = divmod(n, side)
            out[:, row * p : (row + 1) * p, column * p : (column + 1) * p] = token.reshape(p, p, -1).permute(2, 0, 1)
        outs.append(out)
    return torch.stack(outs)


@pytest.fixture
def model() -> DiT:
    return lively(DiT(arch()), std=0.1)


def saved(tmp_path, content, name="other.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_a_state_dict_in_the_original_layout_drives_an_independent_forward(patch):
    model = lively(DiT(arch(patch_size=patch)), std=0.1)
    z, t, y = inputs(model.arch)
    with torch.no_grad():
        ours = model(z, t, y)
    theirs = original_forward(to_dit(model.arch, model.state_dict()), 4, z, t, y)
    # fp32 sums in another order, through two blocks; outputs are of size 1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_round_trip_is_bit_exact(tmp_path, model, name):
    error = write_dit(tmp_path / name, model.arch, model.state_dict())
    assert 0 < error < 1e-4
    back = import_model(tmp_path / name, HintsConfig(num_heads=4))
    assert back.arch == model.arch and back.layout == "dit"
    assert back.state.keys() == model.state_dict().keys()
    assert all(torch.equal(back.state[key], value) for key, value in model.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_everything_but_the_heads_is_read_from_the_file(tmp_path):
    wanted = arch(patch_size=4, input_size=16, hidden_size=64, num_heads=8)
    state = to_dit(wanted, DiT(wanted).state_dict())
    path = saved(tmp_path, state)
    with pytest.raises(ArtifactError, match=r"width 64.*--hints.num-heads"):
        read_dit(path)
    assert read_dit(path, HintsConfig(num_heads=8)).arch == wanted


def test_known_widths_have_their_own_heads(tmp_path):
    wanted = Arch.model_validate({"name": "DiT-S/2-L1", "num_classes": 7, "learn_sigma": False})
    assert read_dit(saved(tmp_path, to_dit(wanted, DiT(wanted).state_dict()))).arch == wanted


def test_a_training_scripts_checkpoint_gives_its_average_and_says_its_size(tmp_path, model):
    """fast-DiT's and DiT's checkpoints: model, ema, opt, and the arguments as an argparse.Namespace."""
    raw = to_dit(model.arch, model.state_dict())
    ema = {name: tensor if name == "pos_embed" else tensor * 0.5 for name, tensor in raw.items()}
    content = {
        "model": {f"module.{name}": tensor for name, tensor in raw.items()},
        "ema": ema,
        "opt": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="DiT-S/2", num_classes=10),
    }
    path = saved(tmp_path, content)
    hints = {"num_heads": 4}
    assert torch.equal(
        import_model(path, HintsConfig(**hints)).state["label.weight"], ema["y_embedder.embedding_table.weight"]
    )
    found = import_model(path, HintsConfig(**hints), "raw")
    assert torch.equal(found.state["label.weight"], raw["y_embedder.embedding_table.weight"])
    assert "weights: model (not used: ema)" in found.notes


def test_a_table_without_a_null_label_is_told_and_cannot_be_guided(tmp_path, model):
    state = to_dit(model.arch, model.state_dict())
    state["y_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"][:10]
    found = read_dit(saved(tmp_path, state), HintsConfig(num_heads=4, num_classes=10))
    assert found.arch.num_classes == 10 and found.diffusion.label_drop == 0
    assert any("no null label" in note for note in found.notes)
    assert read_dit(tmp_path / "other.pt", HintsConfig(num_heads=4)).arch.num_classes == 9


def test_licences_of_published_models_are_data(tmp_path, model):
    state = to_dit(model.arch, model.state_dict())
    published = saved(tmp_path, state, "DiT-XL-2-256x256.pt")
    assert import_model(published, HintsConfig(num_heads=4)).licence == "cc-by-nc-4.0"
    own = saved(tmp_path, state, "mine.pt")
    assert import_model(own, HintsConfig(num_heads=4)).licence == "unknown"
    found = import_model(own, HintsConfig(num_heads=4, licence="mit"))
    assert found.provenance()["licence"] == "mit" and found.provenance()["sha256"] == found.sha256


@pytest.mark.parametrize(
    ("name", "extra", "hint", "process", "direction"),
    [
        ("SiT-XL-2-256x256.pt", {}, None, "flow", "noise_to_data"),
        ("last.pt", {"args": argparse.Namespace(model="SiT-XL/2", path_type="linear", prediction="v")}, None, "flow",
         "noise_to_data"),
        ("last.pt", {"args": argparse.Namespace(model="SiT-XL/2", proj_coeff=0.5)}, None, "flow", "data_to_noise"),
        ("plain.pt", {}, "repa", "flow", "data_to_noise"),
        ("SiT.pt", {}, "ddpm", "ddpm", None),
        ("site.pt", {}, None, "ddpm", None),
    ],
)  # fmt: skip
def test_sit_and_repa_come_in_as_flows_of_their_own_convention(tmp_path, model, name, extra, hint, process, direction):
    path = saved(tmp_path, {"ema": to_dit(model.arch, model.state_dict()), **extra}, name)
    found = import_model(path, HintsConfig(num_heads=4, process=hint))
    assert found.diffusion.process == process
    assert direction is None or found.diffusion.direction == direction
    assert any("flow matching" in note for note in found.notes) == (process == "flow")


def test_a_flow_of_another_path_is_refused(tmp_path, model):
    content = {
        "ema": to_dit(model.arch, model.state_dict()),
        "args": argparse.Namespace(model="SiT-B/2", path_type="GVP"),
    }
    with pytest.raises(ArtifactError, match="path_type 'GVP'; legal: linear"):
        read_dit(saved(tmp_path, content), HintsConfig(num_heads=4))


def test_a_lightningdit_is_named_and_refused_with_its_reasons(tmp_path, model):
    state = to_dit(model.arch, model.state_dict())
    for i in range(2):
        state[f"blocks.{i}.mlp.w12.weight"] = state.pop(f"blocks.{i}.mlp.fc1.weight")
        state[f"blocks.{i}.norm1.weight"] = torch.ones(32)
    state["feat_rope.freqs_cos"] = torch.ones(4)
    with pytest.raises(ArtifactError, match=r"LightningDiT: it has SwiGLU.*RMSNorm.*rotary.*five matrices") as error:
        read_dit(saved(tmp_path, {"ema": state}), HintsConfig(num_heads=4))
    assert "\n" not in str(error.value)


# --- precisions and old files ----------------------------------------------------------------------------------------


def test_files_of_old_torch_come_in(tmp_path, model):
    """Not archives, and so not to be mapped into memory."""
    torch.save(to_dit(model.arch, model.state_dict()), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    found = read_dit(tmp_path / "old.pt", HintsConfig(num_heads=4))
    assert torch.equal(found.state["patch.bias"], model.state_dict()["patch.bias"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64], ids=str)
def test_other_precisions_come_in_as_float32_position_table_and_all(tmp_path, model, dtype):
    state = {k: v.to(dtype) for k, v in to_dit(model.arch, model.state_dict()).items()}
    found = read_dit(saved(tmp_path, state), HintsConfig(num_heads=4))
    assert {t.dtype for t in found.state.values()} == {torch.float32}
    assert torch.equal(found.state["label.weight"], state["y_embedder.embedding_table.weight"].float())


def test_a_learned_position_table_in_half_precision_is_still_refused(tmp_path, model):
    state = {k: v.half() for k, v in to_dit(model.arch, model.state_dict()).items()}
    state["pos_embed"] = state["pos_embed"] + 2e-3
    with pytest.raises(ArtifactError, match="is not DiT's fixed"):
        read_dit(saved(tmp_path, state), HintsConfig(num_heads=4))


# --- what is not a DiT -----------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_code_in_a_checkpoint_is_not_run(tmp_path, model):
    target = tmp_path / "executed"
    path = saved(tmp_path, {**to_dit(model.arch, model.state_dict()), "extra": Bomb(target)})
    with pytest.raises(ArtifactError, match="nothing in it was run"):
        import_model(path)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(target)))
    with pytest.raises(ArtifactError):
        import_model(tmp_path / "plain.pt")
    assert not target.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("blocks.1.attn.qkv.bias"), ["1 missing: blocks.1.attn.qkv.bias"]),
        (
            lambda s: s.update({"blocks.0.attn.q_norm.weight": torch.ones(8)}),
            ["1 unknown: blocks.0.attn.q_norm.weight"],
        ),
        (lambda s: s.update({"blocks.1.mlp.fc1.weight": torch.ones(128, 31)}), ["blocks.1.in.weight is [128, 31]"]),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 16, 32)}), ["pos_embed is not DiT's fixed"]),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 15, 32)}), ["pos_embed is not DiT's fixed"]),
        (lambda s: s.update({"pos_embed": torch.zeros(16, 32)}), ["a table [1, T, D] of a whole grid"]),
        (lambda s: s.pop("pos_embed"), ["--hints.input-size"]),
        (lambda s: s["blocks.0.attn.proj.bias"].fill_(float("nan")), ["blocks.0.o.bias has NaN"]),
        (lambda s: s.update({"x_embedder.proj.weight": torch.ones(32, 4)}), ["has 4 dimensions"]),
        (lambda s: s.update({"final_layer.linear.weight": torch.ones(12, 32)}), ["3 channels come out and 4 go in"]),
    ],
)
def test_too_many_too_few_and_wrong_tensors_are_named(tmp_path, model, change, words):
    state = to_dit(model.arch, {k: v.clone() for k, v in model.state_dict().items()})
    change(state)
    with pytest.raises(ArtifactError) as error:
        read_dit(saved(tmp_path, state), HintsConfig(num_heads=4))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.eye(32).to_sparse(), "is sparse"),
        (torch.empty(96, 32, device="meta"), "is on the meta device"),
        (torch.quantize_per_tensor(torch.ones(96, 32), 0.1, 0, torch.qint8), "is quantized"),
        (torch.ones(0), "has no numbers .*ZeRO-3"),
        (torch.ones(96, 32, dtype=torch.int32), "not floating-point"),
        (torch.tensor(1.0), r"is \[\]"),
    ],
)
def test_tensors_that_are_no_ordinary_ones_are_refused_in_one_line(tmp_path, model, tensor, words):
    state = to_dit(model.arch, model.state_dict())
    state["blocks.0.attn.qkv.weight"] = tensor
    with pytest.raises(ArtifactError, match=words) as error:
        read_dit(saved(tmp_path, state), HintsConfig(num_heads=4))
    assert "\n" not in str(error.value) and "qkv" in str(error.value)


def test_integer_keys_and_pipes_are_refused_in_one_line(tmp_path):
    with pytest.raises(ArtifactError, match=r"no tensors by name .its keys: 0, 1"):
        read_dit(saved(tmp_path, {0: torch.ones(2), 1: torch.ones(2)}))
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(ArtifactError, match="a pipe, device or socket, and a regular file"):
        import_model(tmp_path / "pipe.pt")


def test_a_u_net_is_refused_by_the_names_of_its_tensors(tmp_path):
    state = {f"down_blocks.{i}.resnets.0.conv1.weight": torch.zeros(3, 3) for i in range(30)}
    with pytest.raises(ArtifactError, match=r"30 unknown: down_blocks.0.*22 more"):
        read_dit(saved(tmp_path, state))


def test_damaged_files_and_other_things_are_one_line(tmp_path, model):
    path = saved(tmp_path, to_dit(model.arch, model.state_dict()))
    blob = path.read_bytes()
    for name, content in {
        "cut.pt": blob[: len(blob) // 2],
        "text.pt": b"hello",
        "empty.pt": b"",
        "x.safetensors": b"1",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtifactError, match=r"damaged|holds more") as error:
            import_model(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(ArtifactError, match="a mapping"):
        import_model(saved(tmp_path, [1, 2]))
    with pytest.raises(ArtifactError, match="no tensors by name"):
        import_model(saved(tmp_path, {"epoch": 3}))
    with pytest.raises(ArtifactError, match="no such file"):
        import_model(tmp_path / "nowhere.pt")


LIMITED = """
import resource, sys
from pathlib import Path
from fine_dist.artifacts.tensor_files import read_tensor_file
from fine_dist.core.errors import ArtifactError
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 30 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    read_tensor_file(Path(sys.argv[1]))
except ArtifactError as error:
    print(error)
"""


def test_a_checkpoint_that_does_not_fit_into_memory_is_not_called_damaged(tmp_path):
    """A real limit of address space, in a process of its own; a file of torch before 1.6 cannot be memory-mapped."""
    torch.save({"weight": torch.zeros(25_000_000)}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "m.pt")], capture_output=True, text=True, timeout=120
    )
    assert "m.pt needs more memory than there is, or is damaged: " in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("\n") == 1


def test_a_model_with_diffusers_frequencies_cannot_be_written_in_a_layout_that_does_not_know_them(tmp_path):
    other = arch(frequency_shift=1)
    with pytest.raises(ConfigError, match="frequency_shift"):
        write_dit(tmp_path / "m.pt", other, DiT(other).state_dict())
    with pytest.raises(ConfigError, match=r"\.pt or \.safetensors"):
        write_dit(tmp_path / "m.bin", arch(), DiT(arch()).state_dict())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_random_xl_2_round_trips_through_both_layouts(tmp_path):
    """675M numbers: about 9 GB of memory and 6 GB of disk, a few minutes of one core."""
    from fine_dist.artifacts.diffusers_export import write_diffusers

    wanted = Arch.model_validate("DiT-XL/2")
    state = lively(DiT(wanted), std=0.02).state_dict()
    write_dit(tmp_path / "xl.pt", wanted, state)
    back = import_model(tmp_path / "xl.pt")
    assert back.arch == wanted
    assert all(torch.equal(back.state[key], value) for key, value in state.items())
    (tmp_path / "xl.pt").unlink()
    del back
    write_diffusers(tmp_path / "xl", wanted, state)
    back = import_model(tmp_path / "xl")
    assert back.arch == wanted
    assert all(torch.equal(back.state[key], value) for key, value in state.items())
