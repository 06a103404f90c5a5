"""TensorBoard as a reader of the run's files, in a companion process (see ``companion.py``).

Its files are in ``<run>/tensorboard/``. The companion is ``python -m bigtrain.telemetry.tensorboard_logger``; it
writes with tensorboardX, which is what ``torch.utils.tensorboard`` needs the whole of TensorBoard for.
"""

import os
import sys
from pathlib import Path
from typing import Any

from bigtrain.telemetry import names
from bigtrain.telemetry.companion import Companion, follow_until_end, lock, read_request, request_for
from bigtrain.telemetry.text import describe_event

DIRECTORY = "tensorboard"
_COMMAND = (sys.executable, "-m", "bigtrain.telemetry.tensorboard_logger")


def start_tensorboard(run_directory: Path) -> Companion:
    """Start the companion of a run."""
    return Companion("tensorboard", _COMMAND, request_for(run_directory, "tensorboard"))


def forget(run_directory: Path) -> None:
    """Let the next companion begin anew, because the training does."""
    (run_directory / "tensorboard_cursor.json").unlink(missing_ok=True)
    for path in (run_directory / DIRECTORY).glob("events.out.tfevents.*"):
        path.unlink()


def _companion() -> int:
    request, say = read_request(dict(os.environ))
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        say(f"cannot be used ({error}); the run goes on without")
        return 0
    # The companion of a launch that was killed may not have logged the rest yet.
    with lock(Path(request["log"])), SummaryWriter(f"{request['directory']}/{DIRECTORY}") as writer:
        follow_until_end(_TensorboardSink(writer), request)
    return 0


class _TensorboardSink:
    """See :class:`bigtrain.telemetry.companion.Sink`."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, row: dict[str, float]) -> None:
        step = int(row.pop(names.STEP))
        for key, value in row.items():
            self._writer.add_scalar(key, value, step)

    def event(self, event: dict[str, Any]) -> None:
        self._writer.add_text(f"events/{event['event']}", describe_event(event), event.get(names.STEP) or 0)

    def samples(self, samples: list[dict[str, Any]]) -> None:
        for sample in samples[-1:]:
            text = f"{sample.get('prompt', '')}{sample.get('text', '')}"
            self._writer.add_text("samples", text, sample.get(names.STEP) or 0)


if __name__ == "__main__":
    sys.exit(_companion())
