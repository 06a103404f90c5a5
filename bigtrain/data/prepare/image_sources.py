"""Where images come from: directories by class, MNIST's files, parquet with image bytes, and packages that ship some."""

import glob
import gzip
import itertools
import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.errors import DataError, as_data_error, first_line

TRAIN, HELD_OUT = ("train", "training"), ("test", "validation", "valid", "val", "t10k")  # of the sides
_FASHION = Path("/usr/share/datasets/fashion-mnist")
_FASHION_NAMES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
_IDX_BYTES, _IDX_RANKS = 0x08, {"images": 3, "labels": 1}
_TABLE = "metadata.jsonl"  # names files and their labels, as the datasets library has it
_LABEL_COLUMNS = ("label", "labels", "fine_label")

Raw = NDArray[np.uint8] | Path | bytes  # an image of a source: pixels ``(H, W)``, or what Pillow decodes


class Side(NamedTuple):
    """Images to train on, or of a test set."""

    labels: NDArray[np.int64]  # numbers ``(N,)``, or ``(N, C)`` where an image may have several: 1 of those that it has
    read: Callable[[int], Raw]
    where: Callable[[int], str]  # name of an image in messages


class Source(NamedTuple):
    """Images of one ``data.path``."""

    sides: list[Side]  # to train on; and a test set, if there is one
    label_names: list[str]


class Place(NamedTuple):
    """Files of a source, and who reads them."""

    files: list[Path]
    read: Callable[[], Source]


def find_images(path: str) -> Place:
    """Return what ``data.path`` leads to, without reading it; DataError if this module reads none of it."""
    kind, _, name = path.partition(":")
    if kind == "package":
        return _of_package(path, name)
    root = Path(path)
    if not root.exists() and not (matched := sorted(map(Path, glob.glob(path, recursive=True)))):
        raise DataError(f"data.path={path}: there is no such file or directory")
    files = [root] if root.is_file() else sorted(root.rglob("*.parquet")) if root.is_dir() else matched
    if tables := [file for file in files if file.suffix == ".parquet"]:
        return Place(tables, lambda: _read_parquet(tables, path))
    if not root.is_dir():
        raise DataError(
            f"data.path={path}: data=images reads a directory of images, MNIST's files in one, or .parquet files"
        )
    if idx := _idx_files(root):
        return Place(list(idx.values()), lambda: _read_idx(idx, path))
    return _of_table(root / _TABLE) if (root / _TABLE).is_file() else _of_directory(root, path)


def _of_package(path: str, name: str) -> Place:
    if name == "digits":
        found = find_spec("sklearn")
        file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz" if found else None
        if file is None or not file.is_file():
            raise DataError(f"data.path={path}: the digits are in the package scikit-learn: pip install scikit-learn")
        return Place([file], lambda: _read_digits(file))
    if name == "fashion_mnist":
        idx = _idx_files(_FASHION)
        if not idx:
            raise DataError(
                f"data.path={path}: {_FASHION} has no images; Debian's package brings them: "
                "apt-get install dataset-fashion-mnist"
            )
        return Place(list(idx.values()), lambda: _read_idx(idx, path)._replace(label_names=_FASHION_NAMES))
    raise DataError(f"data.path={path}: must be package:digits or package:fashion_mnist")


def _of_arrays(images: NDArray[np.uint8], labels: NDArray[Any], where: Any) -> Side:
    return Side(labels.astype(np.int64), lambda i: images[i], lambda i: f"{where}: image {i}")


