"""The files of a source: every file that ``data.path`` leads to is read once, or named with the reason.

What :func:`find_files` returns depends on names and links only.
"""

import glob
import gzip
import io
import json
import os
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bigtrain.config import DataConfig, DataSource, OnBad
from bigtrain.config.convert import SEVERAL
from bigtrain.errors import DataError, as_data_error, some

DICTIONARY = "dataset_dict.json"
DESCRIPTIONS = ("state.json", DICTIONARY, "dataset_info.json")  # used, but no data
_SPLIT = "train|validation|valid|val|dev|eval|test"
_OF_SPLIT = re.compile(
    rf"(?:.*[-_.])?({_SPLIT})-\d{{5}}-of-\d{{5}}\..*|((?i:{_SPLIT}))\.(?i:jsonl|ndjson|json|csv|tsv|parquet)(?i:\.gz|\.zst)?"
)
"""Names of files of a split: the hub's, or the split alone. Before such numbers other words stand too, as for the parts of a corpus."""
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
    DataSource.tokens: (".bin", ".ds", ".npy", ".parquet"),
}
_OF_TOKENS = (".idx", ".index", ".metadata")  # what lies beside files of ids
_PACKING = re.compile(r"\.(gz|zst)$", re.IGNORECASE)
_MOST_NAMES = 8
_THIS_NAME = "matched as a pattern, but there is something of this very name"


class SourceFile(NamedTuple):
    name: str  # path relative to the root of the source, with '/' on every system
    path: Path


def saved_files(files: list[SourceFile], config: DataConfig, left_out: LeftOut) -> list[SourceFile]:
    """Return the files of the configured split that ``state.json`` lists; Arrow files of other origin have no split.

    ``map`` and ``shuffle`` keep caches beside them. DataError: the split, or a file, is missing, or several may be
    meant.
    """
    is_named = Path(config.path).is_file()
    listings = {directory: _listing(directory) for directory in {file.path.parent for file in files}}
    by_split: dict[str | None, list[SourceFile]] = {}
    for file in files:
        listing = listings[file.path.parent]
        if listing is None or file.path.name in listing or is_named:
            by_split.setdefault((listing or {}).get(file.path.name), []).append(file)
        else:
            left_out["not listed as data by state.json or dataset_info.json beside it"].append(file.name)
    root = Path(config.path)
    listed = _read(root / DICTIONARY)["splits"] if (root / DICTIONARY).is_file() else []
    split = choose_split(sorted({*listed, *by_split} - {None}), config)
    if split in listed and split not in by_split:
        raise DataError(f"{root / split}: is not there, but {root / DICTIONARY} lists it; copy it again")
    chosen = [file for name in by_split if split in (None, name) for file in by_split[name]]
    if split is not None:
        left_out[f"of no split, and data.split={split}"] += [file.name for file in by_split.get(None, [])]
    for directory in {file.path.parent for file in chosen}:
        for name in listings[directory] or {}:
            if not (directory / name).is_file():
                raise DataError(f"{directory / name}: is not there, but {directory} lists it as data; copy it again")
    return chosen


def files_of_split(files: list[SourceFile], config: DataConfig, left_out: LeftOut) -> list[SourceFile]:
    """Return the files of the configured split, as ``train-00000-of-00002.parquet`` or ``train.jsonl``."""
    matches = [_OF_SPLIT.fullmatch(file.path.name) for file in files]
    splits = [(match[1] or match[2].lower()) if match else None for match in matches]
    is_file = Path(config.path).is_file()
    if not any(splits):
        if config.split is None or (config.split == "train" and is_file):  # a file without a split is for training
            return files
        raise DataError(
            f"data.path={config.path}: no file is named after a split, as train-00000-of-00002.parquet and train.jsonl "
            f"are; leave data.split={config.split} out, and choose by a pattern in data.path"
        )
    split = None if config.split is None and is_file else choose_split(sorted({*splits} - {None}), config)
    if split is None:
        return files
    others = [file.name for file, own in zip(files, splits, strict=True) if own != split]
    left_out[f"not of data.split={split}"] += others
    return [file for file, own in zip(files, splits, strict=True) if own == split]


def choose_split(there: list[str], config: DataConfig) -> str | None:
    """Return which of the splits ``there`` is read, None for all; DataError if it is missing or ambiguous."""
    where = f"data.path={config.path}"
    if config.split is None and len(there) > 1:
        raise DataError(f"{where}: holds the splits {', '.join(sorted(there))}; set data.split to one of them")
    if config.split is None or (config.split == "train" and not there):
        return None
    if not there:
        raise DataError(f"{where}: has no splits, so no '{config.split}'; leave data.split out")
    if config.split not in there:
        raise DataError(f"{where}: no split '{config.split}'; set data.split to one of {sorted(there)}")
    return config.split


