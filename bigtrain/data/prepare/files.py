"""The files of a source: every file that ``data.path`` leads to is read once, or named with the reason.

What :func:`find_files` returns depends on names and links only.
"""

import glob
import gzip
import io
import os
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bigtrain.config import DataConfig, DataSource, OnBad
from bigtrain.data.prepare.saved import DESCRIPTIONS, SourceFile, files_of_split, saved_files
from bigtrain.errors import DataError, some

LeftOut = dict[str, list[str]]  # names by the reason why they are not read

_NOT_STDLIB = frozenset({"__pycache__", "site-packages", "dist-packages"})
_SUFFIXES = {
    # Not .json: beside data it is seldom data.
    DataSource.jsonl: (
        *(".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst"),
        *(".json.gz", ".json.zst"),
    ),
    DataSource.csv: (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".csv.zst", ".tsv.zst"),
    DataSource.gettext: (".mo",),
    DataSource.parquet: (".parquet",),
    DataSource.arrow: (".arrow",),
}
_PACKING = re.compile(r"\.(gz|zst)$", re.IGNORECASE)
_MOST_NAMES = 8
_THIS_NAME = "matched as a pattern, but there is something of this very name"


class Part(NamedTuple):
    """What one process reads at a time: some whole files, or a range of one file or dataset."""

    files: tuple[SourceFile, ...] = ()  # empty for a dataset
    start: int = 0  # first byte (jsonl), row group (parquet), row (dataset) or shard (streamed dataset)
    stop: int | None = None
    """End of that range; None: to the end. Of a text only if it is all that a directory or a pattern holds."""
    first_row: int = 0  # rows before the range


class Found(NamedTuple):
    """What a path leads to."""

    files: list[SourceFile]  # what is read, sorted by name
    left_out: LeftOut  # what is not


def find_files(config: DataConfig) -> Found:
    """Return the files of a source, and what its path leads to besides.

    A path, or a component of it, that exists is a name; only else it is a pattern. Of a directory the files with a
    suffix of the source are read, of a pattern all that match, and each file once, however often it is linked. Of a
    saved dataset the files of one split are read that it lists. DataError if there is none, one is there packed and not, or
    ``data.split`` is not there, or missing among several.
    """
    try:
        return _find(config)
    except OSError as error:
        raise DataError(f"data.path={config.path}: cannot be read: {error}") from error


def _find(config: DataConfig) -> Found:
    left_out: LeftOut = defaultdict(list)
    path = Path(config.path or "")
    if config.source is DataSource.stdlib:
        root = Path(sysconfig.get_paths()["stdlib"])
        return Found(sorted(_files_below(root, (".py",), left_out, _NOT_STDLIB)), {})
    if path.exists():
        others = glob.glob(config.path) if glob.has_magic(config.path) else []
        left_out[_THIS_NAME] += [other for other in others if Path(other) != path]
    if path.is_dir():
        files = _files_below(path, _SUFFIXES.get(config.source, ("",)), left_out)
    elif path.exists():
        files = [SourceFile(path.name, path)]
    else:
        files = _files_matching(path, left_out)
    if config.source is DataSource.datasets:  # which chooses among them itself
        return Found(sorted(files), {})
    files = _once(files, left_out)
    if config.source is DataSource.arrow:
        files = saved_files(files, config, left_out)
    elif config.source in (DataSource.jsonl, DataSource.csv, DataSource.parquet):
        files = files_of_split(files, config, left_out)
    if config.on_bad_row is OnBad.skip:
        left_out["not readable"] += [file.name for file in files if not os.access(file.path, os.R_OK)]
        files = [file for file in files if os.access(file.path, os.R_OK)]
    if not files:
        raise DataError(_nothing(config, path, left_out))
    if config.source in (DataSource.jsonl, DataSource.csv):
        _refuse_packed_and_not(config, files)
    files = [SourceFile(_valid(file.name), file.path) for file in sorted(files)]
    return Found(files, {reason: [*map(_valid, names)] for reason, names in left_out.items() if names})


def packing(path: Path) -> str | None:
    """Return how a file is packed, by its name."""
    return {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())


