"""Costs compared on whatever machine the tests run: busy or slow, it is so for both sides."""

import time
from collections.abc import Callable


def times_as_long(work: Callable[[], object], reference: Callable[[], object], rounds: int = 9) -> float:
    """Return how much more of the processor ``work`` takes than ``reference``; the least of several rounds counts."""
    least = [float("inf"), float("inf")]
    for _ in range(rounds):
        for side, call in enumerate((work, reference)):
            begin = time.thread_time()
            call()
            least[side] = min(least[side], time.thread_time() - begin)
    return least[0] / least[1]
