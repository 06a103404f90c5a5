"""What a task is to the rest: named tensors in, one vector of sums out.

Everything that a run adds up over micro-batches and ranks is a *sum*: the loss, and whatever metrics are made of. Engines
divide the loss by the global count of targets, which is known before the step; so no number depends on how a step was cut
into pieces. There is no place for a mean over a micro-batch, for it would.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bigtrain.errors import MISTAKES, ConfigError, of_all_ranks, told_with_place

IGNORE_INDEX = -100  # target that is not counted in the loss; also the default of ``torch.nn.functional.cross_entropy``


class Field(NamedTuple):
    """One tensor of a batch."""

    dtype: torch.dtype  # type of its elements
    shape: tuple[str | int, ...]  # without the batch; letters are sizes that data and model settings decide
    padding: int | float = 0  # what fills samples up that count for nothing
    ignored: int | float | None = None  # of a target where it does not count, and padding; inputs have none
    below: int | None = None  # whole numbers in a record that are not ``ignored`` lie in ``[0, below)``
    is_optional: bool = False  # whether a batch may lack it; such fields are the last ones

    @property
    def is_input(self) -> bool:
        """Whether a network needs it to predict; others are targets, or may be lacking."""
        return self.ignored is None and not self.is_optional

    @property
    def filling(self) -> int | float:
        """What padding consists of."""
        return self.padding if self.ignored is None else self.ignored


class Objective(Protocol):
    """What is minimised: a frozen dataclass, whose fields are its settings, or a class without state."""

    counts_by_shape: bool = False  # of elements, if all are targets

    @property
    def fields(self) -> Mapping[str, Field]:
        """What a batch holds, in the order in which the network gets it; a class attribute will do."""

    @property
    def sums(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of the sums beside the loss, in order, of which metrics are made; a class attribute will do."""
        return {}

    # ``held_out_sums``, if an objective has it, are more of them, which follow the others in evaluation alone, where
    # ``network.training`` is False: what is too large to be exchanged in every step.

    def count(self, samples: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        """Return how many targets count in each sample, or what they weigh, ``(N,)``; on the host, before the step."""

    def __call__(self, network: nn.Module, *tensors: Tensor) -> Tensor:
        """Return the loss, *summed* over the batch's targets, and the sums, flat: fp32 ``(1 + K,)``; only the first has a gradient.

        An objective without sums may return the loss itself, 0-d.
        """

    def metrics(self, loss: float, sums: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        """Return metrics of the mean loss and the sums; those that improve by falling are in ``less_is_better``."""
        return {}


class TaskModel(nn.Module):
    """A network with its objective, as engines wrap it, called by position: ZeRO-3's hooks see no other tensors."""

    def __init__(self, network: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.network = network
        self.objective = objective
        self._sizes = {training: 1 + num_sums(objective, held_out=not training) for training in (True, False)}

    def forward(self, *tensors: Tensor, predicts: bool = False) -> Any:
        """Return the vector of sums, or what the network itself says to ``tensors``."""
        if predicts:
            return self.network(*tensors)
        try:
            sums = self.objective(self.network, *tensors)
        except MISTAKES as error:
            if type(self.objective).__module__.startswith("bigtrain."):
                raise
            raise ConfigError(f"{type(self.objective).__name__}: {told_with_place(error)}") from error
        if not isinstance(sums, Tensor) or not sums.is_floating_point():
            what = sums.dtype if isinstance(sums, Tensor) else type(sums).__name__
            told = f"{type(self.objective).__name__} returns {what}; an objective returns a tensor of fractions, fp32"
            raise of_all_ranks(ConfigError(told))
        size = self._sizes[self.training]
        if sums.shape != (size,) and (sums.ndim or size > 1):
            raise of_all_ranks(
                ConfigError(
                    f"{type(self.objective).__name__} returns a tensor {tuple(sums.shape)}; an objective returns "
                    f"{(size,)}: the summed loss, and the sums that it names"
                )
            )
        if sums.ndim:  # whether or not the objective has detached its metrics
            sums = torch.cat([sums[:1], sums[1:].detach()])
        return sums


def canonical_name(name: str) -> str:
    """Return the name within the network of a parameter of a wrapped :class:`TaskModel`."""
    name = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
    name = name.replace(".base_layer.", ".")  # of peft, around a layer with an adapter
    name = re.sub(r"^stage\d+\.", "", name)  # of a pipeline
    return name.removeprefix("module.").removeprefix("network.")


def sums_of(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return what a wrapped :class:`TaskModel` computes of a batch: fp32 ``(1 + K,)``, or the summed loss alone, 0-d."""
    return module(*batch.values())


def loss_of(sums: Tensor) -> Tensor:
    """Return the summed loss, 0-d, of what an objective returns."""
    return sums[0] if sums.ndim else sums


def gradient_scale(loss: Tensor, scale: Tensor | float) -> Tensor:
    """Return the factor of ``loss`` in the backward pass: ``scale``, or NaN if the loss is not finite.

    A loss can be infinite although its gradient is not. So made, its gradient is not finite either, and neither is
    the sum over the ranks: all of them see it in the gradient's norm, without an exchange of its own.
    """
    return (loss.detach() * 0).add_(scale)


def sums_by_name(objective: Objective, *, held_out: bool) -> Mapping[str, tuple[int, ...]]:
    """Return names and shapes of an objective's sums in training, or, of what is held out, in evaluation."""
    return {**objective.sums, **(getattr(objective, "held_out_sums", {}) if held_out else {})}


def num_sums(objective: Objective, *, held_out: bool) -> int:
    return sum(math.prod(shape) for shape in sums_by_name(objective, held_out=held_out).values())


def split_sums(
    objective: Objective, flat: Sequence[float] | NDArray[np.float64], *, held_out: bool = False
) -> dict[str, NDArray[np.float64]]:
    """Return the sums beside the loss by name, from a vector ``(K,)``."""
    sums, first = {}, 0
    for name, shape in sums_by_name(objective, held_out=held_out).items():
        size = math.prod(shape)
        sums[name] = np.asarray(flat[first : first + size], dtype=np.float64).reshape(shape)
        first += size
    return sums
