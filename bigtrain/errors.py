"""Errors that are the user's to mend, and the exit codes of every launcher.

Anything derived from :class:`BigtrainError` is shown as one message without a traceback. The message says what was
found, where, and what would be right. Everything else is a fault of ours or of the machine and keeps its traceback.
"""

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

EXIT_FINISHED = 0
EXIT_FAULT = 1
EXIT_USER_ERROR = 2
EXIT_NO_RESTART = 3  # a restart would end in the same way: a person has to look first
EXIT_RESUMABLE = 75  # sysexits.h EX_TEMPFAIL: saved; the same command continues the run


class BigtrainError(Exception):
    """Base of all errors that the user can mend."""

    exit_code = EXIT_USER_ERROR  # how the process ends
    shared: bool | None = None  # raised on all ranks alike, so that rank 0 shows it; None: not known


def of_all_ranks(error: BigtrainError) -> BigtrainError:
    """Return ``error``, which every rank raises at the same place."""
    error.shared = True
    return error


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says; its class if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


MISTAKES = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, TypeError, ValueError)
"""What the code of a user raises when it is wrong, unlike a machine's faults."""


def told_with_place(error: BaseException) -> str:
    """Return the type and first line of an error, and the line of code that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first_line(error)} ({frame.filename}:{frame.lineno})"


def some(names: Iterable[str], most: int, separator: str = ", ") -> str:
    """Return the first ``most`` of ``names`` as one text, and how many there are besides."""
    names = list(names)
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return separator.join(names[:most] + more)


def counted(number: int, thing: str) -> str:
    """Return ``1 document`` or ``2 documents``."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


class ConfigError(BigtrainError):
    """The configuration is wrong; the message lists every problem found."""


def raise_problems(problems: Iterable[str]) -> None:
    """Raise a ConfigError that lists ``problems``, unless there are none."""
    if text := "\n".join(problems):
        raise ConfigError(text)


class DataError(BigtrainError):
    """A source, a shard or a tokenizer is missing, damaged or unsuitable."""


@contextmanager
def as_data_error(
    where: object, *kinds: type[Exception], problem: str = "cannot be read", advice: str = ""
) -> Iterator[None]:
    """Turn an OSError, or errors of these kinds, into the DataError ``<where>: <problem>: <error><advice>``."""
    kinds = kinds or (OSError,)
    try:
        yield
    except kinds as error:
        raise DataError(f"{where}: {problem}: {error}{advice}") from error


class ShardError(DataError):
    """A shard is missing or damaged and will stay so."""


class UnreachableError(DataError):
    """A source does not answer now, and may later."""


class CheckpointError(BigtrainError):
    """A checkpoint is missing, damaged or belongs to a different run."""


class UnreadableError(CheckpointError):
    """A checkpoint may be whole, but cannot be read here and now: no reason to take another one."""


class PreflightError(BigtrainError):
    """The run does not fit the machine."""


class NetworkError(BigtrainError):
    """Ranks do not find or reach each other: a fault that a restart may mend."""

    exit_code = EXIT_FAULT


class NoRestartError(BigtrainError):
    """The run fails again and again, or diverges again and again; restarting it by machine would be for nothing."""

    exit_code = EXIT_NO_RESTART


class StopError(BigtrainError):
    """Somebody wants the launch to end before it has begun to train; the same command continues."""

    exit_code = EXIT_RESUMABLE