def _read_digits(file: Path) -> Source:
    table = np.loadtxt(file, delimiter=",")
    images = np.round(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return Source([_of_arrays(images, table[:, -1], file)], [str(digit) for digit in range(10)])


def _idx_files(root: Path) -> dict[str, Path]:
    """Return the files of a directory that are named as MNIST's, by ``train-images``, ``t10k-labels`` ..."""
    found: dict[str, Path] = {}
    for side in ("train", "t10k"):
        for kind, rank in _IDX_RANKS.items():
            for name in (f"{side}-{kind}-idx{rank}-ubyte", f"{side}-{kind}.idx{rank}-ubyte"):
                there = [file for file in (root / name, root / f"{name}.gz") if file.is_file()]
                found |= {f"{side}-{kind}": there[0]} if there else {}
    return found


def _read_idx(files: dict[str, Path], path: str) -> Source:
    sides = []
    for side in ("train", "t10k"):
        missing = [kind for kind in _IDX_RANKS if f"{side}-{kind}" not in files]
        if side == "t10k" and len(missing) == len(_IDX_RANKS):
            continue
        if missing:
            raise DataError(f"data.path={path}: {side}-{missing[0]}-idx{_IDX_RANKS[missing[0]]}-ubyte[.gz] is missing")
        images, labels = (_read_array(files[f"{side}-{kind}"], rank) for kind, rank in _IDX_RANKS.items())
        if len(images) != len(labels):
            raise DataError(f"{files[f'{side}-labels']}: {len(labels)} labels for {len(images)} images")
        sides.append(_of_arrays(images, labels, files[f"{side}-images"]))
    most = max(int(side.labels.max(initial=0)) for side in sides)
    return Source(sides, [str(label) for label in range(most + 1)])


def _read_array(file: Path, rank: int) -> NDArray[np.uint8]:
    """Return the array of an idx file (LeCun et al., "The MNIST database"): its ``rank`` sizes, then bytes."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as handle:
            content = handle.read()
    except (OSError, EOFError) as error:
        raise DataError(f"{file}: cannot be read to its end: {first_line(error)}; fetch it again") from error
    head = 4 + 4 * rank
    if len(content) < head or content[:4] != bytes([0, 0, _IDX_BYTES, rank]):
        raise DataError(f"{file}: no idx file of bytes with {rank} dimension{'s' * (rank > 1)}")
    shape = np.frombuffer(content, ">u4", count=rank, offset=4).astype(np.int64)
    if len(content) != head + (size := int(np.prod(shape))):
        raise DataError(f"{file}: {len(content) - head} bytes of data, where its head says {size}; fetch it again")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def _of_directory(root: Path, path: str) -> Place:
    below = [entry.name for entry in _shown(root) if entry.is_dir()]
    train, held_out = ([name for name in below if name.lower() in names] for names in (TRAIN, HELD_OUT))
    if len(train) > 1 or (train and len(held_out) > 1):
        raise DataError(f"data.path={path}: has {', '.join(train + held_out)}; one is to train on, one may be held out")
    tops = [root / name for name in (train + held_out if train else [""])]
    classes = sorted(entry.name for entry in _shown(tops[0]) if entry.is_dir())
    if not classes:
        raise DataError(f"data.path={path}: {tops[0]} has no directories; data=images reads one of images per class")
    found = [_class_files(top, classes) for top in tops]
    return Place([file for files, _ in found for file in files], lambda: Source([side for _, side in found], classes))


def _class_files(top: Path, classes: list[str]) -> tuple[list[Path], Side]:
    files: list[Path] = []
    labels: list[int] = []
    for entry in _shown(top):
        if not entry.is_dir():
            raise DataError(f"{entry}: beside the directories of classes; put it into one of them, or away")
        if entry.name not in classes:
            raise DataError(f"{entry}: no class of the training images: {', '.join(classes)}")
        inside = [Path(at, name) for at, _, names in os.walk(entry) for name in names if not name.startswith(".")]
        if dead := [file for file in inside if not file.exists()]:
            raise DataError(f"{dead[0]}: a link to a file that is not there; remove it")
        if not inside:
            raise DataError(f"{entry}: a class without an image; remove the directory, or fill it")
        files += sorted(inside)
        labels += [classes.index(entry.name)] * len(inside)
    return files, Side(np.array(labels, dtype=np.int64), lambda i: files[i], lambda i: str(files[i]))


def _of_table(file: Path) -> Place:
    """Return the images that a file of lines ``{"file_name": ..., "label": <a label, or a list of them>}`` names."""
    images: list[Path] = []
    labels: list[Any] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            images.append(file.parent / row["file_name"])
            labels.append(next(row[name] for name in _LABEL_COLUMNS if name in row))
        except (ValueError, TypeError, KeyError, StopIteration) as error:
            raise DataError(f'{file}:{number}: not as {{"file_name": "a.png", "label": "cat"}}, or a list') from error
        if not images[-1].is_file():
            raise DataError(f"{file}:{number}: there is no file {images[-1]}")
    several = {isinstance(label, list) for label in labels}
    if len(several) != 1:
        raise DataError(f"{file}: some labels are lists and others are not, or there are none; write all alike")
    lists = [[str(label) for label in own] for own in (labels if several == {True} else [[own] for own in labels])]
    names = sorted({label for own in lists for label in own})
    numbers = [[names.index(label) for label in own] for own in lists]
    found = _as_array(numbers if several == {True} else np.array([own[0] for own in numbers]), len(names), file)
    side = Side(found, lambda i: images[i], lambda i: str(images[i]))
    return Place([file, *images], lambda: Source([side], names))


def _shown(directory: Path) -> list[Path]:
    return sorted(entry for entry in directory.iterdir() if not entry.name.startswith((".", "__MACOSX")))


def _read_parquet(files: list[Path], path: str) -> Source:
    """Return the images of files with the hub's columns: ``bytes`` within a struct, and a number of a class."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with as_data_error(f"data.path={path}", OSError, pa.ArrowException):
        tables = [pq.read_table(file) for file in files]
    is_held_out = [file.name.lower().startswith(HELD_OUT) for file in files]
    if all(is_held_out):
        is_held_out = [False] * len(files)
    columns = [_columns(table, file) for table, file in zip(tables, files, strict=True)]
    if len({isinstance(labels, list) for _, labels in columns}) > 1:
        (lists, *_), (numbers, *_) = (
            [file for file, (_, labels) in zip(files, columns, strict=True) if isinstance(labels, list) is is_list]
            for is_list in (True, False)
        )
        raise DataError(
            f"data.path={path}: labels are lists in {lists.name} and numbers in {numbers.name}; write all alike"
        )
    names = _class_names(tables[0].schema, [labels for _, labels in columns])
    columns = [(images, _as_array(labels, len(names), files[i])) for i, (images, labels) in enumerate(columns)]
    sides = []
    for side in (False, True):
        parts = [i for i, held_out in enumerate(is_held_out) if held_out is side]
        if parts:
            sides.append(_of_columns([columns[i] for i in parts], [files[i] for i in parts]))
    return Source(sides, names)


def _columns(table: Any, file: Path) -> tuple[Any, Any]:
    """Return the images of a table and their labels, each a number or a list of them."""
    import pyarrow as pa

    def holds_labels(name: str) -> bool:
        kind = schema.field(name).type if name in schema.names else pa.null()
        return pa.types.is_integer(kind) or (pa.types.is_list(kind) and pa.types.is_integer(kind.value_type))

    schema = table.schema
    images = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    labels = [name for name in _LABEL_COLUMNS if holds_labels(name)]
    if not images or not labels:
        raise DataError(
            f"{file}: its columns are {', '.join(schema.names)}; data=images reads an image with 'bytes' and a number 'label'"
        )
    if table[labels[0]].null_count:
        raise DataError(f"{file}: {table[labels[0]].null_count} rows have no {labels[0]}")
    column = table[labels[0]]
    return table[images[0]], column.to_pylist() if pa.types.is_list(column.type) else column.to_numpy()


def _as_array(labels: Any, num_labels: int, file: Path) -> NDArray[np.int64]:
    """Return labels ``(N,)``, or of lists ``(N, C)`` with 1 for each that is in the list; DataError: one is unknown."""
    if not isinstance(labels, list):
        return labels.astype(np.int64)
    found = np.zeros((len(labels), num_labels), dtype=np.int64)
    for row, own in enumerate(labels):
        if wrong := [label for label in own if label is None or not 0 <= label < num_labels]:
            raise DataError(f"{file}: row {row}: label {wrong[0]}; the classes are 0 to {num_labels - 1}")
        found[row, own] = 1
    return found


def _of_columns(columns: list[tuple[Any, NDArray[np.int64]]], files: list[Path]) -> Side:
    ends = np.cumsum([len(labels) for _, labels in columns])

    def at(i: int) -> tuple[int, int]:
        part = int(np.searchsorted(ends, i, side="right"))
        return part, i - int(ends[part] - len(columns[part][1]))

    def read(i: int) -> bytes:
        part, row = at(i)
        return (columns[part][0][row].as_py() or {}).get("bytes") or b""

    def where(i: int) -> str:
        part, row = at(i)
        return f"{files[part]}: row {row}"

    return Side(np.concatenate([labels for _, labels in columns]), read, where)


def _class_names(schema: Any, labels: list[Any]) -> list[str]:
    """Return the names that datasets has written into the file, or numbers."""
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    for name in _LABEL_COLUMNS:
        feature = described.get(name) or {}
        if names := feature.get("names") or (feature.get("feature") or {}).get("names"):
            return [str(name) for name in names]
    numbers = itertools.chain.from_iterable(
        itertools.chain.from_iterable(part) if isinstance(part, list) else part for part in labels
    )
    return [str(label) for label in range(1 + max(map(int, numbers), default=0))]
