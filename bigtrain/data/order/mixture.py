"""Which data set the sample at a position of the run is from: exact proportions, in closed form.

Every position belongs to one component, and the samples of a component are drawn in its own order, whatever the others
do. Between two changes of the weights (a segment), components are told apart by a chain of balanced sequences in
integer arithmetic. With the components in descending order of their integer weights w_1 >= w_2 >= ..., R_j = w_j+1 +
w_j+2 + ... and r_0 = p positions since the segment began::

    c_j = floor((r_j-1 * w_j + R_j-1 // 2) / R_j-1)        r_j = r_j-1 - c_j

c_j is how many of the p positions belong to component j. Each step of the chain is a Sturmian (Beatty) sequence, whose
share over any window is off by less than 1. Errors of a remainder go down the chain in proportion, so over *any* window
inside a segment component j is off from its exact share by less than 1 + w_j * sum_i<j 1 / R_i <= 1 + H_j-1 samples
(H: harmonic numbers): less than 1 with two components, than 4 with eleven.
"""

from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

import numpy as np
from numpy.typing import NDArray

from bigtrain.errors import DataError

_MAX_TOTAL_WEIGHT = 1 << 31
_FOREVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Share:
    """How much of a mixture one component is, over time."""

    weights: tuple[tuple[int, float], ...]  # (position, weight from there on), ascending, from position 0
    limit: int | None = None  # samples that may be drawn of it over the whole run; None = any number


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of positions with constant weights."""

    start: int  # first position
    weights: NDArray[np.int64]  # integer weight of each component
    counts: NDArray[np.int64]  # samples of each component that were drawn before ``start``

    def counts_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many samples of each component were drawn before each position, int64 ``(num_components, N)``."""
        counts = np.tile(self.counts[:, None], (1, len(positions)))
        rest, rest_weight = positions - self.start, int(self.weights.sum())
        for component in np.argsort(-self.weights, kind="stable"):
            weight = int(self.weights[component])
            if weight == 0:
                break
            # floor((rest * weight + half) / rest_weight) without a product that could overflow
            periods, rests = np.divmod(rest, rest_weight)
            drawn = periods * weight + (rests * weight + rest_weight // 2) // rest_weight
            counts[component] += drawn
            rest, rest_weight = rest - drawn, rest_weight - weight
        return counts


class Mixture:
    """The components of all positions of a run."""

    def __init__(self, shares: list[Share], *, origin: int = 0, counts: list[int] | None = None) -> None:
        """Lay out the segments from ``origin`` on, before which ``counts`` samples of each component were drawn."""
        self.num_components = len(shares)
        self.num_positions: int | None = None  # positions there are samples for; None = without end
        drawn = np.array(counts or [0] * len(shares), dtype=np.int64)
        changes = sorted({max(start, origin) for share in shares for start, _ in share.weights} | {origin})
        self._segments: list[Segment] = []
        for start, end in zip(changes, [*changes[1:], _FOREVER], strict=True):
            drawn, self.num_positions = self._lay_out(shares, start, end, drawn)
            if self.num_positions is not None:
                break
        self._starts = np.array([segment.start for segment in self._segments], dtype=np.int64)

    def counts(self, position: int) -> list[int]:
        if self.num_components == 1:  # asked for whenever a step is logged: without arrays of one number
            first = self._segments[0]
            return [int(first.counts[0]) + position - first.start]
        segment = self._segments[max(int(np.searchsorted(self._starts, position, side="right")) - 1, 0)]
        return segment.counts_at(np.array([position]))[:, 0].tolist()

    def locate(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the components at the positions ``[first, first + count)``, and the index of each sample in its own.

        Both are int64 ``(count,)``; the indices of a component are consecutive. Past the last sample it is a DataError.
        """
        if self.num_positions is not None and first + count > self.num_positions:
            raise DataError(f"the mixture has {self.num_positions} samples, not the {first + count} that are asked for")
        if self.num_components == 1:
            begin = self.counts(first)[0]
            return np.zeros(count, dtype=np.int64), np.arange(begin, begin + count)
        positions = np.arange(first, first + count + 1, dtype=np.int64)
        counts = np.empty((self.num_components, count + 1), dtype=np.int64)
        segments = np.maximum(np.searchsorted(self._starts, positions, side="right") - 1, 0)
        for number in range(int(segments[0]), int(segments[-1]) + 1):
            inside = segments == number
            counts[:, inside] = self._segments[number].counts_at(positions[inside])
        components = np.diff(counts).argmax(axis=0)
        return components, counts[components, np.arange(count)]

    def _lay_out(
        self, shares: list[Share], start: int, end: int, drawn: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], int | None]:
        """Add the segments from ``start`` to ``end``, a new one wherever a component is used up.

        Returns the samples drawn of each component before ``end``, and where the data ends if it does before.
        """
        limits = np.array([_FOREVER if share.limit is None else share.limit for share in shares], dtype=np.int64)
        while start < end:
            alive = drawn < limits
            now = [[weight for first, weight in share.weights if first <= start][-1] for share in shares]
            weights = [weight if is_left else 0.0 for weight, is_left in zip(now, alive, strict=True)]
            if not any(weights):
                self._segments.append(Segment(start, np.zeros_like(drawn), drawn))
                return drawn, start
            segment = Segment(start, _integers(weights), drawn)
            self._segments.append(segment)
            start = _first_exhausted(segment, limits, end)
            drawn = segment.counts_at(np.array([start]))[:, 0]
        return drawn, None


def _integers(weights: list[float]) -> NDArray[np.int64]:
    """Return the smallest integers in the proportions of decimal ``weights``; too large ones are a DataError."""
    exact = [Fraction(repr(weight)) for weight in weights]
    denominator = lcm(*(weight.denominator for weight in exact))
    integers = [int(weight * denominator) for weight in exact]
    divisor = gcd(*integers)
    integers = [weight // divisor for weight in integers]
    if sum(integers) > _MAX_TOTAL_WEIGHT:
        raise DataError(f"data.mixture: weights {weights} have too many digits to be kept exactly; use up to 8 digits")
    return np.array(integers, dtype=np.int64)


def _first_exhausted(segment: Segment, limits: NDArray[np.int64], end: int) -> int:
    """Return the first position up to ``end`` at which a component that is drawn from has reached its limit."""

    def is_exhausted(position: int) -> bool:
        counts = segment.counts_at(np.array([position]))[:, 0]
        return bool(np.any((counts >= limits) & (segment.weights > 0)))

    return segment.start + bisect_left(range(segment.start, end), True, key=is_exhausted)  # counts never fall
