"""Processes beside the ranks."""

import signal
import subprocess
from collections.abc import Sequence
from typing import Any

STOP_SIGNALS = (signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What ends ranks in order: a closed terminal, its keys, a limit of CPU time, launchers and batch systems."""


def start_beside(command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
    """Start a process that ends by itself when the ranks have; signals that stop ranks never reach it.

    A terminal sends them to a whole session, and Slurm to every process of a step, also to one that has just begun.

    Args:
        command: its command line.
        options: of :class:`subprocess.Popen`.

    Raises:
        OSError: it cannot be started.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the new process has the same mask, for good
    try:
        return subprocess.Popen(command, start_new_session=True, **options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
