"""Messages about files of another format and lines that are not JSON."""

import json
import re
from collections.abc import Callable
from typing import Any

_FIRST_BYTES = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "packed by gzip",
    b"\x28\xb5\x2f\xfd": "packed by zstd",
    b"\xfd7zXZ\0": "packed by xz",
    b"BZh": "packed by bzip2",
    b"\x04\x22\x4d\x18": "packed by lz4",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow stream",
    b"SQLite format 3\0": "an SQLite database",
    b"%PDF-": "a PDF",
}
_JSON_UTF32 = re.compile(rb"[\s\0]*(\0\0\0[\[{]\0|[\[{]\0\0\0)")
_JSON_UTF16 = re.compile(rb"[\s\0]*[\[{]\0")
_ONE_PER_LINE = "one object per line is meant"
_QUOTED_CHARACTERS = 40


class SeveralLinesError(ValueError):
    """A JSON value spans several lines."""


def foreign_format(head: bytes) -> str | None:
    """Return the format of a file by its first bytes, None if it may be text in UTF-8."""
    return next((what for magic, what in _FIRST_BYTES.items() if head.startswith(magic)), None)


def foreign_json(head: bytes) -> str | None:
    """Return the same for a file that should be JSON, whose encoding shows without a mark too."""
    unmarked = "UTF-32" if _JSON_UTF32.match(head) else "UTF-16" if _JSON_UTF16.match(head) else None
    return foreign_format(head) or unmarked or ("binary" if head.startswith(b"\0") else None)


def parse_object(line: str, following: Callable[[], bytes]) -> dict[str, Any]:
    """Return the JSON object in a line; ValueError if it is none, SeveralLinesError if it goes on in what follows."""
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise ValueError("not valid JSON: nested too deeply") from error
    except json.JSONDecodeError as error:
        if _goes_on(line, following()):
            what = "one array" if line.lstrip().startswith("[") else "an object"
            problem = (
                f"{what} over several lines, but {_ONE_PER_LINE}; jq -c '.{'[]' * what.endswith('array')}' writes that"
            )
            raise SeveralLinesError(f"not JSON lines: {problem}") from error
        raise ValueError(_not_json(line, error)) from error
    except ValueError as error:  # numbers with thousands of digits
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}; {_ONE_PER_LINE}")
    return record


def _not_json(line: str, error: json.JSONDecodeError) -> str:
    problem = f"not valid JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}"
    if error.msg == "Extra data":
        return f"{problem}; {_ONE_PER_LINE}, and this line goes on after it"
    if line.lstrip()[:1] in "{[":
        return problem
    return f"{problem}; {_ONE_PER_LINE}, and this line begins {line.strip()[:_QUOTED_CHARACTERS]!r}"


def _goes_on(line: str, following: bytes) -> bool:
    """Return whether a line that is not JSON begins JSON over several lines."""
    start = line.lstrip()
    if start[:1] not in ("{", "[") or not following.strip():
        return False
    text = (start + following.decode(errors="replace")).rstrip()
    try:
        return json.JSONDecoder().raw_decode(text)[1] > len(start.rstrip())
    except json.JSONDecodeError as error:  # where what is known of it ends, or in its middle
        return error.pos >= len(text) or error.msg.startswith("Unterminated string")
    except (RecursionError, ValueError):
        return False
