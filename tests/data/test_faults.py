"""Every kind of damage is named with its shard and key; below the limit it is skipped, the same way for everyone."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch

from fine_dist.core.errors import DataError
from fine_dist.data.audit import verify
from fine_dist.data.manifest import MANIFEST, Manifest
from fine_dist.data.records import all_finite, layout_of
from fine_dist.data.settings import DataConfig
from fine_dist.data.shards import ShardWriter
from fine_dist.data.stream import read_all
from fine_dist.encode import main
from tests.data.making import SHAPE, make, make_foreign, npy, numbers, sample, stream, take

BAD = 12
"""The sample that is damaged; it is in shard 1 of 0 .. 2."""


class Trap:
    """Unpickling it would leave a mark."""

    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


ONE_SAMPLE = {
    "wrong dtype": ({"latent_npy": npy(np.zeros(SHAPE, np.float64))}, "float64 1x4x4, not float16 1x4x4"),
    "wrong shape": ({"latent_npy": npy(np.zeros((1, 4, 5), np.float16))}, "float16 1x4x5, not float16 1x4x4"),
    "NaN": ({"latent_npy": npy(np.full(SHAPE, np.nan, np.float16))}, "NaN or Inf"),
    "Inf": ({"latent_npy": npy(np.full(SHAPE, np.inf, np.float16))}, "NaN or Inf"),
    "no latent": ({"latent_npy": None}, r"no \.latent\.npy \(it has: cls\)"),
    "no label": ({"cls": None}, r"no \.cls \(it has: latent\.npy\)"),
    "a label out of range": ({"cls": b"10"}, "label 10, but there are 10 classes"),
    "a negative label": ({"cls": b"-1"}, "label is '-1', not a whole number"),
    "no number as label": ({"cls": b"cat"}, "label is 'cat', not a whole number"),
    "a pickle beside the latent": (
        {"extra.pth": pickle.dumps(Trap())},
        r"extra\.pth' is a pickle, which is never read",
    ),
    "a pickle for a latent": ({"latent_npy": None, "pth": pickle.dumps(Trap())}, "is a pickle, which is never read"),
    "pickled objects in the .npy": ({"latent_npy": npy(np.array([Trap()]), True)}, "pickled object array"),
    "no .npy at all": ({"latent_npy": b"latent"}, "not a .npy file"),
    "a short .npy": ({"latent_npy": npy(np.zeros(SHAPE, np.float16))[:-4]}, "28 bytes of numbers, not 32"),
    "another byte order": ({"latent_npy": npy(np.zeros(SHAPE, ">f2"))}, "big-endian"),
    "a name that leads outside": ({"__key__": "../../sample0012"}, "leads outside the shard"),
    "a key that is there twice": ({"__key__": "sample0010"}, "key 'sample0010' is there twice"),
}


def damaged(folder, changes) -> None:
    samples = [sample(i, **(changes if i == BAD else {})) for i in range(24)]
    make_foreign(folder, [samples[:8], samples[8:16], samples[16:]])


@pytest.mark.parametrize("fault", ONE_SAMPLE)
def test_a_damaged_sample_is_named_and_below_the_limit_skipped_alike_by_all(fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes, words = ONE_SAMPLE[fault]
    damaged(tmp_path, changes)
    with pytest.raises(DataError, match=rf"other-1\.tar: \S*sample001[02]: .*{words}.* \(1 of 24 samples"):
        take(stream(tmp_path), 4)
    with pytest.raises(DataError, match="sample001"):
        read_all(str(tmp_path))
    source = stream(tmp_path, max_bad_fraction=0.1)
    whole = numbers(take(source, 20))
    assert source.bad == 1 and BAD not in whole
    halves = [
        numbers(take(stream(tmp_path, max_bad_fraction=0.1, rank=r, world_size=2, workers=r), 20)) for r in range(2)
    ]
    assert torch.equal(torch.cat(halves, dim=1), whole)
    again = numbers(take(stream(tmp_path, max_bad_fraction=0.1), 9, start=11))
    assert torch.equal(again, whole[11:])
    assert not (tmp_path / "unpickled").exists()


def truncate(folder):
    path = folder / "latents-000001.tar"
    os.truncate(path, path.stat().st_size - 20_000)


def flip_a_bit(folder):
    with open(folder / "latents-000001.tar", "r+b") as tar:
        tar.seek(5 * layout_of(SHAPE, "float16").stride + layout_of(SHAPE, "float16").head)
        tar.write(b"\1")


def remove(folder):
    (folder / "latents-000001.tar").unlink()


def promise_more(folder):
    manifest = Manifest.parse((folder / MANIFEST).read_bytes(), "")
    shards = list(manifest.shards)
    shards[1] = shards[1].model_copy(update={"count": shards[1].count + 30})
    manifest.model_copy(update={"shards": tuple(shards), "count": manifest.count + 30}).save(folder)


WHOLE_SHARD = {
    "truncated": (truncate, "size", "truncated or replaced"),
    "another sha256": (flip_a_bit, "sha256", "sha256 is not the manifest's"),
    "absent": (remove, "size", "the manifest lists this shard, but it is absent"),
    "fewer samples than the manifest says": (promise_more, "size", "the manifest says 60 samples; it has"),
}


@pytest.mark.parametrize("fault", WHOLE_SHARD)
def test_a_damaged_shard_is_named_and_below_the_limit_skipped_alike_by_all(fault, tmp_path):
    make(tmp_path, [30, 30, 30, 30])
    damage, check, words = WHOLE_SHARD[fault]
    damage(tmp_path)
    with pytest.raises(DataError, match=rf"latents-000001\.tar: .*{words}"):
        take(stream(tmp_path, verify=check), 10)
    source = stream(tmp_path, verify=check, max_bad_fraction=0.5)
    whole = numbers(take(source, 20))
    assert source.bad == (60 if damage is promise_more else 30)
    assert not set(whole.flatten().tolist()) & set(range(30, 60))
    halves = [
        numbers(take(stream(tmp_path, verify=check, max_bad_fraction=0.5, rank=r, world_size=2), 20)) for r in range(2)
    ]
    assert torch.equal(torch.cat(halves, dim=1), whole)


def overwrite(record: int, at: int, content: bytes):
    """Damage in place, so that the size of the shard stays what it was."""

    def damage(folder):
        with open(folder / "latents-000001.tar", "r+b") as tar:
            tar.seek(record * layout_of(SHAPE, "float16").stride + at)
            tar.write(content)

    return damage


def copy_record(folder):
    stride = layout_of(SHAPE, "float16").stride
    with open(folder / "latents-000001.tar", "r+b") as tar:
        tar.seek(3 * stride)
        content = tar.read(stride)
        tar.seek(5 * stride)
        tar.write(content)


HEAD = layout_of(SHAPE, "float16").head
IN_PLACE = {
    "NaN": (overwrite(5, HEAD + 2, np.float16("nan").tobytes()), "NaN or Inf"),
    "a label out of range": (overwrite(5, 512, b"77"), "label 77, but there are 10 classes"),
    "no number as label": (overwrite(5, 512, b"x"), "label is 'x', not a whole number"),
    "a label with a tail": (overwrite(5, 512, b"3x"), "label is '3x', not a whole number"),
    "another dtype": (overwrite(5, HEAD - 128 + 22, b"i2"), "not float16 1x4x4 as the manifest says"),
    "a record twice": (copy_record, r"entry '000001-000003\.cls' where 000001-000005\.cls belongs"),
    "another name": (overwrite(5, 1024, b"../../001-000005.latent.npy\0"), r"entry '\.\./\.\./001-000005\.latent"),
    "zeros": (overwrite(5, 0, bytes(1536)), "entry '' where 000001-000005.cls belongs"),
}


@pytest.mark.parametrize("fault", IN_PLACE)
def test_damage_within_our_own_shards_is_seen_at_every_reading_and_by_verify(fault, tmp_path):
    make(tmp_path, [30, 30])
    damage, words = IN_PLACE[fault]
    damage(tmp_path)
    with pytest.raises(DataError, match=rf"latents-000001\.tar: 000001-000005: .*{words}"):
        take(stream(tmp_path), 5)
    source = stream(tmp_path, max_bad_fraction=0.1)
    assert 35 not in numbers(take(source, 20)) and source.bad == 1
    _, problems = verify(str(tmp_path))
    assert problems == ["latents-000001.tar: its sha256 is not the manifest's: damaged or replaced"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_pattern_that_is_no_number_is_found_and_no_number_is_taken_for_one(dtype):
    # the upper 16 bits of a number: some of all, and those beside the borders; below them zeros, or ones
    some = np.r_[
        0 : 2**16 : 61, 0x7BFF, 0x7C00, 0x7C01, 0x7F7F, 0x7F80, 0x7F81, 0x7FFF, 0x8000, 0xFBFF, 0xFC00, 0xFF80, 0xFFFF
    ]
    words = some.astype(np.uint16) if dtype == "float16" else (np.r_[some, some].astype(np.uint32) << 16)
    if dtype == "float32":
        words[len(some) :] |= 0xFFFF
    numbers = words.view(dtype)
    found = [all_finite(number) for number in numbers[:, None]]
    assert found == np.isfinite(numbers).tolist()
    assert all_finite(numbers[np.isfinite(numbers)]) and all_finite(numbers[:0])


def test_verify_names_the_samples_of_tars_whose_hash_is_right_but_whose_content_is_not(tmp_path, capsys):
    damaged(tmp_path, {"cls": b"99"})
    assert main(["--verify", str(tmp_path)]) == 2
    assert "other-1.tar: sample0012: label 99, but there are 10 classes" in capsys.readouterr().err
    make(tmp_path / "good", [5, 6])
    assert main(["--verify", str(tmp_path / "good")]) == 0
    assert "11 samples in 2 shards are as the manifest says" in capsys.readouterr().out


def test_a_truncated_tar_of_another_program_is_named_even_when_nothing_is_verified(tmp_path):
    make_foreign(tmp_path, [[sample(i) for i in range(20)]])
    os.truncate(tmp_path / "other-0.tar", 20_000)
    with pytest.raises(DataError, match=r"other-0\.tar: .*truncated"):
        take(stream(tmp_path, verify="none"), 2)


def test_a_tar_of_another_program_is_walked_once_and_again_when_it_changed(tmp_path, monkeypatch):
    from fine_dist.data import shard_file as opened
    from fine_dist.data.reader import ShardSet

    make_foreign(tmp_path, [[sample(i) for i in range(6)]])
    walked, real = [], opened.index_tar
    monkeypatch.setattr(opened, "index_tar", lambda *each: walked.append(1) or real(*each))
    shards = ShardSet(str(tmp_path), DataConfig())
    every = np.zeros(6, np.int64), np.arange(6)

    def read():
        rows = shards.read(*every)
        shards.keep_open(set(), [])
        assert rows.latents.flatten(1)[:, 0].tolist() == list(range(6)) and not rows.faults

    read()
    read()
    assert len(walked) == 1
    assert shards.shard(0).ready().key(4) == "sample0004"  # only who asks for a name walks again
    assert len(walked) == 2
    shards.keep_open(set(), [])
    os.utime(tmp_path / "other-0.tar", (1, 1))
    read()
    assert len(walked) == 3


def test_a_data_set_in_which_nothing_can_be_read_is_an_error_and_not_a_hang(tmp_path):
    make(tmp_path, [10, 10])
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match="absent"):
        take(stream(tmp_path, max_bad_fraction=0.99), 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a manifest of latent shards"),
        ('{"count": 1}', "latent_shape: field required"),
        (None, "count is 21, but its shards add up to 20"),
        ("..", "is not a plain file name"),
        ("[]", r"input should be an object \(got \[\]\)"),
        ('{"format": 1}', "format: input should be 'fine_dist/latents/1'"),
        ("[" * 100000, "recursion limit"),
        ({"sha256": None}, "shards.0.sha256: field required"),
        ({"latent_shape": [0, 4, 4]}, "latent_shape.0: input should be greater than or equal to 1"),
        ({"latent_shape": [10**9, 10**9, 4]}, "latent_shape.0: input should be less than or equal to 65536"),
        ({"latent_shape": [60000, 60000, 4]}, "numbers a sample; at most"),
        ({"num_classes": 10**15}, "num_classes: input should be less"),
        ({"count": 10**8}, "100000000 samples cannot be in"),
    ],
)
def test_a_manifest_that_is_none_says_what_is_wrong_with_it(tmp_path, text, words):
    manifest = make(tmp_path, [20])
    if text is None:
        text = manifest.model_copy(update={"count": 21}).model_dump_json()
    elif text == "..":
        text = manifest.model_dump_json().replace("latents-000000.tar", "../latents-000000.tar")
    elif isinstance(text, dict):
        fields = json.loads(manifest.model_dump_json())
        fields.update({key: value for key, value in text.items() if key != "sha256"})
        fields["shards"][0].update({key: value for key, value in text.items() if key in ("count", "sha256")})
        if "sha256" in text:
            del fields["shards"][0]["sha256"]
        text = json.dumps(fields)
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=words):
        stream(tmp_path)


@pytest.mark.parametrize(("by", "words"), [(1, "it has fewer"), (-1, "it has more")])
def test_a_count_that_is_off_by_one_is_named_and_nothing_is_dropped_unsaid(tmp_path, by, words, capsys):
    make(tmp_path, [7, 11, 3])
    fields = json.loads((tmp_path / MANIFEST).read_text())
    fields["shards"][1]["count"] += by
    fields["count"] += by
    (tmp_path / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(DataError, match=rf"latents-000001\.tar: the manifest says {11 + by} samples; {words}"):
        take(stream(tmp_path), 4)
    for flag in ("--verify", "--inspect"):
        assert main([flag, str(tmp_path)]) == 2
        assert words in capsys.readouterr().err


def test_index_refuses_numbers_that_are_not_finite(tmp_path, capsys):
    bad = npy(np.full(SHAPE, np.nan, np.float16))
    make_foreign(tmp_path, [[sample(0), sample(1, latent_npy=bad)]], manifest=False)
    assert main(["--index", str(tmp_path)]) == 2
    assert "other-0.tar: sample0001: the latent has NaN or Inf" in capsys.readouterr().err
    assert not (tmp_path / MANIFEST).exists()


@pytest.mark.parametrize("size", ["-5000", "abc", "9" * 30])
def test_a_tar_whose_header_lies_about_sizes_ends_in_words(tmp_path, size, capsys):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("x.cls")
        info.size, info.pax_headers = 1, {"size": size, "path": "x.cls"}
        tar.addfile(info, io.BytesIO(b"1"))
    assert main(["--index", str(tmp_path)]) == 2
    assert "a.tar: " in capsys.readouterr().err


def test_a_writer_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(DataError, match="NaN or Inf as float16"), ShardWriter(tmp_path, 0, SHAPE) as writer:
        writer.add(np.zeros(SHAPE), 0)
        writer.add(np.full(SHAPE, 1e6), 0)  # more than float16 can hold
    with pytest.raises(DataError, match=r"shape \(2, 2\), not \(1, 4, 4\)"), ShardWriter(tmp_path, 0, SHAPE) as writer:
        writer.add(np.zeros((2, 2)), 0)
    assert list(tmp_path.iterdir()) == []


def test_equal_samples_give_equal_bytes(tmp_path):
    one, two = make(tmp_path / "a", [5]), make(tmp_path / "b", [5])
    assert one.shards == two.shards and one.hash == two.hash
    with tarfile.open(tmp_path / "a" / "latents-000000.tar") as tar:
        assert tar.getnames()[:2] == ["000000-000000.cls", "000000-000000.latent.npy"]
        member = tar.extractfile("000000-000003.latent.npy")
        assert (np.load(io.BytesIO(member.read()), allow_pickle=False) == 3).all()


def test_a_training_run_counts_the_damaged_samples_in_tensorboard_and_its_metrics(tmp_path):
    """The whole way, through the train command."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from fine_dist import train

    make(tmp_path / "shards", [30, 30])
    overwrite(5, HEAD + 2, np.float16("nan").tobytes())(tmp_path / "shards")
    flags = ["--steps", "10", "--batch", "12", "--data.max-bad-fraction", "0.1", "--engine.log-every", "5"]
    config = tmp_path / "train.yaml"
    config.write_text(
        f"run_dir: {tmp_path}/run\ndata: {{shards: {tmp_path}/shards}}\narch: {{hidden_size: 16, num_layers: 1, "
        "num_heads: 2, patch_size: 2, in_channels: 1, input_size: 4, num_classes: 10, learn_sigma: false}\n"
    )
    assert train.main(["--config", str(config), *flags, "--launcher", "here"]) == 0
    board = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.value for event in board.Scalars("train/damaged_samples")][-1] == 1
