"""Images as lines of text: coloured half blocks in a terminal, shades elsewhere."""

import itertools
import sys
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_SHADES = " .:-=+*#%@"
_MOST_COLUMNS = 64


def picture_lines(pixels_HWC: NDArray[np.uint8]) -> Iterator[str]:
    """Yield the lines that show an image; of a large one every n-th pixel."""
    every = -(-pixels_HWC.shape[1] // _MOST_COLUMNS)
    pixels = np.broadcast_to(pixels_HWC[::every, ::every], (*pixels_HWC[::every, ::every].shape[:2], 3)).astype(int)
    if not sys.stdout.isatty():
        for row in pixels.mean(axis=-1):
            yield "".join(2 * _SHADES[int(value * len(_SHADES) / 256)] for value in row)
        return
    rows = [*pixels, np.zeros_like(pixels[0])]
    for above, below in itertools.zip_longest(rows[:-1:2], rows[1::2]):
        yield "".join(map(_half_block, above, below)) + "\x1b[0m"


def _half_block(above: NDArray[np.int64], below: NDArray[np.int64]) -> str:
    front, back = (";".join(map(str, colour.tolist())) for colour in (above, below))
    return f"\x1b[38;2;{front};48;2;{back}m▀"
