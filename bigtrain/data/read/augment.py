"""Random changes of images: a pure function of (seed, place of the sample in the run).

So every epoch sees other crops, and any world size, micro-batch or resume sees the same ones.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from bigtrain.config import AugmentConfig
from bigtrain.data.order.permutation import derive_key, mix64

_TOP, _LEFT, _FLIP, _ANGLE, _PARTNER, _SHARE, _OTHER_SHARE = range(1, 8)
"""Purposes of the random numbers, which must not be the same ones."""
_BETA_TRIALS = 64  # each accepts half of its draws or more: all of them refuse once in 2**64


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What ``data.augment`` does to images."""

    config: AugmentConfig
    seed: int
    """Of the run."""

    def __str__(self) -> str:
        """Return what decides the changes, for the identity of the data."""
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
        return (self._hash(purpose, positions) >> np.uint64(11)) * 2.0**-53


def _rotated(images_NHWC: NDArray[np.float32], degrees_N: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return images rotated around their centres, bilinear, with black where they have nothing."""
    sine, cosine = (torch.from_numpy(f(np.deg2rad(degrees_N))).float() for f in (np.sin, np.cos))
    zero = torch.zeros_like(sine)
    matrices = torch.stack([cosine, -sine, zero, sine, cosine, zero], dim=1).view(-1, 2, 3)
    images_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)
    grid = F.affine_grid(matrices, list(images_NCHW.shape), align_corners=False)
    return F.grid_sample(images_NCHW, grid, align_corners=False).permute(0, 2, 3, 1).numpy()
