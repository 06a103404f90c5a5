"""Which files of a saved dataset or a split directory are data, and of which split."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from bigtrain.config import DataConfig
from bigtrain.errors import DataError

DICTIONARY = "dataset_dict.json"
DESCRIPTIONS = ("state.json", DICTIONARY, "dataset_info.json")  # used, but no data
_SPLIT = "train|validation|valid|val|dev|eval|test"
_OF_SPLIT = re.compile(
    rf"(?:.*[-_.])?({_SPLIT})-\d{{5}}-of-\d{{5}}\..*|((?i:{_SPLIT}))\.(?i:jsonl|ndjson|json|csv|tsv|parquet)(?i:\.gz|\.zst)?"
)
"""Names of files of a split: the hub's, or the split alone. Before such numbers other words stand too, as for the parts of a corpus."""


class SourceFile(NamedTuple):
    """One file of a source."""

    name: str  # path relative to the root of the source, with '/' on every system
    path: Path


def saved_files(files: list[SourceFile], config: DataConfig, left_out: dict[str, list[str]]) -> list[SourceFile]:
    """Return those of ``files`` that are data of the configured split; Arrow files of other origin have no split.

    ``state.json`` lists what ``save_to_disk`` wrote; ``map`` and ``shuffle`` keep their caches beside it. DataError if the
    split is not there, or missing among several, or a listed file is not there.
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


def files_of_split(files: list[SourceFile], config: DataConfig, left_out: dict[str, list[str]]) -> list[SourceFile]:
    """Return the files of the configured split, as ``train-00000-of-00002.parquet`` or ``train.jsonl``.

    Raises:
        DataError: the split is not there, or missing among several.
    """
    matches = [_OF_SPLIT.fullmatch(file.path.name) for file in files]
    splits = [(match[1] or match[2].lower()) if match else None for match in matches]
    is_file = Path(config.path).is_file()
    if config.split is None and (is_file or not any(splits)):
        return files
    if config.split == "train" and is_file and not any(splits):  # a file without a split is for training
        return files
    if not any(splits):
        raise DataError(
            f"data.path={config.path}: no file is named after a split, as train-00000-of-00002.parquet and train.jsonl "
            f"are; leave data.split={config.split} out, and choose by a pattern in data.path"
        )
    split = choose_split(sorted({name for name in splits if name}), config)
    if split is None:
        return files
    left_out[f"not of data.split={split}"] += [
        file.name for file, own in zip(files, splits, strict=True) if own != split
    ]
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
    splits = (_read(info).get("splits") or {}) if info.is_file() else {}
    names = [path.name for path in directory.iterdir()]
    found = {
        name: split
        for split in splits
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
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: cannot be read: not a JSON object")
    return {"splits": [], **values}
