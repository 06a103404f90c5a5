"""Messages to people: rank 0 speaks, the others only when something is wrong."""

import logging
import sys

from bigtrain.redact import redact


class Formatter(logging.Formatter):
    """Takes secrets out of messages: errors of other people's libraries quote whole URLs."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of ``record``."""
        return redact(super().format(record))


def get_logger() -> logging.Logger:
    """Return the project's logger."""
    return logging.getLogger("bigtrain")


def quiet_torchao() -> None:
    """Drop what importing torchao says: that kernels not used here are of other machines, and what torch has deprecated."""
    for name, text in (("torchao", "Failed to load"), ("torch.utils._pytree", "is an Enum subclass")):
        logging.getLogger(name).addFilter(lambda record, text=text: text not in str(record.msg))


def setup(rank: int) -> None:
    """Send the project's log to standard error; ranks other than 0 show errors only."""
    logger = get_logger()
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(Formatter(f"{prefix}%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logger.propagate = False
