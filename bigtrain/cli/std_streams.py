"""Standard streams that are closed, full or gone: a run does not end because its messages cannot be written."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator

from bigtrain.errors import EXIT_FAULT, BigtrainError


class OutputError(BigtrainError, OSError):
    """Standard output takes no more: a full disk, or a reader that has ended."""

    exit_code = EXIT_FAULT
    shared = True  # only rank 0's is read


class _Output(io.TextIOWrapper):
    """Raises an OutputError where it cannot be written."""

    def write(self, text: str) -> int:
        with self.failing():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self.failing():
            super().flush()

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            gone = isinstance(error, BrokenPipeError)  # as of `| head`
            raise OutputError("" if gone else f"standard output cannot be written: {error.strerror}") from error


class _Errors(_Output):
    """Drops what cannot be written."""

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        with contextlib.suppress(OSError):
            yield


def open_closed() -> None:
    """Open closed streams (``>&-``) as ``/dev/null``, before a file gets their numbers."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", errors="replace", closefd=False))


def guard() -> None:
    """Let standard output fail with a sentence, and standard error never."""
    for name, kind in (("stdout", _Output), ("stderr", _Errors)):
        stream = getattr(sys, name)
        with contextlib.suppress(OSError, ValueError):  # a stand-in, without a number
            raw = io.FileIO(stream.fileno(), "w", closefd=False)
            buffered = io.BufferedWriter(raw)
            is_lines = name == "stderr" or stream.isatty()
            setattr(sys, name, kind(buffered, stream.encoding, "replace", line_buffering=is_lines))
