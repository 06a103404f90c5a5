"""What TensorBoard shows of its event files: TFRecords of protobuf messages, of which a restart voids what came before."""

from pathlib import Path
from typing import Any

EVENT_FILES = "tensorboard/events.out.*"


def read_events(run: Path) -> list[Any]:
    """Return the messages of all event files of a run, in the order in which TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event

    paths = sorted(run.glob(EVENT_FILES))
    return [Event.FromString(message) for path in paths for message in _read_tfrecords(path.read_bytes())]


def read_scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the points of every curve."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for event in read_events(run):
        if event.HasField("session_log"):  # START: what was logged from this step on is void
            curves = {tag: [point for point in points if point[0] < event.step] for tag, points in curves.items()}
        for value in event.summary.value:
            if value.HasField("simple_value"):
                curves.setdefault(value.tag, []).append((event.step, value.simple_value))
    return curves


def _read_tfrecords(data: bytes) -> list[bytes]:
    """Return the messages of a TFRecord file: length, its checksum, the message, its checksum."""
    messages, position = [], 0
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 8], "little")
        messages.append(data[position + 12 : position + 12 + length])
        position += 16 + length
    return messages