def open_lines(path: Path) -> io.BufferedReader | gzip.GzipFile:
    """Open a file, packed or not, to read its lines."""
    if packing(path) == "gzip":
        return gzip.open(path, "rb")
    if packing(path) == "zstd":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def _valid(name: str) -> str:
    """Return a file name, which may be any bytes, as Unicode."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def tell_left_out(left_out: LeftOut) -> str:
    """Return what is not read as one line."""
    return "; ".join(f"{some(sorted(names), _MOST_NAMES)} ({reason})" for reason, names in left_out.items() if names)


def _nothing(config: DataConfig, path: Path, left_out: LeftOut) -> str:
    if path.is_dir():
        endings = " or ".join(f"*{suffix}" for suffix in _SUFFIXES.get(config.source, ("",)))
        what = f"{path}: no file {endings} in this directory or below it"
    else:
        what = f"data.path={config.path}: no such file or directory, and no file matches it as a pattern"
    told = tell_left_out(left_out)
    return f"{what}; not read: {told}; others are read by a pattern such as data.path='*.json'" if told else what


# Directories and patterns


def _files_below(
    root: Path, suffixes: tuple[str, ...], left_out: LeftOut, ignored: frozenset[str] = frozenset()
) -> list[SourceFile]:
    """Return the files below ``root`` that end in one of ``suffixes``, in any case."""
    files = []
    for prefix, directory, names in _walk(root, left_out, ignored):
        for name in names:
            path = os.path.join(directory, name)
            if suffixes == _SUFFIXES[DataSource.arrow] and name in DESCRIPTIONS:
                continue
            if not name.lower().endswith(suffixes):
                left_out[f"not *{suffixes[0]} or the like"].append(prefix + name)
            elif os.path.isfile(path):
                files.append(SourceFile(prefix + name, Path(path)))
            else:
                left_out["broken links, or no regular files"].append(prefix + name)
    return files


def _walk(
    root: str | Path, left_out: LeftOut, ignored: frozenset[str] = frozenset()
) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (relative prefix, path, file names) of every directory from ``root`` on, once, however it is linked.

    Hidden ones, and directories with an ``ignored`` name, are left out.
    """
    visited = set()

    def on_error(error: OSError) -> None:
        left_out["not readable"].append(f"{os.path.relpath(error.filename, root)}/")

    for directory, children, names in os.walk(root, followlinks=True, onerror=on_error):
        prefix = f"{Path(directory).relative_to(root).as_posix()}/".removeprefix("./")
        identity = os.path.realpath(directory)
        if identity in visited:  # links may lead in circles
            left_out["other names of directories that are read"].append(prefix)
            children.clear()
            continue
        visited.add(identity)
        left_out["hidden"] += [f"{prefix}{child}/" for child in children if child.startswith(".")]
        left_out["hidden"] += [prefix + name for name in names if name.startswith(".")]
        children[:] = sorted(c for c in children if not c.startswith(".") and c not in ignored)
        yield prefix, directory, [name for name in names if not name.startswith(".")]


def _files_matching(pattern: Path, left_out: LeftOut) -> list[SourceFile]:
    """Return the files that match; in each directory, a component that exists there is a name, not a pattern."""
    root, places = None, [Path(pattern.anchor)]
    for part in pattern.parts[bool(pattern.anchor) :]:
        is_name = len(places) == 1 and (not glob.has_magic(part) or os.path.lexists(places[0] / part))
        if root is None and not is_name:
            root = places[0]
        places = list(dict.fromkeys(child for place in places for child in _children(place, part, left_out)))
    files = (
        [SourceFile(place.relative_to(root).as_posix(), place) for place in places if place.is_file()] if root else []
    )
    read = {parent for file in files for parent in file.path.parents}
    for place in places:
        if place.is_dir() and place not in read and pattern.name != "**":
            left_out["directories: a pattern that ends in /**/* goes into them"].append(f"{place}/")
        elif not place.exists() and place.is_symlink():
            left_out["broken links, or no regular files"].append(str(place))
    return files


def _children(place: Path, part: str, left_out: LeftOut) -> list[Path]:
    """Return what one component of a pattern leads to from a directory."""
    if not glob.has_magic(part):
        return [place / part]
    if os.path.lexists(place / part):
        others = glob.glob(part, root_dir=place)
        left_out[_THIS_NAME] += [str(place / name) for name in others if name != part]
        return [place / part]
    if part == "**":  # the directory and everything below, safe from cyclic links
        found = [(Path(directory), names) for _, directory, names in _walk(place, defaultdict(list))]
        return [path for directory, names in found for path in (directory, *(directory / name for name in names))]
    return [place / name for name in glob.glob(part, root_dir=place)]


# The same file under several names


def _once(files: list[SourceFile], left_out: LeftOut) -> list[SourceFile]:
    """Leave out further names of the same file, links first."""
    by_inode: dict[tuple[int, int], list[SourceFile]] = defaultdict(list)
    for file in files:
        stat = file.path.stat()
        by_inode[stat.st_dev, stat.st_ino].append(file)
    kept = []
    for same in by_inode.values():
        first, *others = sorted(same, key=lambda file: (_is_linked(file), file)) if len(same) > 1 else same
        kept.append(first)
        for other in others:
            # Some file systems have meaningless inode numbers.
            if first.path.stat().st_nlink > 1 or os.path.realpath(first.path) == os.path.realpath(other.path):
                left_out["other names of files that are read"].append(f"{other.name} = {first.name}")
            else:
                kept.append(other)
    return kept


def _is_linked(file: SourceFile) -> bool:
    """Return whether the path from the root of the source to a file has a link."""
    root = os.path.realpath(str(file.path).removesuffix(file.name))
    return os.path.realpath(file.path) != os.path.join(root, file.name)


def _refuse_packed_and_not(config: DataConfig, files: list[SourceFile]) -> None:
    names: dict[str, str] = {}
    for file in files:
        other = names.setdefault(_PACKING.sub("", file.name), file.name)
        if other != file.name:
            raise DataError(
                f"data.path={config.path}: {other} and {file.name} look like the same rows, packed and not, which would "
                "be read twice; remove or rename one, or choose by a pattern such as '*.gz'"
            )
