"""What wandb's offline files hold, from their log format: LevelDB records of protobuf messages."""

import struct
from pathlib import Path
from typing import Any

BLOCK_BYTES, HEADER_BYTES, FULL, LAST = 32768, 7, 1, 4


def read_records(run: Path, kind: str) -> list[Any]:
    """Return the records of one kind (history, config, alert ...) of all offline files of a run, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for message in read_leveldb_log(path.read_bytes()):
            record = Record.FromString(message)
            if record.WhichOneof("record_type") == kind:
                records.append(getattr(record, kind))
    return records


def read_history(run: Path) -> list[dict[str, str]]:
    """Return what was logged, row by row; values are JSON."""
    return [
        {item.key or "/".join(item.nested_key): item.value_json for item in history.item}
        for history in read_records(run, "history")
    ]


def read_leveldb_log(data: bytes) -> list[bytes]:
    """Return the messages of a log."""
    messages, parts, position = [], b"", HEADER_BYTES  # the file begins with a header of the same size
    while position + HEADER_BYTES <= len(data):
        if BLOCK_BYTES - position % BLOCK_BYTES < HEADER_BYTES:
            position += BLOCK_BYTES - position % BLOCK_BYTES
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + HEADER_BYTES])
        parts += data[position + HEADER_BYTES : position + HEADER_BYTES + length]
        position += HEADER_BYTES + length
        if kind in (FULL, LAST):
            messages.append(parts)
            parts = b""
    return messages
