"""Messages to people: rank 0 speaks, the others only when something is wrong."""

import logging
import sys


def get_logger() -> logging.Logger:
    """Return the project's logger."""
    return logging.getLogger("bigtrain")


def setup(rank: int) -> None:
    """Send the project's log to standard error; ranks other than 0 show errors only."""
    logger = get_logger()
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logger.propagate = False