def split_name(split: object) -> str | None:
    """Return the name of the split that a dataset is of or was cut from, as in ``train[:10%]``."""
    return None if split is None else re.sub(r"\[.*?\]", "", str(split))


def _listing(directory: Path) -> dict[str, str | None] | None:
    """Return the data files of a directory with their splits, as far as known; None if datasets has not written it."""
    if (directory / "state.json").is_file():
        state = read_state(directory)
        places = [place for place in (directory, directory.resolve()) if (place.parent / DICTIONARY).is_file()]
        splits = [place.name for place in places if place.name in _read(place.parent / DICTIONARY)["splits"]]
        if places and not splits:
            return {}
        split = splits[0] if splits else split_name(state.get("_split"))
        return {Path(file["filename"]).name: split for file in state["_data_files"]}
    info = directory / "dataset_info.json"  # of the datasets cache: <dataset>-<split>[-00000-of-00002].arrow
    known = (_read(info).get("splits") or {}) if info.is_file() else {}
    names = [path.name for path in directory.iterdir()]
    found = {
        name: split
        for split in known
        for name in names
        if re.fullmatch(rf"([^-].*-)?{re.escape(split)}(-\d{{5}}-of-\d{{5}})?\.arrow", name)
    }
    return found or None


def read_state(directory: Path) -> dict[str, Any]:
    """Return ``state.json`` of a saved dataset; DataError if it is damaged or has an old selection of rows."""
    state = _read(directory / "state.json")
    if any(value for key, value in state.items() if key.startswith("_indices")):
        raise DataError(
            f"{directory}: saved by an old version of datasets with a selection of rows, which is not read any more; "
            "load it with that version and save it again after flatten_indices()"
        )
    return {"_data_files": [], **state}


def _read(path: Path) -> dict[str, Any]:
    with as_data_error(path, OSError, ValueError):
        values = json.loads(path.read_bytes())
    if not isinstance(values, dict):
        raise DataError(f"{path}: cannot be read: not a JSON object")
    return {"splits": [], **values}


class Part(NamedTuple):
    """What one process reads at a time: some whole files, or a range of one file or dataset."""

    files: tuple[SourceFile, ...] = ()  # empty for a dataset
    start: int = 0  # first byte (jsonl), row group (parquet), row (dataset) or shard (streamed dataset)
    stop: int | None = None  # of that range; None: to the end, of a text if it is all that is read
    first_row: int = 0  # rows before the range


class Found(NamedTuple):
    """What a path leads to."""

    files: list[SourceFile]  # what is read, sorted by name
    left_out: LeftOut  # what is not


def find_files(config: DataConfig) -> Found:
    """Return the files of a source, and what its path leads to besides.

    A path, or a component of it, that exists is a name; only else it is a pattern. Each file is read once, however
    often it is linked. DataError if there is none, one is there packed and not, or the split is missing or open.
    """
    with as_data_error(f"data.path={config.path}"):
        return _find(config)


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
        given = str(config.path)
        what += f"; lists and braces name no files: {SEVERAL}" * ("{" in given or given.startswith("["))
    told = tell_left_out(left_out)
    return f"{what}; not read: {told}; others are read by a pattern such as data.path='*.json'" if told else what


def _files_below(
    root: Path, suffixes: tuple[str, ...], left_out: LeftOut, ignored: frozenset[str] = frozenset()
) -> list[SourceFile]:
    files = []
    for prefix, directory, names in _walk(root, left_out, ignored):
        for name in names:
            path = os.path.join(directory, name)
            if suffixes == _SUFFIXES[DataSource.arrow] and name in DESCRIPTIONS:
                continue
            if suffixes == _SUFFIXES[DataSource.tokens] and name.endswith(_OF_TOKENS):
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
    """Yield (relative prefix, path, file names) of every directory, once, without hidden and ``ignored`` ones."""
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


def _once(files: list[SourceFile], left_out: LeftOut) -> list[SourceFile]:
    """Leave out further names of the same file, links first."""
    same_files: dict[object, list[SourceFile]] = defaultdict(list)
    for file in files:
        stat = file.path.stat()  # only of files with several names: some file systems have meaningless inode numbers
        same_files[(stat.st_dev, stat.st_ino) if stat.st_nlink > 1 else os.path.realpath(file.path)].append(file)
    kept = []
    for same in same_files.values():
        first, *others = sorted(same, key=lambda file: (_is_linked(file), file)) if len(same) > 1 else same
        kept.append(first)
        left_out["other names of files that are read"] += [f"{other.name} = {first.name}" for other in others]
    return kept


def _is_linked(file: SourceFile) -> bool:
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
