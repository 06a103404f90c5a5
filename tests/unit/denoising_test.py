"""Gaps are functions of the seed and the place in the run, and source and target together are the text."""

import numpy as np
import pytest

from bigtrain.tasks.denoising import SpanCorruption, TextInfilling, num_hidden_tokens, num_spans_of

N, T, V, EOS, MASK = 200, 64, 1000, 1000, 1001
TOKENS = np.random.default_rng(0).integers(0, V, (N, T))
POSITIONS = np.arange(N) + 7
SPANS = SpanCorruption(
    sentinels=tuple(2000 - i for i in range(num_spans_of(T, 0.15, 3.0))), eos_id=EOS, first_id=0, seed=3
)
INFILLING = TextInfilling(mask_id=MASK, eos_id=EOS, first_id=0, seed=3)
KINDS = pytest.mark.parametrize("noise", [SPANS, INFILLING], ids=["spans", "infilling"])


def restored(source, target):
    """Return the text in which the tokens behind each sentinel of the target take its place in the source."""
    spans, inside = {}, []
    for token in target:
        if token > MASK:
            inside = spans.setdefault(token, [])
        else:
            inside.append(token)
    return [token for place in source for token in (spans.pop(place) if place > MASK else [place])], spans


def test_t5_puts_sentinels_in_order_for_spans_that_the_target_holds():
    found = SPANS(TOKENS, POSITIONS)
    num_hidden = num_hidden_tokens(T, 0.15)
    assert num_hidden == 10 and len(SPANS.sentinels) == 3
    assert found["source"].shape == (N, T - 10 + 3 + 1) and found["targets"].shape == (N, 10 + 3 + 1)
    for i in range(N):
        source, target = found["source"][i].tolist(), found["targets"][i].tolist()
        assert source.pop() == EOS == target.pop()
        assert (
            [token for token in source if token > MASK]
            == [token for token in target if token > MASK]
            == [*SPANS.sentinels]
        )
        text, left = restored(source, target)
        assert text == TOKENS[i].tolist() and not left
        assert found["tokens"][i].tolist() == [0, *target]
    lengths = np.diff(np.flatnonzero(np.append(found["targets"].ravel() > MASK, True))) - 1
    assert len(set(lengths.tolist())) > 3, "spans of several lengths"


def test_bart_puts_one_mask_for_a_span_and_wants_the_whole_text():
    found = INFILLING(TOKENS, POSITIONS)
    assert (found["targets"][:, :-1] == TOKENS[:, :-1]).all() and (found["targets"][:, -1] == EOS).all()
    hidden, masks = [], []
    for source, length, text in zip(found["source"], found["source_lengths"], TOKENS[:, :-1].tolist(), strict=True):
        assert source[length - 1] == EOS and (source[length:] == 0).all()
        kept = [token for token in source[: length - 1].tolist() if token != MASK]
        rest = iter(text)
        assert all(token in rest for token in kept), "what is kept is in order"
        hidden.append(len(text) - len(kept))
        masks.append(int(length) - 1 - len(kept))
    assert set(hidden) == {num_hidden_tokens(T - 1, 0.3)} and 5 < np.mean(masks) < 9 and len(set(masks)) > 4


@KINDS
def test_same_samples_have_the_same_gaps_in_any_cut_and_others_elsewhere(noise):
    whole = noise(TOKENS, POSITIONS)
    for part in np.array_split(np.random.default_rng(2).permutation(N), 7):
        found = noise(TOKENS[part], POSITIONS[part])
        assert all((found[name] == whole[name][part]).all() for name in whole)
    elsewhere = noise(TOKENS, POSITIONS + N)
    assert (elsewhere["source"] == whole["source"]).all(axis=1).mean() < 0.05, "another epoch has other gaps"


@KINDS
def test_the_shortest_samples_have_a_gap(noise):
    spans = SpanCorruption(sentinels=(2000,), eos_id=EOS, first_id=0)
    found = (spans if noise is SPANS else noise)(TOKENS[:, :3], POSITIONS)
    lengths = found["source_lengths"]
    assert (lengths >= 2).all() and (lengths <= found["source"].shape[1]).all()
