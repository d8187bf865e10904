"""What the speed benchmark compares: loops that compute the same updates."""

from __future__ import annotations

import pytest
import torch

from benchmarks.creative import Inversion, Ours, Whole
from fine_dist.creative.config import CreativeConfig
from fine_dist.creative.pairs import make_pairs


def test_the_loops_that_are_timed_learn_the_same_row_and_textual_inversion_puts_the_others_back(encoders):
    encoder, pairs = encoders[1], make_pairs(CreativeConfig())
    ours = Ours(encoder, pairs, 3, [0], cache=True)
    others = [Ours(encoder, pairs, 3, [0], cache=False), Whole(encoder, pairs, 3), Inversion(encoder, pairs, 3)]
    expected = [ours() for _ in range(5)]
    for other in others:
        assert [other() for _ in range(5)] == pytest.approx(expected, rel=1e-5)
    row = ours.model.clip_g[0]
    torch.testing.assert_close(others[0].model.clip_g[0], row, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(others[1].row, row, rtol=1e-4, atol=1e-5)
    table = others[2].table
    torch.testing.assert_close(table[encoder.token_id], row, rtol=1e-4, atol=1e-5)
    assert torch.equal(table[: encoder.token_id], encoder.table)
