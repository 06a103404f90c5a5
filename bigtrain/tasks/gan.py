"""A generator and a discriminator of images against each other (Goodfellow et al., 2014), in one backward pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from bigtrain.errors import ConfigError, of_all_ranks
from bigtrain.tasks.base import IGNORE_INDEX, Field, Objective
from bigtrain.tasks.masking import draw

FOR_SAMPLES, FOR_PICTURES = 11, 13  # purposes of random numbers; each has two of them
HALF = 127.5  # bytes of pixels divided by it, less 1, are from -1 to 1
LARGEST_FACTOR = 80.0  # logarithm of it: beyond, fp32 has no numbers


def normal_noise(
    positions_N: NDArray[np.int64], size: int, seed: int, purpose: int = FOR_SAMPLES
) -> NDArray[np.float32]:
    """Return standard normal numbers, float32 ``(N, size)``: a function of (seed, place of the sample in the run)."""
    places = np.broadcast_to(np.arange(size), (len(positions_N), size))
    hashes = (draw(seed, purpose + i, positions_N, places) >> np.uint64(11) for i in (0, 1))
    one, other = ((drawn + np.float64(1)) * 2.0**-53 for drawn in hashes)  # from 0, which is left out, to 1
    return (np.sqrt(-2 * np.log(one)) * np.cos(2 * np.pi * other)).astype(np.float32)  # Box and Muller, 1958


@dataclass(frozen=True, kw_only=True, slots=True)
class GAN(Objective):
    """Cross-entropy of the discriminator, and the non-saturating loss of the generator; see :class:`Objective`.

    The network has a ``generator`` of images from noise ``(B, Z)``, and a ``discriminator`` that returns a logit for each
    image by itself. ``loss`` is the discriminator's; what the generator minimises is a metric.
    """

    @property
    def fields(self) -> Mapping[str, Field]:
        return {
            "pixels": Field(torch.float32, ("C", "H", "W")),
            "labels": Field(torch.int64, (), ignored=IGNORE_INDEX),  # say which samples are padding
            "noise": Field(torch.float32, ("Z",), is_optional=True),  # which collation adds
        }

    @property
    def sums(self) -> Mapping[str, tuple[int, ...]]:
        return dict.fromkeys(("generator_loss", "real_right", "fake_right", "images"), ())

    @property
    def less_is_better(self) -> tuple[str, ...]:
        return ("generator_loss",)

    def count(self, samples: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        return (samples["labels"] != IGNORE_INDEX).astype(np.int64)

    def __call__(self, network: Any, *tensors: Tensor) -> Tensor:
        """Return the discriminator's summed loss in nats; its gradient by the generator is that of the generator's own.

        A fake with the logit l adds softplus(l) to the loss of the discriminator and softplus(-l) to that of the
        generator, whose derivatives by l are s(l) and -s(-l), s the logistic function. Both flow back to the image
        through the same discriminator, so there the one becomes the other times -s(-l) / s(l) = -exp(-l).
        """
        pixels, labels_B, noise = tensors
        if not (hasattr(network, "generator") and hasattr(network, "discriminator")):
            problem = f"{type(network).__name__} has no generator and discriminator; use +model=gan_digits"
            raise of_all_ranks(ConfigError(f"task=gan: {problem}, or a network with both"))
        fakes, counts_B = network.generator(noise), labels_B != IGNORE_INDEX
        real_B, fake_B = network.discriminator(torch.cat([pixels, fakes.to(pixels.dtype)])).float().view(2, -1)
        if fakes.requires_grad:
            factor_B = -(-fake_B.detach()).clamp(max=LARGEST_FACTOR).exp()
            fakes.register_hook(lambda gradient: gradient * factor_B.view(-1, 1, 1, 1).to(gradient.dtype))
        loss_B = F.softplus(-real_B) + F.softplus(fake_B)
        sums = [loss_B, F.softplus(-fake_B).detach(), real_B > 0, fake_B < 0, torch.ones_like(counts_B)]
        return torch.stack([(values.float() * counts_B).sum() for values in sums])

    def metrics(self, loss: float, sums: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        images = max(float(sums["images"]), 1.0)
        return {name: float(sums[name]) / images for name in ("generator_loss", "real_right", "fake_right")}


def moments(features_ND: Tensor) -> Tensor:
    """Return number, sum and second moments of features as one vector, fp64 ``(1 + D + D * D,)``: what adds up."""
    features_ND = features_ND.double()
    number = features_ND.new_tensor([len(features_ND)])
    return torch.cat([number, features_ND.sum(dim=0), (features_ND.T @ features_ND).flatten()])


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Return the Fréchet distance of normal distributions with these :func:`moments` (Heusel et al., 2017, FID)."""
    size = int((-1 + (4 * len(one) - 3) ** 0.5) / 2)
    means = [sums[1 : 1 + size] / sums[0] for sums in (one, other)]
    pairs = zip((one, other), means, strict=True)
    spread, other_spread = (s[1 + size :].view(size, size) / s[0] - torch.outer(m, m) for s, m in pairs)
    values, vectors = torch.linalg.eigh(spread)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    common = torch.linalg.eigvalsh(root @ other_spread @ root).clamp(min=0).sqrt().sum()
    distance = (means[0] - means[1]).square().sum() + spread.trace() + other_spread.trace() - 2 * common
    return float(distance.clamp(min=0))
