import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data.order.mixture import Mixture, Share
from bigtrain.errors import DataError
from tests.ratios import times_as_long

weights = st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.3, 1.0, 3.0, 7.5]), min_size=1, max_size=7).filter(any)


def constant(weights):
    return [Share(((0, weight),)) for weight in weights]


def bound(weights, component):
    """The error that mixture.py promises: 1 + H_(j-1) for the component that is j-th in order of weight."""
    place = sum(weight > weights[component] for weight in weights) + sum(
        weight == weights[component] for weight in weights[:component]
    )
    return 1 + sum(1 / i for i in range(1, place + 1))


@settings(deadline=None)
@given(weights=weights, first=st.integers(0, 2**50), length=st.integers(0, 400))
def test_proportions_are_exact_over_any_window(weights, first, length):
    components, _ = Mixture(constant(weights)).locate(first, length)
    total = sum(map(Fraction, map(str, weights)))
    for component, weight in enumerate(weights):
        share = length * Fraction(str(weight)) / total
        assert abs(int((components == component).sum()) - share) < bound(weights, component)


def test_two_components_are_never_off_by_a_sample():
    components, _ = Mixture(constant([0.7, 0.3])).locate(12_345, 1000)
    for begin, end in itertools.combinations(range(0, 1000, 7), 2):
        assert abs(int((components[begin:end] == 1).sum()) - 0.3 * (end - begin)) < 1


def test_drawing_at_random_would_be_noticed():
    drawn = np.random.default_rng(0).random(1000) < 0.3
    assert max(abs(drawn[:n].sum() - 0.3 * n) for n in range(1000)) > 3


@st.composite
def mixtures(draw):
    """Shares with changing weights and limits."""
    shares = []
    for _ in range(draw(st.integers(1, 4))):
        starts = sorted(draw(st.sets(st.integers(1, 120), max_size=2)))
        values = st.sampled_from([0.0, 0.2, 0.5, 1.0])
        changes = tuple((start, draw(values)) for start in [0, *starts])
        shares.append(Share(changes, draw(st.none() | st.integers(0, 60))))
    return shares


def by_hand(mixture, end):
    """Component and index of each position, found one after the other."""
    seen = {}
    for position in range(end):
        (component,), (index,) = mixture.locate(position, 1)
        assert index == seen.get(component, 0), "each component's samples come one after the other"
        seen[int(component)] = int(index) + 1
        yield int(component), int(index)


@settings(deadline=None, max_examples=60)
@given(shares=mixtures(), cuts=st.lists(st.integers(0, 60), max_size=5))
def test_any_position_can_be_found_directly(shares, cuts):
    mixture = Mixture(shares)
    end = min(sum(cuts), sum(cuts) if mixture.num_positions is None else mixture.num_positions)
    whole = list(zip(*(part.tolist() for part in mixture.locate(0, end)), strict=True))
    assert whole == list(by_hand(mixture, end))
    for component, share in enumerate(shares):
        drawn = [index for c, index in whole if c == component]
        assert share.limit is None or len(drawn) <= share.limit
        assert mixture.counts(end)[component] == len(drawn)
    for start, stop in itertools.pairwise(np.minimum(np.cumsum([0, *cuts]), end).tolist()):
        parts = mixture.locate(start, stop - start)
        assert list(zip(*(part.tolist() for part in parts), strict=True)) == whole[start:stop]


def test_a_used_up_component_leaves_its_share_to_the_others_and_the_end_is_known():
    mixture = Mixture([Share(((0, 1.0),), 10), Share(((0, 1.0),), 30), Share(((0, 2.0),), 60)])
    components, _ = mixture.locate(0, 100)
    assert mixture.num_positions == 100
    assert np.bincount(components[:40]).tolist() == [10, 10, 20]
    assert np.bincount(components[40:], minlength=3).tolist() == [0, 20, 40]
    with pytest.raises(DataError, match="100 samples, not the 101"):
        mixture.locate(99, 2)


def test_weights_change_where_they_are_told_to():
    components, indices = Mixture([Share(((0, 1.0),)), Share(((0, 0.0), (50, 3.0)))]).locate(0, 90)
    assert np.bincount(components[:50], minlength=2).tolist() == [50, 0]
    assert np.bincount(components[50:]).tolist() == [10, 30]
    assert indices[components == 0].tolist() == list(range(60))


def test_a_mixture_that_begins_later_goes_on_from_given_counts():
    components, indices = Mixture(constant([1.0, 1.0]), origin=1000, counts=[900, 0]).locate(1000, 20)
    assert indices[components == 0].tolist() == list(range(900, 910))
    assert indices[components == 1].tolist() == list(range(10))


def test_seeking_costs_the_same_everywhere():
    mixture = Mixture(constant([0.123456, 0.5, 0.25, 0.01]))
    for first in (10**9, 10**17):
        assert times_as_long(lambda first=first: mixture.locate(first, 1024), lambda: mixture.locate(0, 1024)) < 4


def test_too_many_digits_are_refused():
    with pytest.raises(DataError, match="too many digits"):
        Mixture(constant([0.1234567890123, 1 / 3]))
