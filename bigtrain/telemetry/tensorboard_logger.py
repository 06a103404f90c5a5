"""TensorBoard as a companion process that reads the run's files (see ``companion.py``).

It writes to ``<run>/tensorboard/`` with tensorboardX, because ``torch.utils.tensorboard`` needs all of TensorBoard. The
companion is ``python -m bigtrain.telemetry.tensorboard_logger``.
"""

import os
import sys
from pathlib import Path
from typing import Any

from bigtrain.config.packages import lacking
from bigtrain.files import locked
from bigtrain.telemetry import names
from bigtrain.telemetry.companion import Companion, follow_until_end, read_request, request_for
from bigtrain.telemetry.text import describe_event

DIRECTORY = "tensorboard"
_FILES = "events.out.tfevents.*"
_COMMAND = (sys.executable, "-m", "bigtrain.telemetry.tensorboard_logger")


def start_tensorboard(run_directory: Path) -> Companion:
    return Companion("tensorboard", _COMMAND, request_for(run_directory, "tensorboard"))


def forget(run_directory: Path) -> None:
    """Remove what an earlier run logged: the training begins anew."""
    (run_directory / "tensorboard_cursor.json").unlink(missing_ok=True)
    for path in (run_directory / DIRECTORY).glob(_FILES):
        path.unlink()


def _companion() -> int:
    request, say = read_request(dict(os.environ))
    if problems := lacking("it", "tensorboardX", "tensorboard"):
        say(f"{problems[0]}; the run goes on without")
        return 0
    from tensorboardX import SummaryWriter

    # The companion of a launch that was killed may not have logged the rest yet.
    directory = Path(request["directory"], DIRECTORY)
    with locked(Path(request["log"]), wait=True):
        before = sorted(directory.glob(_FILES))
        # Without the suffix, a writer of the same second would overwrite the file.
        with SummaryWriter(str(directory), filename_suffix=f".{os.getpid()}") as writer:
            _put_last(directory, before)
            follow_until_end(_TensorboardSink(writer), request)
    return 0


def _put_last(directory: Path, before: list[Path]) -> None:
    """Rename the new file to sort after those of earlier launches, whose clocks may have been ahead."""
    for path in set(directory.glob(_FILES)) - set(before):
        *prefix, seconds, rest = path.name.split(".", 4)
        newest = before[-1].name.split(".")[3] if before else ""
        if newest.isdigit() and int(newest) >= int(seconds):
            path.rename(path.with_name(".".join([*prefix, str(int(newest) + 1), rest])))


class _TensorboardSink:
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

    def take_back(self, step: int, *, differs: bool) -> int:
        """Let TensorBoard forget everything after ``step``; all of it is logged again."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        void = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        self._writer.file_writer.add_event(void)
        return step


if __name__ == "__main__":
    sys.exit(_companion())
