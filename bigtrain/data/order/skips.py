"""Samples that a run leaves out: ranges of positions in its order, which later steps move up to."""

from collections.abc import Sequence

Range = tuple[int, int]
"""First position left out and the first one after it, counted from the beginning of the run."""


def pieces(first: int, count: int, skipped: Sequence[Sequence[int]]) -> list[Range]:
    """Return where ``count`` samples come from if those of ``skipped`` are not there.

    Args:
        first: number of samples that the run trained on before these.
        count: number of samples wanted.
        skipped: ranges (first position, end) in ascending order, disjoint.

    Returns:
        Ranges of positions, ascending, with ``count`` positions together.
    """
    found = []
    for begin, end in skipped:
        if first < begin and count:
            taken = min(count, begin - first)
            found.append((first, first + taken))
            first, count = first + taken, count - taken
        if first >= begin:
            first += end - begin
    return [*found, (first, first + count)] if count else found


def extend(skipped: Sequence[Sequence[int]], first: int, end: int) -> list[list[int]]:
    """Return ``skipped`` and the samples that the run, leaving those out already, counts as ``[first, end)``."""
    return sorted([*map(list, skipped), *map(list, pieces(first, end - first, skipped))])
