"""The order of samples is a pure function of (seed, step, position)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fine_dist.data.order import Order

UNEVEN = [7, 31, 1, 50, 12, 29, 64, 3, 18, 5]


def order(counts=UNEVEN, **fields):
    return Order(counts, **{"seed": 3, "global_batch": 12, "streams": 4, "window": 40, **fields})


def ids(order: Order, num_batches: int, start: int = 0) -> np.ndarray:
    """Sample numbers of global batches, [num_batches, B]: by the definition, one batch and stream after the other."""
    first = np.concatenate([[0], np.cumsum(order.counts)])
    batches = []
    for step in range(start, start + num_batches):
        parts = [order.take(s, step * order.per_stream, order.per_stream) for s in range(order.streams)]
        batches.append(np.concatenate([first[shard] + index for shard, index in parts]))
    return np.stack(batches)


@pytest.mark.parametrize("counts", [UNEVEN, [100] * 8, [1], [5, 6], [1] * 30], ids=str)
@pytest.mark.parametrize("global_batch", [1, 12, 64])
@pytest.mark.parametrize("window", [1, 40, 10_000])
def test_every_sample_comes_exactly_once_an_epoch_for_every_stream_of_epochs(counts, global_batch, window):
    it = order(counts, global_batch=global_batch, window=window)
    total, epochs = sum(counts), 5
    num_batches = -(-epochs * total // global_batch)
    flat = [ids(it, num_batches)[:, s * it.per_stream : (s + 1) * it.per_stream].ravel() for s in range(it.streams)]
    for epoch in range(epochs):
        # stream s has read floor((e N + s) / C) samples when epoch e begins
        parts = []
        for s in range(it.streams):
            begin, end = ((e * total + s) // it.streams for e in (epoch, epoch + 1))
            parts.append(flat[s][begin:end])
        seen = Counter(np.concatenate(parts).tolist())
        assert seen == Counter(range(total)), f"epoch {epoch}"


def test_when_the_batch_divides_the_epoch_no_batch_mixes_epochs():
    it = order([24] * 10, global_batch=12)
    for epoch in range(3):
        assert sorted(ids(it, 20, 20 * epoch).ravel()) == list(range(240))
        assert it.epoch(20 * epoch) == epoch and it.epoch(20 * epoch + 19) == epoch


def test_starting_in_the_middle_gives_what_an_uninterrupted_read_gives():
    whole = ids(order(), 200)
    for start in (1, 17, 18, 19, 93, 150):
        np.testing.assert_array_equal(ids(order(), 40, start), whole[start : start + 40])


def test_every_epoch_and_seed_has_another_order_and_the_same_seed_the_same():
    epochs = ids(order([24] * 10), 40)
    assert not np.array_equal(epochs[:20], epochs[20:])
    np.testing.assert_array_equal(epochs, ids(order([24] * 10), 40))
    assert not np.array_equal(epochs, ids(order([24] * 10, seed=4), 40))


def test_as_many_streams_as_the_shards_allow_and_the_batch_divides_by():
    assert order([10] * 100, global_batch=64, streams=64).streams == 64
    assert order([10] * 100, global_batch=96, streams=64).streams == 48
    assert order([10] * 5, global_batch=64, streams=64).streams == 4
    assert order([10], global_batch=64, streams=64).streams == 1
    assert order([10] * 100, global_batch=7, streams=64).streams == 7


def test_a_window_shuffles_over_all_its_shards():
    it = order([50] * 8, global_batch=1, streams=1, window=200)
    shard, _ = it.take(0, 0, 200)
    assert len(set(shard.tolist())) == 4
    # in a random order of 4 shards' samples about 3/4 of all neighbors come from different shards; in file order 3
    assert (shard[1:] != shard[:-1]).sum() > 100


def test_a_batch_takes_the_same_number_of_samples_from_every_stream_and_they_spread_over_the_data():
    it = order([100] * 64, global_batch=64, streams=64, window=100)
    shard = ids(it, 1)[0] // 100
    assert len(set(shard.tolist())) == 64
