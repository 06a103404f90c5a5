"""Initial values of parameters, as a pure function of (seed, name, position).

Every engine, world size and device starts from the same weights; each rank makes just the boxes that it keeps, without
communication. Random numbers are torch's on the CPU, whose last bits may differ between processor families.
"""

import hashlib
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from bigtrain.config import ModelConfig
from bigtrain.errors import ConfigError
from bigtrain.models.moe import BALANCE

Key = TypeVar("Key")
Made = TypeVar("Made")
BLOCK_ELEMENTS = 2**16  # elements per random generator; part of the definition of the initial weights


class InitialValue(Protocol):
    """Where one parameter's initial value comes from; thread-safe."""

    def fill(self, start: int, out: Tensor) -> None:
        """Write elements ``[start, start + out.numel())`` of the flattened parameter to 1-D fp32 ``out`` on the CPU."""


@dataclass(frozen=True, slots=True)
class Constant:
    """The same number everywhere."""

    value: float

    def fill(self, start: int, out: Tensor) -> None:
        out.fill_(self.value)


@dataclass(frozen=True, slots=True)
class Normal:
    """Normally distributed around 0; each block of elements has its own generator."""

    std: float
    seed: int
    fqn: str

    def fill(self, start: int, out: Tensor) -> None:
        def draw(block: int, buffer: Tensor) -> None:
            buffer.normal_(0.0, self.std, generator=generator_of(self.seed, self.fqn, block))

        fill_blocks(start, out, draw)


@dataclass(frozen=True, slots=True)
class Given:
    """A small tensor that is known in full."""

    values: Tensor

    def fill(self, start: int, out: Tensor) -> None:
        out.copy_(self.values.flatten()[start : start + out.numel()])


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor that is read or computed in one piece whenever a part of it is asked for."""

    read: Callable[[], Tensor]

    def fill(self, start: int, out: Tensor) -> None:
        out.copy_(self.read().flatten()[start : start + out.numel()])


class Newest(Generic[Key, Made]):
    """Keeps what ``make`` returned for the newest key: threads fill one tensor after the other, in pieces."""

    def __init__(self, make: Callable[[Key], Made]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._newest: tuple[Key, Made] | None = None

    def __call__(self, key: Key) -> Made:
        with self._lock:
            if self._newest is None or self._newest[0] != key:
                self._newest = None  # before the next one takes memory
                self._newest = key, self._make(key)
            return self._newest[1]


@dataclass(frozen=True, slots=True)
class Finite:
    """A value from a file, checked to be finite."""

    value: InitialValue
    name: str  # the tensor's, and where it is from, as messages say it

    def fill(self, start: int, out: Tensor) -> None:
        """Raise a ConfigError if one of these elements is NaN or infinite."""
        self.value.fill(start, out)
        if not out.isfinite().all():
            what = "NaN" if out.isnan().any() else "infinite"
            raise ConfigError(
                f"{self.name} has numbers that are {what} in the published weights, from which nothing can be trained; "
                "copy or download them again, or choose others"
            )


def fill_blocks(start: int, out: Tensor, draw: Callable[[int, Tensor], None]) -> None:
    """Fill ``out`` by ``draw(block, buffer)``, always of whole blocks: random numbers depend on how many are drawn."""
    stop = start + out.numel()
    buffer = torch.empty(BLOCK_ELEMENTS, dtype=torch.float32, device="cpu")
    for block in range(start // BLOCK_ELEMENTS, -(-stop // BLOCK_ELEMENTS)):
        draw(block, buffer)
        first = block * BLOCK_ELEMENTS
        low, high = max(start, first), min(stop, first + BLOCK_ELEMENTS)
        out[low - start : high - start] = buffer[low - first : high - first]


def seed_of(*parts: str | int) -> int:
    """Return a 63-bit seed that depends on all ``parts``."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator_of(seed: int, fqn: str, block: int) -> torch.Generator:
    """Return the generator of a block of a parameter's elements."""
    return torch.Generator(device="cpu").manual_seed(seed_of(seed, fqn, block))


def native_value(name: str, config: ModelConfig, seed: int) -> InitialValue:
    """Return the initial value of a parameter of the native model: see :func:`bigtrain.models.initial_values`."""
    if name.endswith(("bias", BALANCE)):
        return Constant(0.0)
    if name.endswith("norm.weight"):
        return Constant(1.0)
    to_residual = name.endswith(("attention.out.weight", "down.weight", "experts.down"))
    std = config.init_std / math.sqrt(2 * config.num_layers) if to_residual else config.init_std
    return Normal(std, seed, name)
