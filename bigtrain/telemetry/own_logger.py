"""A logger of the user's own, beside the files and dashboards of rank 0; none of its errors ends a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from bigtrain.config import parts


class Logger(Protocol):
    """What ``logging.also`` names: called with the run's directory, on rank 0, in the training process, which waits."""

    def metrics(self, records: list[dict[str, Any]]) -> None:
        """Take the records of the steps since the last call, in order, as they are in ``metrics.jsonl``."""

    def event(self, event: dict[str, Any]) -> None:
        """Take an event, as it is in ``events.jsonl``."""

    def close(self) -> None:
        """Write what is left: the launch ends."""


class OwnLogger:
    """Calls a logger until it raises, which is told once; the run goes on without it."""

    def __init__(self, name: str, directory: Path, tell: Callable[[str, str], None]) -> None:
        """Make the logger ``name``; ``tell`` takes the name and what went wrong."""
        self._name, self._tell = name, tell
        self._logger = self._try(lambda: parts.find(name, "logging.also")(directory))

    def call(self, method: str, *args: Any) -> None:
        if self._logger:
            self._try(lambda: getattr(self._logger, method)(*args))

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            self._logger = None
            self._tell(self._name, parts.told(error))
