"""ROUGE-L and error rates are what their definitions say."""

from functools import cache

import numpy as np
import pytest

from bigtrain.tasks.texts import error_rate, rouge_l


def brute_force(one, other):
    """Return the edits between two sequences, by the recursive definition."""

    @cache
    def edits(i, j):
        if not i or not j:
            return i + j
        same = edits(i - 1, j - 1) + (one[i - 1] != other[j - 1])
        return min(same, edits(i - 1, j) + 1, edits(i, j - 1) + 1)

    return edits(len(one), len(other))


def test_error_rates_are_sums_of_edits():
    random = np.random.default_rng(0)
    texts = [["".join(random.choice(list("abc"), random.integers(0, 9))) for _ in range(40)] for _ in range(2)]
    right = sum(map(brute_force, *texts)) / sum(map(len, texts[1]))
    assert error_rate(*texts) == pytest.approx(right)
    parts = [error_rate([a], [b]) for a, b in zip(*texts, strict=True) if b]
    assert abs(np.mean(parts) - right) > 0.01, "a mean over texts is another metric"
    assert error_rate([["the", "cat", "sat"]], [["the", "cat", "sat", "down"]]) == 0.25
    assert error_rate([[]], [["a"]]) == 1 and error_rate(["kitten"], ["sitting"]) == pytest.approx(3 / 7)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    # Lin, 2004: "police killed the gunman" / "police kill the gunman" have 3 of 4 words in common, in order.
    assert rouge_l(["Police kill the gunman."], ["police killed the gunman"]) == 0.75
    assert rouge_l(["the gunman kill police"], ["police killed the gunman"]) == 0.5
    assert rouge_l(["a b c d", ""], ["b d", "x"]) == pytest.approx((2 * 2 / 6) / 2)
    assert rouge_l(["", "да нет"], ["", "Да, нет!"]) == 1
