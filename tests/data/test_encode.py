"""Images to latent shards: the arithmetic of the crop, real autoencoders, many processes, interruptions."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from fine_dist.config import load
from fine_dist.data import images
from fine_dist.data.audit import inspect
from fine_dist.data.digits import digits
from fine_dist.data.images import center_crop
from fine_dist.data.progress import Progress
from fine_dist.data.shards import Manifest, write_shards
from fine_dist.data.stream import read_all
from fine_dist.encode import EncodeConfig, main, run
from fine_dist.errors import DataError
from fine_dist.files import open_draft, remove_drafts

ROOT = Path(__file__).resolve().parents[2]


def picture(seed: int, width: int = 70, height: int = 50) -> Image.Image:
    """A smooth random image: what is left of it after JPEG is close to what went in."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of 12, 9 and 4 images of several kinds, sizes and modes, and a file that is none."""
    root = tmp_path_factory.mktemp("images")
    for label, (name, count) in enumerate([("n01_cat", 12), ("n02_dog", 9), ("n03_owl", 4)]):
        (root / name).mkdir()
        for i in range(count):
            image = picture(100 * label + i, 40 + 7 * i, 50 + 3 * i)
            kind = ("JPEG", "png", "jpg")[i % 3]
            if i == 2:
                image = image.convert("L")
            if i == 4:
                image, kind = image.convert("RGBA"), "png"
            image.save(root / name / f"{i}.{kind}", "PNG" if kind == "png" else "JPEG")
        (root / name / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A tiny AutoencoderKL with random weights: 32 px to 4x8x8, saved as diffusers saves one."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.5,
    )
    path = tmp_path_factory.mktemp("vae")
    model.save_pretrained(path)
    return path, model.eval()


