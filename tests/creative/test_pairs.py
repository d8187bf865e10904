"""Pairs of concepts: our list, a user's files, the split, and the pair of each sample."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fine_dist.core.errors import DataError
from fine_dist.creative.config import CreativeConfig
from fine_dist.creative.pairs import PairStream, make_pairs, read_concepts


def unordered(pairs):
    return {frozenset(pair) for pair in pairs}


def test_the_projects_list_is_60_plain_words():
    words = read_concepts(None)
    assert len(words) == len(set(words)) == 60
    assert all(word.isalpha() and word.islower() for word in words)


def test_held_out_pairs_are_never_trained_on_in_neither_order():
    pairs = make_pairs(CreativeConfig())
    assert (len(pairs.trained), len(pairs.held_out)) == (200, 27)
    assert not unordered(pairs.trained) & unordered(pairs.held_out)
    assert len(unordered(pairs.all)) == 227
    assert make_pairs(CreativeConfig(seeds=(5,))) == pairs  # runs of all seeds are measured on the same pairs
    assert make_pairs(CreativeConfig(split_seed=1)) != pairs


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_users_pairs_are_taken_as_they_stand(tmp_path, delimiter):
    path = tmp_path / "pairs.csv"
    given = [("sea urchin", "lamp"), ("fox", "clock"), ("owl", "boat"), ("fern", "drum")]
    path.write_text("\n".join(delimiter.join(pair) for pair in given) + "\n\n", encoding="utf-8")
    pairs = make_pairs(CreativeConfig(pairs=str(path), held_out=1))
    assert sorted(pairs.all) == sorted(given) and len(pairs.held_out) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lettuce\nmantis\n", r"line 1: 1 column\(s\) in 'lettuce'"),
        ("owl,fox\nowl\n", r"line 2: 1 column\(s\)"),
        ("owl,fox,crab\n", r"line 1: 3 column\(s\)"),
        ("owl,\n", r"line 1: 1 column\(s\)"),
        ("owl,fox\nfox,owl\n", "line 2: repeats the pair of line 1"),
        ("owl,owl\n", "paired with itself"),
        ("owl,fox\n", "1 pairs, and held_out: 27 leaves none to train on"),
        (b"\xff\xfeowl", "not UTF-8"),
    ],
)
def test_a_pair_file_that_cannot_be_used_is_refused_by_its_line(tmp_path, text, words):
    path = tmp_path / "pairs.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=words):
        make_pairs(CreativeConfig(pairs=str(path)))


def test_a_word_list_must_make_enough_pairs(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("owl\nfox\ncrab\ntrain\n")
    pairs = make_pairs(CreativeConfig(concepts=str(path), num_pairs=4, held_out=2))
    assert len(pairs.trained) == 4 and len(pairs.held_out) == 2
    with pytest.raises(DataError, match="4 words make 6 pairs, and num_pairs 200 with held_out 27 need 227"):
        make_pairs(CreativeConfig(concepts=str(path)))
    path.write_text("owl\nowl\n")
    with pytest.raises(DataError, match="'owl' occurs twice"):
        make_pairs(CreativeConfig(concepts=str(path)))
    with pytest.raises(DataError, match="No such file"):
        make_pairs(CreativeConfig(pairs=str(tmp_path / "nowhere.csv")))


def take(stream, steps, start=0):
    batches = stream.batches(start)
    return [next(batches) for _ in range(steps)]


def test_the_pair_of_a_sample_depends_on_seed_step_and_position_alone():
    whole = take(PairStream([3, 4, 3], 50, global_batch=6), 5)
    ranks = [take(PairStream([3, 4, 3], 50, global_batch=6, rank=r, world_size=3), 5) for r in range(3)]
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert torch.equal(torch.cat([part.pairs for part in parts]), batch.pairs)
        assert torch.equal(torch.cat([part.positions for part in parts]), torch.arange(6))
        assert torch.equal(batch.pairs[:, 0], batch.pairs[:, 2])  # one seed, one choice, whatever the company
        assert not torch.equal(batch.pairs[:, 0], batch.pairs[:, 1])
    later = take(PairStream([3, 4, 3], 50, global_batch=6), 2, start=3)
    assert [torch.equal(a.pairs, b.pairs) and a.step == b.step for a, b in zip(later, whole[3:])] == [True, True]
    alone = take(PairStream([4], 50, global_batch=6), 5)
    assert all(torch.equal(a.pairs[:, 0], b.pairs[:, 1]) for a, b in zip(alone, whole))


def test_every_pair_is_drawn_about_as_often_as_any_other():
    drawn = Counter(
        torch.cat([batch.pairs for batch in take(PairStream([0], 20, global_batch=100), 100)]).flatten().tolist()
    )
    assert sorted(drawn) == list(range(20))
    assert all(abs(count - 500) < 5 * 500**0.5 for count in drawn.values())  # five standard deviations


def test_a_batch_is_cut_into_micro_batches():
    (batch,) = take(PairStream([0, 1], 50, global_batch=6), 1)
    part = batch.part(2, 3)
    assert len(batch) == 6 and len(part) == 3
    assert torch.equal(part.pairs, batch.pairs[2:5]) and part.positions.tolist() == [2, 3, 4]
    assert torch.equal(batch.to(torch.device("cpu")).pairs, batch.pairs)
    with pytest.raises(DataError, match="a batch of 6 pairs cannot be divided over 4 processes"):
        PairStream([0], 50, global_batch=6, world_size=4)
