"""Preparing images: decoded once, brought to one size and written as bytes, with what is known of them."""

import hashlib
import io
import itertools
import json
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from bigtrain.config import DataConfig, OnBad
from bigtrain.config.packages import require
from bigtrain.data.order.permutation import derive_key, mix64
from bigtrain.data.prepare.image_sources import Raw, Source, find_images
from bigtrain.data.read.dropped import SKIPS
from bigtrain.data.read.images import INDEX_FILE, LABELS, PIXELS, ImageIndex
from bigtrain.data.read.remote import is_url
from bigtrain.errors import DataError, counted, first_line
from bigtrain.files import make_directory
from bigtrain.log import get_logger, reporter

_FORMAT = 1
_AT_ONCE = 256
_DECODERS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # other formats run programs or are seldom images
_GREY = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L")


class _Shape(NamedTuple):
    size: int
    channels: int
    resizes: bool


def prepare_images(config: DataConfig, *, progress: bool) -> Path:
    """Return ``<data.root>/images-<name>``, by files and settings, with decoded images; DataError: one is damaged."""
    place = find_images(_fetched(config.path, config.root) if is_url(config.path) else config.path)
    stats = [(str(file), stat.st_size, stat.st_mtime_ns) for file in place.files for stat in [file.stat()]]
    settings = [config.image_size, config.image_channels, config.validation_fraction, config.on_bad_row.name]
    identity = hashlib.sha256(json.dumps([_FORMAT, stats, settings]).encode()).hexdigest()
    directory = Path(config.root, f"images-{identity[:12]}")
    make_directory(directory, lambda work: _fill(work, config, place.read(), progress))
    return directory


def _fetched(url: str, root: str) -> str:
    """Copy the files at a URL that fsspec knows below ``root``, once; DataError: there are none, or they cannot be had."""
    import fsspec

    if url.startswith("s3://"):
        require(f"data.path={url}", "s3fs", "s3")
    try:
        system, place = fsspec.core.url_to_fs(url)
        files = {name: facts.get("size") for name, facts in sorted(system.find(place, detail=True).items())}
        identity = hashlib.sha256(json.dumps([url, files]).encode()).hexdigest()
        directory = Path(root, f"fetched-{identity[:12]}")

        def fill(work: Path) -> None:
            get_logger().info(f"data.path={url}: fetching {len(files)} files")
            names = [name.removeprefix(place).strip("/") or Path(name).name for name in files]
            for name in names:
                if ".." in Path(name).parts:
                    raise ValueError(f"{name} leads out of it")
                (work / name).parent.mkdir(parents=True, exist_ok=True)
            system.get(list(files), [str(work / name) for name in names])

        if files:
            make_directory(directory, fill)
    except Exception as error:  # each file system has its own
        raise DataError(f"data.path={url}: cannot be fetched: {first_line(error)}") from error
    if not files:
        raise DataError(f"data.path={url}: there is no such file or directory")
    return str(directory)


def _fill(work: Path, config: DataConfig, source: Source, progress: bool) -> None:
    labels = np.concatenate([side.labels for side in source.sides])
    _require_known(source)
    shape = _shape(config, source)
    pixels = np.lib.format.open_memmap(
        work / PIXELS, mode="w+", dtype=np.uint8, shape=(len(labels), shape.size, shape.size, shape.channels)
    )
    if shutil.disk_usage(work).free < pixels.nbytes:  # to a mapped file a full disk is a signal, no error
        raise OSError(f"decoded images take {pixels.nbytes / 2**20:.1f} MiB, and fewer are free")
    hashes = np.zeros(len(labels), dtype=np.uint64)
    is_good = np.ones(len(labels), dtype=np.bool_)
    with reporter("decoding images", pixels.nbytes, progress) as advance:
        for i, decoded in enumerate(_decoded(source, config, shape)):
            is_good[i] = decoded is not None
            if decoded is not None:
                pixels[i], hashes[i] = decoded, xxhash.xxh3_64_intdigest(np.ascontiguousarray(decoded).data)
            advance(pixels[0].nbytes)
    pixels.flush()
    np.save(work / LABELS, labels)
    is_held_out, num_in_both = _held_out(hashes, source, config)
    rows = {"train": np.flatnonzero(is_good & ~is_held_out), "validation": np.flatnonzero(is_good & is_held_out)}
    mean, deviation = _statistics(pixels, rows["train"])
    digest = xxhash.xxh3_128()
    for name, side in rows.items():
        np.save(work / f"{name}.npy", side)
        digest.update(hashes[side].tobytes() + labels[side].tobytes() + f"{name} {pixels.shape[1:]}".encode())
    index = ImageIndex(
        fingerprint=digest.hexdigest(),
        label_names=source.label_names,
        mean=mean,
        deviation=deviation,
        num_train=len(rows["train"]),
        num_validation=len(rows["validation"]),
        num_left_out=int((~is_good).sum()),
        num_in_both=num_in_both,
    )
    (work / INDEX_FILE).write_text(json.dumps(asdict(index), indent=1))
    if index.num_left_out:
        get_logger().warning(
            f"data.path={config.path}: {counted(index.num_left_out, 'image')} left out that cannot be decoded"
        )
    if num_in_both:
        get_logger().warning(
            f"data.path={config.path}: {num_in_both} images of the test set are in the training set too"
        )


