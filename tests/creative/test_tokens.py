"""The loss against a naive reference, what may train, and rows that train together against rows alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from fine_dist.creative.config import Template
from fine_dist.creative.pairs import PairStream
from fine_dist.creative.tokens import RowSpec, TokenObjective, Tokens, common_beginning, shuffle
from tests.creative.conftest import TOKEN, grown, whole_forward

PAIRS = [("lettuce", "mantis"), ("owl", "teapot"), ("fox", "clock"), ("crab", "lamp"), ("bat", "piano")]
PLAIN = Template()
BLEND = Template(adaptive="{token}, a creative blend of {t1}", restrictive="an image of {t1} {t2}")
LATE = Template(adaptive="a photo of a {t2} like a {token} {t1}", restrictive="a {t2} {t1}")


def make(encoders, specs, **fields):
    return Tokens(encoders, specs, PAIRS, token=TOKEN, start="creative", **fields)


def naive_losses(encoders, rows, template, pairs):
    """The equation of the paper, prompt by prompt, through transformers' own forward pass of whole prompts: losses of
    each pair as a function of the clamp."""
    cosines = []
    for encoder in encoders:
        model = grown(encoder, rows[encoder.key])
        for first, second in pairs:
            for t1, t2 in ((first, second), (second, first)):
                words = {"token": TOKEN, "t1": t1, "t2": t2}
                with torch.no_grad():
                    adaptive = whole_forward(encoder, model, [template.adaptive.format(**words)])
                    restrictive = whole_forward(encoder, model, [template.restrictive.format(**words)])
                cosines.append(float(F.cosine_similarity(adaptive, restrictive)))
    each = 2 * len(pairs)

    def losses(max_cosine):
        found = [0.0] * len(pairs)
        for place, cosine in enumerate(cosines):
            found[place % each // 2] += (1 - min(cosine, max_cosine)) / 2
        return torch.tensor(found)

    return losses


@pytest.mark.parametrize("template", [PLAIN, BLEND, LATE], ids=["plain", "blend", "late"])
def test_the_loss_is_the_papers_equation(encoders, template):
    rows = {encoder.key: torch.randn(encoder.width, generator=torch.Generator().manual_seed(1)) for encoder in encoders}
    batch = next(PairStream([0], len(PAIRS), global_batch=4).batches())
    expected = naive_losses(encoders, rows, template, [PAIRS[i] for i in batch.pairs[:, 0]])
    for cache in (True, False):
        model = make(encoders, [RowSpec(template, 0)], cache=cache)
        with torch.no_grad():
            for key, row in rows.items():
                model.get_parameter(key)[0] = row
        for max_cosine in (0.1, 0.5, 1.0):
            losses = TokenObjective(max_cosine, 1)(model, batch)
            torch.testing.assert_close(losses, expected(max_cosine), rtol=1e-5, atol=1e-5)


def test_the_row_starts_from_the_word_and_nothing_else_has_a_gradient_or_changes(encoders):
    before = [encoder.hash() for encoder in encoders]
    model = make(encoders, [RowSpec(PLAIN, 0)])
    assert [name for name, _ in model.named_parameters()] == ["clip_l", "clip_g"]
    for encoder in encoders:
        assert torch.equal(model.row(encoder.key, 0), encoder.table[encoder.single("creative", "start")])
    begun = copy.deepcopy(dict(model.named_parameters()))
    train(model, [0], 5)
    assert [encoder.hash() for encoder in encoders] == before
    assert all(p.grad is None and not p.requires_grad for e in encoders for p in e.model.parameters())
    assert all((row - begun[name]).abs().max() > 0.01 for name, row in model.named_parameters())


def test_beyond_the_clamp_nothing_draws_the_row(encoders):
    model = make(encoders, [RowSpec(PLAIN, 0)])
    batch = next(PairStream([0], len(PAIRS), global_batch=8).batches())
    TokenObjective(1e-6, 1)(model, batch).sum().backward()
    cosines = model(batch.pairs)
    for index, encoder in enumerate(encoders):
        gradient = model.get_parameter(encoder.key).grad
        assert bool((gradient == 0).all()) == bool((cosines[..., index] > 1e-6).all())
    assert (cosines[..., 1] > 1e-6).all()  # so that the line above says something
    model.zero_grad()
    TokenObjective(1.0, 1)(model, batch).sum().backward()
    assert all((p.grad != 0).any() for p in model.parameters())


def train(model, seeds, steps, num_shown=None):
    """AdamW as the engine has it, on the stream that the engine would read."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    objective = TokenObjective(0.5, num_shown or len(seeds))
    losses = []
    for _, batch in zip(range(steps), PairStream(seeds, len(PAIRS), global_batch=4).batches()):
        loss = objective(model, batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_runs_that_train_together_end_where_they_end_alone(encoders):
    """Seeds, templates and a control in one batch: rows within 1e-5 of solo runs after 25 steps."""
    specs = [RowSpec(PLAIN, 0), RowSpec(PLAIN, 7), RowSpec(BLEND, 0), RowSpec(LATE, 3), RowSpec(PLAIN, 0, True)]
    packed = make(encoders, specs)
    shown = train(packed, [spec.seed for spec in specs], 25, num_shown=4)
    alone = []
    for index, spec in enumerate(specs):
        solo = make(encoders, [spec])
        alone.append(train(solo, [spec.seed], 25))
        for encoder in encoders:
            torch.testing.assert_close(packed.row(encoder.key, index), solo.row(encoder.key, 0), rtol=1e-5, atol=1e-5)
    # what is reported is the mean over the runs, without the control
    assert shown == pytest.approx([sum(losses) / 4 for losses in zip(*alone[:4])], rel=1e-5)
    assert alone[0][0] > alone[0][-1]


def test_a_prompt_that_all_samples_share_goes_through_the_encoder_once(encoders, monkeypatch):
    from fine_dist.creative import causal

    model = make(encoders, [RowSpec(PLAIN, 0), RowSpec(PLAIN, 1)])
    computed = []
    run = causal.run
    monkeypatch.setattr(causal, "run", lambda *args, **more: computed.append(args[1].shape[:2]) or run(*args, **more))
    model(next(PairStream([0, 1], len(PAIRS), global_batch=16).batches()).pairs)
    assert computed == [(2, 3), (2, 3)]  # a prompt a row; <CreTok>, mixture and the end of text
    flops, positions = model.work(16)
    numbers = [sum(p.numel() for p in e.model.text_model.encoder.parameters() if p.ndim == 2) for e in encoders]
    assert flops == pytest.approx(sum(4 * n * 2 * 3 / 16 for n in numbers)) and positions >= 1


def test_a_copy_for_looking_at_averages_does_not_copy_the_encoders(encoders):
    model = make(encoders, [RowSpec(PLAIN, 0)])
    other = copy.deepcopy(model)
    assert (
        other.prompts_by_encoder[0].encoder is model.prompts_by_encoder[0].encoder and other.clip_l is not model.clip_l
    )
    assert set(other.state_dict()) == {"clip_l", "clip_g"}


def test_a_shuffled_control_keeps_the_geometry_of_the_targets_and_is_measured_on_the_true_ones(encoders):
    model = make(encoders, [RowSpec(PLAIN, 0), RowSpec(PLAIN, 0, shuffled=True)])
    for prompts_of_encoder in model.prompts_by_encoder:
        true, shuffled = (prompts_of_encoder.targets[i].flatten(0, 1) for i in prompts_of_encoder.target_of)
        torch.testing.assert_close(true @ true.T, shuffled @ shuffled.T)
        assert not torch.allclose(true, shuffled, atol=0.1)
    pairs = torch.tensor([[0, 0], [1, 1]])
    own, against_true = model(pairs), model(pairs, "true")
    torch.testing.assert_close(against_true[:, 0], own[:, 0])
    torch.testing.assert_close(against_true[:, 1], own[:, 0])  # both rows are the start word still
    assert not torch.allclose(own[:, 1], own[:, 0], atol=0.01)
    assert sorted(shuffle(9, 4).tolist()) == list(range(9))


def test_the_common_beginning_of_prompts():
    assert common_beginning([[1, 2, 3], [1, 2], [1, 2, 4]]) == [1, 2]
    assert common_beginning([[1, 2]]) == [1, 2] and common_beginning([[1], [2]]) == []
