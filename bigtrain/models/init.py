"""What every parameter starts from, as a pure function of its name and its place in it.

The value of element i of a parameter depends on the seed, the parameter's name and i only, never on
who asks for it: every engine, world size and device starts from the same weights, each rank makes
just the part that it keeps, and nothing is communicated. (Random numbers are torch's, made on the
CPU; their last bits may differ between processor families.)
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from bigtrain.config import ModelConfig, ModelKind
from bigtrain.errors import ConfigError

BLOCK_ELEMENTS = 2**16
"""Elements per random generator; part of the definition of the initial weights."""


class InitialValue(Protocol):
    """Where one parameter's initial value comes from. Safe to call from several threads."""

    def fill(self, start: int, out: Tensor) -> None:
        """Write elements ``[start, start + out.numel())`` of the row-major flattened parameter.

        Args:
            start: first element.
            out: 1-D fp32 tensor on the CPU.
        """


@dataclass(frozen=True, slots=True)
class Constant:
    """The same number everywhere."""

    value: float

    def fill(self, start: int, out: Tensor) -> None:
        """See :class:`InitialValue`."""
        out.fill_(self.value)


@dataclass(frozen=True, slots=True)
class Normal:
    """Normally distributed around 0; each block of elements has its own generator."""

    std: float
    seed: int
    fqn: str

    def fill(self, start: int, out: Tensor) -> None:
        """See :class:`InitialValue`."""
        stop = start + out.numel()
        buffer = torch.empty(BLOCK_ELEMENTS, dtype=torch.float32, device="cpu")
        for block in range(start // BLOCK_ELEMENTS, -(-stop // BLOCK_ELEMENTS)):
            # Always the whole block: torch's normal numbers depend on how many are asked for.
            buffer.normal_(0.0, self.std, generator=_generator(self.seed, self.fqn, block))
            first = block * BLOCK_ELEMENTS
            low, high = max(start, first), min(stop, first + BLOCK_ELEMENTS)
            out[low - start : high - start] = buffer[low - first : high - first]


@dataclass(frozen=True, slots=True)
class Given:
    """A small tensor that is known in full."""

    values: Tensor

    def fill(self, start: int, out: Tensor) -> None:
        """See :class:`InitialValue`."""
        out.copy_(self.values.flatten()[start : start + out.numel()])


@dataclass(frozen=True, slots=True)
class Finite:
    """A value from a file, which may hold anything, of a parameter, which may not."""

    value: InitialValue
    name: str
    """The tensor's, and where it is from, as messages say it."""

    def fill(self, start: int, out: Tensor) -> None:
        """See :class:`InitialValue`.

        Raises:
            ConfigError: one of these elements is NaN or infinite.
        """
        self.value.fill(start, out)
        if not out.isfinite().all():
            what = "NaN" if out.isnan().any() else "infinite"
            raise ConfigError(
                f"{self.name} has numbers that are {what} in the published weights, from which nothing can be trained; "
                "copy or download them again, or choose others"
            )


def initial_values(model: nn.Module, config: ModelConfig, seed: int) -> dict[str, InitialValue]:
    """Return the initial value of every parameter of a model from :func:`build_model`.

    Native models follow GPT-2: normal numbers with ``config.init_std``, divided by
    ``sqrt(2 * num_layers)`` where a block writes to the residual stream, norms 1, biases 0; or they
    are read from the GPT-2 or Llama that ``config.init_from`` names. Hugging Face models follow their
    own rules, or are read from their published weights.

    Args:
        model: as built, before any wrapping; on the meta device or not.
        config: what it was built from.
        seed: of the random numbers.

    Returns:
        One value per name of ``model.named_parameters()``; tied parameters appear once.

    Raises:
        ConfigError: if published weights are wanted but missing or do not fit.
    """
    if config.kind is ModelKind.native and config.init_from:
        from bigtrain.models import hf_import

        return hf_import.imported_values(model, config)
    if config.kind is ModelKind.native:
        return {name: _native_value(name, config, seed) for name, _ in model.named_parameters()}
    from bigtrain.models import hf_init

    return hf_init.published_values(model, config) if config.pretrained else hf_init.fresh_values(model, seed)


def seed_of(*parts: str | int) -> int:
    """Return a 63-bit seed that depends on all ``parts``."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _generator(seed: int, fqn: str, block: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed_of(seed, fqn, block))


def _native_value(name: str, config: ModelConfig, seed: int) -> InitialValue:
    if name.endswith("bias"):
        return Constant(0.0)
    if name.endswith("norm.weight"):
        return Constant(1.0)
    to_residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
    std = config.init_std / math.sqrt(2 * config.num_layers) if to_residual else config.init_std
    return Normal(std, seed, name)