def _require_known(source: Source) -> None:
    names = source.label_names
    for side in source.sides:
        for i in np.argwhere((side.labels < 0) | (side.labels >= len(names)))[:1, 0].tolist():
            raise DataError(f"{side.where(i)}: label {side.labels[i]}; the classes are 0 to {len(names) - 1}")
    if not any(len(side.labels) for side in source.sides):
        raise DataError("data.path: there is no image")


def _held_out(hashes: NDArray[np.uint64], source: Source, config: DataConfig) -> tuple[NDArray[np.bool_], int]:
    """Return whether each image is held out, if need be by its hash, and how many of a test set are trained on too."""
    num_train = len(source.sides[0].labels)
    if len(source.sides) > 1:
        own = np.arange(len(hashes)) >= num_train
        return own, int(np.isin(hashes[own], hashes[~own]).sum())
    if config.validation_fraction == 0:
        return np.zeros(len(hashes), dtype=np.bool_), 0
    drawn = mix64(hashes ^ np.uint64(derive_key(*b"validation")))
    return drawn <= max(drawn.min(), np.uint64(config.validation_fraction * 2**64)), 0


def _statistics(pixels: NDArray[np.uint8], rows: NDArray[np.int64]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel: from exact sums, whatever they are cut into."""
    total = squares = np.zeros(pixels.shape[-1], dtype=np.int64)
    for first in range(0, len(rows), _AT_ONCE):
        part = pixels[rows[first : first + _AT_ONCE]].astype(np.int64)
        total, squares = total + part.sum(axis=(0, 1, 2)), squares + (part**2).sum(axis=(0, 1, 2))
    count = max(len(rows) * pixels.shape[1] * pixels.shape[2], 1)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return mean.tolist(), np.where(deviation > 0, deviation, 1.0).tolist()


def _decoded(source: Source, config: DataConfig, shape: _Shape) -> Iterator[NDArray[np.uint8] | None]:
    """Yield pixels ``(H, W, C)`` in order; None for what cannot be decoded and is left out."""

    def decode(place: tuple[int, int]) -> NDArray[np.uint8] | None:
        side, i = source.sides[place[0]], place[1]
        try:
            return _pixels(side.read(i), shape, side.where(i))
        except DataError as error:
            if config.on_bad_row is OnBad.skip:
                return None
            raise DataError(f"{error}; {SKIPS}") from error

    places = ((number, i) for number, side in enumerate(source.sides) for i in range(len(side.labels)))
    with ThreadPoolExecutor(config.prepare_processes) as pool:  # Pillow decodes without Python's lock
        while chunk := list(itertools.islice(places, _AT_ONCE)):
            yield from pool.map(decode, chunk)


def _shape(config: DataConfig, source: Source) -> _Shape:
    """Return what ``config`` says, and the first image where it says nothing."""
    size, channels, side = config.image_size, config.image_channels, source.sides[0]
    if size and channels:
        return _Shape(size, channels, True)
    raw, where = side.read(0), side.where(0)
    image = raw if isinstance(raw, np.ndarray) else _opened(raw, where)
    width, height = image.shape[::-1] if isinstance(image, np.ndarray) else image.size
    if not size and width != height:
        raise DataError(f"{where}: {width}x{height} pixels; set data.image_size, a square to which all are resized")
    is_grey = isinstance(image, np.ndarray) or image.mode in _GREY
    return _Shape(size or width, channels or (1 if is_grey else 3), bool(size))


def read_image(path: Path, size: int, channels: int, *, resizes: bool) -> NDArray[np.uint8]:
    """Return an image file as training has it, uint8 ``(H, W, C)``; DataError if it cannot be."""
    return _pixels(path, _Shape(size, channels, resizes), str(path))


def _pixels(raw: Raw, shape: _Shape, where: str) -> NDArray[np.uint8]:
    size = (shape.size, shape.size)
    if isinstance(raw, np.ndarray) and raw.shape == size:
        return np.repeat(raw[:, :, None], shape.channels, axis=2)
    require(f"data=images: {where}", "PIL", "images")
    from PIL import Image, ImageOps

    image = Image.fromarray(raw) if isinstance(raw, np.ndarray) else _opened(raw, where)
    if image.size != size:
        if not shape.resizes:
            raise DataError(
                f"{where}: {image.size[0]}x{image.size[1]} pixels, the first image has {shape.size}x{shape.size}; "
                "set data.image_size, to which all are resized"
            )
        image = ImageOps.fit(_of_bytes(image, shape.channels), size, Image.Resampling.BILINEAR)
    return np.asarray(_of_bytes(image, shape.channels)).reshape(*size, shape.channels)


def _opened(raw: Path | bytes, where: str) -> Any:
    require(f"data=images: {where}", "PIL", "images")
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(raw) if isinstance(raw, bytes) else raw, formats=_DECODERS)
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        told = first_line(error).split(" <_io")[0]
        raise DataError(f"{where}: cannot be decoded ({told}); it must be one of {', '.join(_DECODERS)}") from error
    if image.mode in ("I", "F"):
        raise DataError(f"{where}: pixels of 32 bits; write them as 8 or 16 bits")
    if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":  # telephones add previews
        raise DataError(f"{where}: {frames} frames; an image to train on has one")
    return ImageOps.exif_transpose(image)


def _of_bytes(image: Any, channels: int) -> Any:
    """Return a Pillow image as 8 bits of grey or colour; what is transparent becomes white."""
    from PIL import Image

    mode = "L" if channels == 1 else "RGB"
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)
