"""Prepared images: pixels of one size in a file, changed and normalised as they are drawn."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from bigtrain.config import AugmentConfig
from bigtrain.data.order.permutation import derive_key, mix64
from bigtrain.errors import as_data_error

_TOP, _LEFT, _FLIP, _ANGLE, _PARTNER, _SHARE, _OTHER_SHARE = range(1, 8)  # purposes of random numbers
_BETA_TRIALS = 64  # each accepts half of its draws or more: all of them refuse once in 2**64
INDEX_FILE = "images.json"
PIXELS, LABELS = "pixels.npy", "labels.npy"  # uint8 ``(N, H, W, C)`` and int64 ``(N,)``


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What ``data.augment`` does to images."""

    config: AugmentConfig
    seed: int  # of the run

    def __str__(self) -> str:
        c = self.config
        return f"crop {c.crop_padding} flip {c.flip} rotation {c.rotation:g} mixup {c.mixup:g} seed {self.seed}"

    def __call__(self, images_NHWC: NDArray[np.uint8], positions_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return images cropped, flipped and rotated, float32 ``(N, H, W, C)`` from 0 to 255."""
        top, left, flips, degrees = self.draw(positions_N)
        padding, (height, width) = self.config.crop_padding, images_NHWC.shape[1:3]
        rows_NH = top[:, None] + np.arange(height)
        columns_NW = left[:, None] + np.arange(width)
        columns_NW = np.where(flips[:, None], columns_NW[:, ::-1], columns_NW)
        padded = np.pad(images_NHWC, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        numbers = np.arange(len(padded))[:, None, None]
        cropped = padded[numbers, rows_NH[:, :, None], columns_NW[:, None, :]].astype(np.float32)
        return _rotated(cropped, degrees) if self.config.rotation else cropped

    def draw(
        self, positions_N: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.float64]]:
        """Return first row and column of each crop within the padded image, whether it is flipped, and its angle."""
        size = 2 * self.config.crop_padding + 1
        top, left = (self._hash(purpose, positions_N) % np.uint64(size) for purpose in (_TOP, _LEFT))
        flips = (self._hash(_FLIP, positions_N) < np.uint64(2**63)) & self.config.flip
        degrees = (2 * self._uniform(_ANGLE, positions_N) - 1) * self.config.rotation
        return top.astype(np.int64), left.astype(np.int64), flips, degrees

    def partners(
        self, positions_N: NDArray[np.int64], num_rows: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Return what images are blended with: rows below ``num_rows``, places for their own changes, and own shares.

        An image keeps at least half of itself. Shares follow Jöhnk's method ("Erzeugung von betaverteilten ...", 1964).
        """
        drawn = self._hash(_PARTNER, positions_N)
        places = positions_N[:, None] * _BETA_TRIALS + np.arange(_BETA_TRIALS)
        a, b = (self._uniform(purpose, places) ** (1 / self.config.mixup) for purpose in (_SHARE, _OTHER_SHARE))
        total = a + b
        trial = ((total <= 1) & (total > 0)).argmax(axis=1)[:, None]
        a, total = (np.take_along_axis(values, trial, axis=1)[:, 0] for values in (a, total))
        shares = np.divide(a, total, out=np.ones_like(a), where=total > 0)
        rows = (drawn % np.uint64(num_rows)).astype(np.int64)
        return rows, (drawn >> np.uint64(1)).astype(np.int64), np.maximum(shares, 1 - shares).astype(np.float32)

    def _hash(self, purpose: int, positions: NDArray[np.int64]) -> NDArray[np.uint64]:
        return mix64(positions.astype(np.uint64) + np.uint64(derive_key(self.seed, *b"image", purpose)))

    def _uniform(self, purpose: int, positions: NDArray[np.int64]) -> NDArray[np.float64]:
        return (self._hash(purpose, positions) >> np.uint64(11)) * np.float64(2.0**-53)


def _rotated(images_NHWC: NDArray[np.float32], degrees_N: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return images rotated around their centres, bilinear, with black where they have nothing."""
    sine, cosine = (torch.from_numpy(f(np.deg2rad(degrees_N))).float() for f in (np.sin, np.cos))
    zero = torch.zeros_like(sine)
    matrices = torch.stack([cosine, -sine, zero, sine, cosine, zero], dim=1).view(-1, 2, 3)
    images_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)
    grid = F.affine_grid(matrices, list(images_NCHW.shape), align_corners=False)
    return F.grid_sample(images_NCHW, grid, align_corners=False).permute(0, 2, 3, 1).numpy()


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageIndex:
    """What is known of prepared images."""

    fingerprint: str  # identity of pixels, labels and sides
    label_names: list[str]  # of each class, in the order of their numbers
    mean: list[float]  # of each channel on the training side, from 0 to 255
    deviation: list[float]  # standard deviation likewise; 1 of a channel that is constant
    num_train: int
    num_validation: int
    num_left_out: int = 0  # images that could not be decoded, with ``data.on_bad_row=skip``
    num_in_both: int = 0  # images of the source's own test set that are in its training set too


def read_image_index(directory: Path) -> ImageIndex:
    """Return what is known of the images in a directory; DataError if it is damaged."""
    with _whole(directory):
        return ImageIndex(**json.loads((directory / INDEX_FILE).read_text()))


def _whole(directory: Path) -> AbstractContextManager[None]:
    return as_data_error(directory, OSError, ValueError, TypeError, advice="; remove it, and it is prepared again")


def visible(pixels_CHW: NDArray[np.float32], facts: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Return a normalised image as it looks, uint8 ``(H, W, C)``, by the facts that a run records."""
    mean, deviation = (np.array(facts[name]).reshape(-1, 1, 1) for name in ("mean", "deviation"))
    return np.moveaxis(np.round(pixels_CHW * deviation + mean).clip(0, 255).astype(np.uint8), 0, -1)


class ImageSet:
    """The two sides of prepared images; see :func:`bigtrain.data.read.records.split_records`."""

    def __init__(self, directory: Path, augmentation: Augmentation) -> None:
        """Map what ``prepare/images.py`` has written into memory; DataError if it is damaged."""
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
        for name in ("mean", "deviation"):
            setattr(self, name, np.array(facts[name], dtype=np.float32).reshape(1, 1, 1, -1))

    @property
    def facts(self) -> dict[str, Any]:
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
        columns: dict[str, Any] = {"pixels": self._drawn(rows, positions), "labels": self.labels(rows)}
        if self.augmentation and self.augmentation.config.mixup:
            partners, places, shares = self.augmentation.partners(positions, len(self))
            weight = shares[:, None, None, None]
            columns["pixels"] = weight * columns["pixels"] + (1 - weight) * self._drawn(partners, places)
            columns |= {"mixed_labels": self.labels(partners), "shares": shares}
        pixels = (columns["pixels"] - self._images.mean) / self._images.deviation
        return {**columns, "pixels": np.moveaxis(pixels, -1, 1)}

    def describe(self, row: int, position: int) -> str:
        """Return the name of a row's label, and how the image is changed at a position of the run."""
        names, at = self._images.index.label_names, np.array([position])
        told = [names[self.labels(np.array([row]))[0]]]
        if self.augmentation is not None:
            top, left, flips, degrees = (values[0] for values in self.augmentation.draw(at))
            config = self.augmentation.config
            moved = config.crop_padding - np.array([top, left])
            told += [f"moved by {moved[0]} down and {moved[1]} right"] if config.crop_padding else []
            told += ["flipped"] if flips else []
            told += [f"rotated by {degrees:.1f}°"] if config.rotation else []
            if config.mixup:
                partners, _, shares = self.augmentation.partners(at, len(self))
                other = names[self.labels(partners)[0]]
                told.append(f"{shares[0]:.0%} of it, with {1 - shares[0]:.0%} of row {partners[0]} ({other})")
        return ", ".join(told)

    def labels(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._images.labels[self._rows[rows]]

    def _drawn(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        pixels = self._images.pixels[self._rows[rows]]
        return self.augmentation(pixels, positions) if self.augmentation else pixels.astype(np.float32)