def config(folder: Path, out: Path, **fields) -> EncodeConfig:
    return EncodeConfig(
        **{"source": str(folder), "out": str(out), "image_size": 32, "shard_samples": 8, "batch": 4, **fields}
    )


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# --- images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (500, 375), (129, 640), (64, 63), (20, 31), (2000, 65)], ids=str)
def test_crops_equal_adm_s_reference_arithmetic(size):
    """Step by step as published, on an image of its own."""
    image = picture(1, *size)
    expected = image
    while min(*expected.size) >= 2 * 32:
        expected = expected.resize(tuple(x // 2 for x in expected.size), resample=Image.BOX)
    scale = 32 / min(*expected.size)
    expected = expected.resize(tuple(round(x * scale) for x in expected.size), resample=Image.BICUBIC)
    array = np.array(expected)
    y, x = (array.shape[0] - 32) // 2, (array.shape[1] - 32) // 2
    expected_chw = array[y : y + 32, x : x + 32].transpose(2, 0, 1)
    np.testing.assert_array_equal(center_crop(image, 32), expected_chw)


def test_a_folder_becomes_shuffled_shards_of_pixels(folder, tmp_path):
    run(config(folder, tmp_path, dtype="float32"))
    latents, labels = read_all(str(tmp_path / "train"))
    manifest = Manifest.parse((tmp_path / "train" / "manifest.json").read_bytes(), "")
    assert latents.shape == (25, 3, 32, 32) and latents.min() >= -1 and latents.max() <= 1
    assert [shard.count for shard in manifest.shards] == [8, 8, 8, 1]
    assert manifest.class_names == ("n01_cat", "n02_dog", "n03_owl") and manifest.num_classes == 3
    assert torch.bincount(labels).tolist() == [12, 9, 4] and labels.tolist() != sorted(labels.tolist())
    wanted = {
        (center_crop(Image.open(path), 32).tobytes(), label)
        for label, name in enumerate(manifest.class_names)
        for path in (folder / name).iterdir()
        if path.suffix != ".txt"
    }
    pixels = ((latents + 1) * 127.5).round().byte().numpy()
    assert {(image.tobytes(), int(label)) for image, label in zip(pixels, labels)} == wanted


def test_digits_survive_the_way_through_shards_exactly(tmp_path):
    run(EncodeConfig(out=str(tmp_path)))
    for split, count in (("train", 1500), ("held_out", 297)):
        pixels, labels = digits(split)
        found = read_all(str(tmp_path / split))
        assert len(pixels) == count and pixels.min() == -1 and pixels.max() == 1
        np.testing.assert_array_equal(found[0].numpy(), pixels)
        np.testing.assert_array_equal(found[1].numpy(), labels)


def test_webdataset_image_shards_become_one_latent_shard_each(tmp_path):
    for shard in range(2):
        with wds.TarWriter(str(tmp_path / f"images-{shard}.tar"), encoder=False) as tar:
            for i in range(5 + shard):
                stream = io.BytesIO()
                picture(10 * shard + i).save(stream, "JPEG")
                tar.write({"__key__": f"{shard}-{i}", "jpg": stream.getvalue(), "cls": str(i).encode()})
            tar.write({"__key__": f"{shard}-none", "cls": b"1"})
    run(config(tmp_path / "images-{0..1}.tar", tmp_path / "out", max_bad_fraction=0.5))
    latents, labels = read_all(str(tmp_path / "out" / "train"))
    manifest = Manifest.parse((tmp_path / "out" / "train" / "manifest.json").read_bytes(), "")
    assert [shard.count for shard in manifest.shards] == [5, 6] and manifest.num_classes == 6
    assert labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5] and latents.shape[1:] == (3, 32, 32)
    assert [(bad.source, bad.error) for bad in manifest.bad] == [
        (f"images-{i}.tar:{i}-none", "it has no image") for i in range(2)
    ]


def test_a_damaged_image_tar_gives_what_can_be_read_and_is_listed(tmp_path):
    with wds.TarWriter(str(tmp_path / "images.tar"), encoder=False) as tar:
        for i in range(6):
            stream = io.BytesIO()
            picture(i).save(stream, "PNG")
            tar.write({"__key__": str(i), "png": stream.getvalue(), "cls": b"0"})
    os.truncate(tmp_path / "images.tar", (tmp_path / "images.tar").stat().st_size * 2 // 3)
    run(config(tmp_path / "images.tar", tmp_path / "out", max_bad_fraction=0.5))
    manifest = Manifest.parse((tmp_path / "out" / "train" / "manifest.json").read_bytes(), "")
    assert 2 <= manifest.count <= 4 and manifest.bad[-1].error == "the tar is damaged: unexpected end of data"


def corrupt(folder: Path, to: Path) -> Path:
    """A copy of the images in which two are damaged."""
    subprocess.run(["cp", "-r", folder, to], check=True)
    whole = (to / "n01_cat" / "0.JPEG").read_bytes()
    (to / "n01_cat" / "0.JPEG").write_bytes(whole[: len(whole) // 2])
    (to / "n02_dog" / "3.JPEG").write_bytes(b"not an image at all")
    return to


def test_corrupt_images_are_listed_in_the_manifest_and_the_others_encoded(folder, tmp_path):
    broken = corrupt(folder, tmp_path / "images")
    run(config(broken, tmp_path / "out", max_bad_fraction=0.1))
    manifest = Manifest.parse((tmp_path / "out" / "train" / "manifest.json").read_bytes(), "")
    assert manifest.count == 23
    assert sorted(bad.source for bad in manifest.bad) == ["n01_cat/0.JPEG", "n02_dog/3.JPEG"]
    assert all(bad.error for bad in manifest.bad)


def test_too_many_corrupt_images_are_an_error_and_a_higher_limit_continues(folder, tmp_path):
    broken = corrupt(folder, tmp_path / "images")
    with pytest.raises(DataError, match=r"of 25 images cannot be read, more than max_bad_fraction 0\.01 allows"):
        run(config(broken, tmp_path / "out", max_bad_fraction=0.01))
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()
    run(config(broken, tmp_path / "out", max_bad_fraction=0.1))
    assert read_all(str(tmp_path / "out" / "train"))[0].shape[0] == 23


# --- the autoencoder -----------------------------------------------------------------------------------------------


def reference(model, folder: Path) -> dict[tuple[bytes, int], torch.Tensor]:
    """Means and deviations of every image, one at a time, by its pixels."""
    found = {}
    for label, name in enumerate(sorted(path.name for path in folder.iterdir())):
        for path in (folder / name).iterdir():
            if path.suffix != ".txt":
                pixels = torch.from_numpy(center_crop(Image.open(path), 32)).float()[None] / 127.5 - 1
                with torch.no_grad():
                    dist = model.encode(pixels).latent_dist
                found[path.name, label] = torch.cat([dist.mean, dist.std], 1)[0]
    return found


def test_moments_are_the_autoencoder_s_and_the_stream_scales_them(folder, vae, tmp_path):
    path, model = vae
    run(config(folder, tmp_path, codec="vae", vae=str(path), kind="moments", dtype="float32"))
    latents, labels = read_all(str(tmp_path / "train"))
    manifest = Manifest.parse((tmp_path / "train" / "manifest.json").read_bytes(), "")
    assert manifest.latent_shape == (4, 8, 8) and manifest.stored_shape == (8, 8, 8)
    assert manifest.scaling_factor == 0.5 and manifest.codec == str(path)
    wanted = torch.stack([moments[:4] * 0.5 for moments in reference(model, folder).values()])
    assert len(labels) == len(wanted) == 25
    distance = torch.cdist(latents.flatten(1), wanted.flatten(1))
    # batches of 4 against batches of 1: sums in another order, 1e-6 of values around 1, 256 of them
    assert (distance.min(1).values < 1e-3).all() and sorted(distance.argmin(1).tolist()) == list(range(25))


def test_samples_are_within_the_autoencoder_s_distribution_and_do_not_depend_on_who_drew_them(folder, vae, tmp_path):
    path, model = vae
    run(config(folder, tmp_path / "a", codec="vae", vae=str(path), dtype="float32"))
    run(config(folder, tmp_path / "m", codec="vae", vae=str(path), dtype="float32", kind="moments"))
    run(config(folder, tmp_path / "b", codec="vae", vae=str(path), dtype="float32", workers=1))
    latents, _ = read_all(str(tmp_path / "a" / "train"))
    mean, _ = read_all(str(tmp_path / "m" / "train"))
    stds = torch.stack([moments[4:] for moments in reference(model, folder).values()])
    noise = (latents - mean) / 0.5
    # 6,400 draws with deviation std: their root mean square is std's, to 1 / sqrt(2 * 6400) = 0.9%
    assert abs(noise.square().mean().sqrt() / stds.square().mean().sqrt() - 1) < 0.05
    assert torch.equal(latents, read_all(str(tmp_path / "b" / "train"))[0])


def test_mirror_images_are_entries_of_their_own(folder, vae, tmp_path):
    path, _ = vae
    run(config(folder, tmp_path / "pixels", flips=True, dtype="float32"))
    latents, labels = read_all(str(tmp_path / "pixels" / "train"))
    assert latents.shape[0] == 50 and torch.equal(labels[::2], labels[1::2])
    assert torch.equal(latents[::2].flip(-1), latents[1::2])
    run(config(folder, tmp_path / "vae", flips=True, codec="vae", vae=str(path), kind="moments", limit=6))
    manifest = Manifest.parse((tmp_path / "vae" / "train" / "manifest.json").read_bytes(), "")
    assert manifest.flips and manifest.count == 12 and manifest.shards[0].count == 8


def test_an_autoencoder_that_is_not_there_or_does_not_fit_says_so(folder, vae, tmp_path):
    path, _ = vae
    with pytest.raises(DataError, match="no AutoencoderKL can be loaded"):
        run(config(folder, tmp_path, codec="vae", vae=str(tmp_path)))
    with pytest.raises(DataError, match="sides that are multiples of 4, not 3x30x30"):
        run(config(folder, tmp_path, codec="vae", vae=str(path), image_size=30))


def test_a_transformer_where_an_autoencoder_is_needed_is_named_as_what_it_is(folder, tmp_path, capsys):
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(num_layers=1, num_attention_heads=2, attention_head_dim=8, sample_size=8)
    model.save_pretrained(tmp_path / "dit")
    argv = ["--source", str(folder), "--out", str(tmp_path / "out"), "--codec", "vae", "--vae", str(tmp_path / "dit")]
    assert main([*argv, "--launcher", "here"]) == 2
    assert "it is a DiTTransformer2DModel, and an AutoencoderKL is needed" in capsys.readouterr().err


# --- progress, leftovers -------------------------------------------------------------------------------------------


def test_a_terminal_sees_a_bar_with_rate_and_time_left(folder, tmp_path):
    mine, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 150, 0, 0))
    argv = ["--source", folder, "--out", tmp_path, "--image-size", "32", "--shard-samples", "4", "--batch", "2"]
    command = [sys.executable, "-m", "fine_dist.encode", *map(str, argv), "--launcher", "here"]
    done = subprocess.run(command, stderr=theirs, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # EIO: all is read, and nobody is at the other end
        while piece := os.read(mine, 1 << 16):
            seen += piece
    os.close(mine)
    assert done.returncode == 0, seen
    assert re.search(rb"25/25 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+ images/s\]", seen), seen


def test_a_log_gets_a_line_with_rate_and_time_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fine_dist.data.progress.EVERY_S", 0.0)
    bar = Progress(tmp_path, 100, 10)
    bar.show(2, 0)  # what others had done before
    assert bar.line(30, 2.0) == f"encode: {tmp_path}: 30 of 100 images, 5/s, 00:14 left"
    time.sleep(0.01)
    bar.show(3, 5)
    assert "35 of 100 images" in capsys.readouterr().out
    bar.close()


def test_drafts_of_killed_writers_go_and_those_of_living_ones_stay(folder, tmp_path):
    out = tmp_path / "train"
    out.mkdir()
    code = "import sys, time; from pathlib import Path; from fine_dist.files import open_draft; "
    code += "kept = [open_draft(Path(path)) for path in sys.argv[1:]]; print('ready', flush=True); time.sleep(60)"
    # the draft of a manifest, of a shard beyond those of this encoding, and of a mark
    paths = [out / name for name in ("manifest.json", "latents-000099.tar", ".latents-000000.tar.json")]
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, paths)], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.kill()
    process.wait()
    assert len(list(out.glob(".*.part"))) == 3
    (out / ".latents-000000.tar.lock").touch()  # of one killed between a unit's end and its release
    with open_draft(out / "other.json") as living:
        run(config(folder, tmp_path))
        assert [path.name for path in out.glob(".*.part")] == [Path(living.name).name]
    assert remove_drafts(out) == 1
    assert not list(out.glob(".*"))


def test_ctrl_c_promises_what_is_true(tmp_path):
    argv = ["--source", "pipe:exec sleep 60", "--out", str(tmp_path), "--launcher", "here"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fine_dist.encode", *argv], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "train" / ".latents-000000.tar.lock").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    assert f"interrupted; the shards that are done stay in {tmp_path}, and the same command continues" in said


# --- many processes, interruptions ---------------------------------------------------------------------------------


def encode_slowly(settings: EncodeConfig, pause_s: float) -> None:
    """Run in a process of its own."""

    def slowly(image, size, background):
        time.sleep(pause_s)
        return center_crop(image, size, background)

    images.center_crop = slowly
    run(settings)


@pytest.mark.distributed
def test_processes_share_the_shards_and_one_that_is_killed_costs_nothing(folder, tmp_path):
    run(config(folder, tmp_path / "alone", shard_samples=4, batch=2))
    shared = config(folder, tmp_path / "shared", shard_samples=4, batch=2, workers=1)
    out = tmp_path / "shared" / "train"
    context = multiprocessing.get_context("fork")
    victim = context.Process(target=encode_slowly, args=(shared, 0.3))
    victim.start()
    deadline = time.monotonic() + 60
    while not list(out.glob(".latents-*.part")) and time.monotonic() < deadline:
        time.sleep(0.005)
    others = [context.Process(target=encode_slowly, args=(shared, 0.02)) for _ in range(2)]
    for process in others:
        process.start()
    while len(list(out.glob("latents-*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(victim.pid, signal.SIGKILL)
    for process in (victim, *others):
        process.join(60)
    assert [process.exitcode for process in (victim, *others)] == [-signal.SIGKILL, 0, 0]
    expected, made = hashes(tmp_path / "alone" / "train"), hashes(out)
    assert sorted(made) == sorted(expected)  # no locks, marks or parts are left
    tars = [name for name in expected if name.endswith(".tar")]
    assert len(tars) == 7 and all(made[name] == expected[name] for name in tars)


def test_an_interrupted_encoding_continues_and_a_finished_one_does_nothing(folder, tmp_path, monkeypatch, capsys):
    expected = hashes(run(config(folder, tmp_path / "whole")) / "train")
    out, read = tmp_path / "out", []

    def interrupted(image, size, background):
        read.append(1)
        if len(read) > 14:
            raise KeyboardInterrupt
        return center_crop(image, size, background)

    monkeypatch.setattr("fine_dist.data.images.center_crop", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config(folder, out, workers=1))
    names = [path.name for path in (out / "train").iterdir()]
    assert "latents-000000.tar" in names and "latents-000003.tar" not in names
    assert "manifest.json" not in names and not any(name.endswith(".part") for name in names)
    first = (out / "train" / "latents-000000.tar").stat().st_mtime_ns
    monkeypatch.setattr("fine_dist.data.images.center_crop", center_crop)
    assert hashes(run(config(folder, out)) / "train") == expected
    assert (out / "train" / "latents-000000.tar").stat().st_mtime_ns == first
    times = {path.name: path.stat().st_mtime_ns for path in (out / "train").iterdir()}
    capsys.readouterr()
    run(config(folder, out))
    assert "is complete: 25 samples in 4 shards" in capsys.readouterr().out
    assert times == {path.name: path.stat().st_mtime_ns for path in (out / "train").iterdir()}


def test_a_folder_is_never_filled_with_two_kinds_of_latents(folder, tmp_path):
    run(config(folder, tmp_path))
    with pytest.raises(DataError, match=r"made with other settings: flips \(flips was False, now True\)"):
        run(config(folder, tmp_path, flips=True))


# --- the command ---------------------------------------------------------------------------------------------------


def test_inspect_prints_what_is_there(folder, tmp_path, capsys):
    run(config(folder, tmp_path))
    assert main(["--inspect", str(tmp_path / "train")]) == 0
    text = capsys.readouterr().out
    for words in ("4 tars", "samples     25", "3x32x32 float16, kind sample, codec identity", "n02_dog", "4 to 12"):
        assert words in text
    assert "warning" not in text


@pytest.mark.parametrize(
    ("std", "factor", "words"),
    [
        (5.5, 0.18215, None),
        (1.0, 0.18215, "applied twice"),
        (5.5, 1.0, "not to be applied at all (a factor near 0.18"),
        (60.0, 0.18215, "far from 1"),
    ],
)
def test_inspect_warns_when_the_scaling_looks_wrong(tmp_path, std, factor, words):
    latents = np.random.default_rng(0).standard_normal((200, 4, 8, 8)) * std
    write_shards(tmp_path, latents, np.arange(200) % 5, num_classes=5, scaling_factor=factor, codec="some-vae")
    summary = inspect(str(tmp_path))
    assert summary.std == pytest.approx(std, rel=0.02) and summary.histogram.tolist() == [40] * 5
    assert summary.channel_std == pytest.approx([std] * 4, rel=0.03)
    assert [words in warning for warning in summary.warnings] == ([True] if words else [])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "out: the folder for the shards is needed"),
        (["--out", "x", "--source", "/absent"], "source: /absent: there is no such folder"),
        (["--out", "x", "--source", "/absent/{0..3}.tar"], "/absent/0.tar: there is no such file (4 of 4 missing)"),
        (["--out", "x", "--codec", "vae"], "small grey images, which no autoencoder takes"),
        (["--out", "x", "--kind", "moments"], "identity has no moments"),
        (["--out", "x", "--split", "test"], "digits have no split 'test'; legal: train, held_out"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*argv, "--launcher", "here"]) == 2
    assert words in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_made_and_makes_nothing(folder, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--source", str(folder), "--out", str(out), "--flips", "--shard-samples", "10", "--dry-run"]
    assert main(flags) == 0
    assert f"{out}/train: 50 samples in 5 shards" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize("name", ["digits", "imagenet256"])
def test_published_configs_are_valid(name):
    path = Path(__file__).parents[2] / "configs" / "encode" / f"{name}.yaml"
    assert load(EncodeConfig, path).out == f"data/{name}"
