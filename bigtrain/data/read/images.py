"""Prepared images: pixels of one size in a file, changed and normalised as they are drawn."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.read.augment import Augmentation
from bigtrain.errors import DataError, first_line

INDEX_FILE = "images.json"
PIXELS, LABELS = "pixels.npy", "labels.npy"
"""Files with an element per image: uint8 ``(N, H, W, C)`` and int64 ``(N,)``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageIndex:
    """What is known of prepared images."""

    fingerprint: str
    """Identity of pixels, labels and sides."""
    label_names: list[str]
    """Of each class, in the order of their numbers."""
    mean: list[float]
    """Of each channel on the training side, from 0 to 255."""
    deviation: list[float]
    """Standard deviation likewise; 1 of a channel that is constant."""
    num_train: int
    num_validation: int
    num_left_out: int = 0
    """Images that could not be decoded, with ``data.on_bad_row=skip``."""
    num_in_both: int = 0
    """Images of the source's own test set that are in its training set too."""


def read_image_index(directory: Path) -> ImageIndex:
    """Return what is known of the images in a directory; DataError if it is damaged."""
    with _whole(directory):
        return ImageIndex(**json.loads((directory / INDEX_FILE).read_text()))


@contextlib.contextmanager
def _whole(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{directory}: damaged: {first_line(error)}; remove it, and it is prepared again") from error


def visible(pixels_CHW: NDArray[np.float32], facts: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Return a normalised image as it looks, uint8 ``(H, W, C)``, by the facts that a run records."""
    mean, deviation = (np.array(facts[name]).reshape(-1, 1, 1) for name in ("mean", "deviation"))
    return np.moveaxis(np.round(pixels_CHW * deviation + mean).clip(0, 255).astype(np.uint8), 0, -1)


class ImageSet:
    """The two sides of prepared images; see :func:`bigtrain.data.read.records.split_records`."""

    def __init__(self, directory: Path, augmentation: Augmentation) -> None:
        """Map what :func:`bigtrain.data.prepare.images.prepare_images` has written into memory; DataError if it is damaged."""
        self.index = read_image_index(directory)
        with _whole(directory):
            self.pixels = np.load(directory / PIXELS, mmap_mode="r")
            self.labels = np.load(directory / LABELS)
            self._rows = {name: np.load(directory / f"{name}.npy") for name in ("train", "validation")}
        self._augmentation = augmentation
        channels = (1, 1, 1, -1)
        self.mean = np.array(self.index.mean, dtype=np.float32).reshape(channels)
        self.deviation = np.array(self.index.deviation, dtype=np.float32).reshape(channels)

    def normalise_like(self, facts: Mapping[str, Any]) -> None:
        """Take the mean and deviation of the images that are trained on."""
        for name in ("mean", "deviation"):
            setattr(self, name, np.array(facts[name], dtype=np.float32).reshape(1, 1, 1, -1))

    @property
    def facts(self) -> dict[str, Any]:
        """Return what is recorded with a run."""
        return {**asdict(self.index), "image_shape": list(self.pixels.shape[1:])}

    def train(self) -> "Images":
        config = self._augmentation.config
        return Images(self, self._rows["train"], self._augmentation if config != type(config)() else None)

    def validation(self) -> "Images":
        return Images(self, self._rows["validation"], None)


class Images:
    """One side of prepared images; see :class:`bigtrain.data.read.records.Dataset`."""

    def __init__(self, images: ImageSet, rows: NDArray[np.int64], augmentation: Augmentation | None) -> None:
        self._images, self._rows, self.augmentation = images, rows, augmentation
        self.fingerprint = f"{images.index.fingerprint}{f' {augmentation}' if augmentation else ''}"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        columns = self.gather(np.array([row]), np.array([row]))
        return {name: values[0] for name, values in columns.items()}

    def gather(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return ``pixels`` ``(N, C, H, W)`` and ``labels``; with mixup ``mixed_labels`` and the labels' ``shares`` too."""
        columns: dict[str, Any] = {"pixels": self._drawn(rows, positions), "labels": self._labels(rows)}
        if self.augmentation and self.augmentation.config.mixup:
            partners, places, shares = self.augmentation.partners(positions, len(self))
            weight = shares[:, None, None, None]
            columns["pixels"] = weight * columns["pixels"] + (1 - weight) * self._drawn(partners, places)
            columns |= {"mixed_labels": self._labels(partners), "shares": shares}
        pixels = (columns["pixels"] - self._images.mean) / self._images.deviation
        return {**columns, "pixels": np.moveaxis(pixels, -1, 1)}

    def describe(self, row: int, position: int) -> str:
        """Return the name of a row's label, and how the image is changed at a position of the run."""
        names, at = self._images.index.label_names, np.array([position])
        told = [names[self._labels(np.array([row]))[0]]]
        if self.augmentation is not None:
            top, left, flips, degrees = (values[0] for values in self.augmentation.draw(at))
            config = self.augmentation.config
            moved = config.crop_padding - np.array([top, left])
            told += [f"moved by {moved[0]} down and {moved[1]} right"] if config.crop_padding else []
            told += ["flipped"] if flips else []
            told += [f"rotated by {degrees:.1f}°"] if config.rotation else []
            if config.mixup:
                partners, _, shares = self.augmentation.partners(at, len(self))
                other = names[self._labels(partners)[0]]
                told.append(f"{shares[0]:.0%} of it, with {1 - shares[0]:.0%} of row {partners[0]} ({other})")
        return ", ".join(told)

    def _labels(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._images.labels[self._rows[rows]]

    def _drawn(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        pixels = self._images.pixels[self._rows[rows]]
        return self.augmentation(pixels, positions) if self.augmentation else pixels.astype(np.float32)
