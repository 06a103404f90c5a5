"""How transformers initialises a parameter, noted down and played back for any part of it.

Its initialisation code is a few operations in place on each parameter: a random fill, perhaps arithmetic on it, perhaps
another value in a row for padding. Run on the meta device it costs nothing and shows these operations; played back
block by block, with the block's own generator, they give values that depend on (seed, name, position) alone, like those
of native models.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bigtrain.models.init import BLOCK_ELEMENTS, Constant, InitialValue, Normal, generator_of

RANDOM = ("normal_", "uniform_")
CONSTANT = ("fill_", "zero_")
ELEMENTWISE = ("mul_", "add_", "sub_", "div_", "clamp_", "clamp_min_", "clamp_max_", "erfinv_", "exp_", "log_", "neg_")


class Step(NamedTuple):
    """One operation in place."""

    operation: str  # method of a tensor
    numbers: tuple[float, ...]
    begin: int  # first element that it changes, in row-major order
    end: int  # the one after the last


@dataclass(frozen=True, slots=True)
class Program:
    """Initialisation of one parameter; an :class:`bigtrain.models.init.InitialValue`."""

    steps: tuple[Step, ...]
    seed: int
    fqn: str

    def fill(self, start: int, out: Tensor) -> None:
        stop = start + out.numel()
        buffer = torch.empty(BLOCK_ELEMENTS, dtype=torch.float32, device="cpu")
        for block in range(start // BLOCK_ELEMENTS, -(-stop // BLOCK_ELEMENTS)):
            first = block * BLOCK_ELEMENTS
            for step in self.steps:
                self._play(step, buffer, first, block)
            low, high = max(start, first), min(stop, first + BLOCK_ELEMENTS)
            out[low - start : high - start] = buffer[low - first : high - first]

    def _play(self, step: Step, buffer: Tensor, first: int, block: int) -> None:
        if step.operation in RANDOM:  # always the whole block: the numbers depend on how many are asked for
            getattr(buffer, step.operation)(*step.numbers, generator=generator_of(self.seed, self.fqn, block))
            return
        low, high = max(step.begin - first, 0), min(step.end - first, BLOCK_ELEMENTS)
        if low < high:
            getattr(buffer[low:high], step.operation)(*step.numbers)


def recorded_values(model: nn.Module, initialise: Callable[[], None], seed: int) -> dict[str, InitialValue]:
    """Return the initial values of parameters whose initialisation is such a program, without others.

    Args:
        model: with parameters on the meta device.
        initialise: runs the initialisation code of all modules.
    """
    names = {parameter.untyped_storage()._cdata: name for name, parameter in model.named_parameters()}
    with _untied(model), _orthogonal_on_meta(), _Recorder(names) as recorder, torch.no_grad():
        initialise()
    values = {}
    for name, parameter in model.named_parameters():
        steps = _since_last_fill(recorder.steps[name], parameter.numel())
        if steps and all(step.operation in RANDOM + CONSTANT + ELEMENTWISE for step in steps):
            values[name] = _simplest(Program(steps, seed, name), parameter.numel())
    return values


@contextlib.contextmanager
def _untied(model: nn.Module) -> Iterator[None]:
    """Untie tied parameters, as transformers initialises them before it ties them."""
    first, tied = set(), []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter in first:
                tied.append((module, name, parameter))
            first.add(parameter)
    for module, name, parameter in tied:
        setattr(module, name, nn.Parameter(torch.empty_like(parameter), requires_grad=parameter.requires_grad))
    try:
        yield
    finally:
        for module, name, parameter in tied:
            setattr(module, name, parameter)


@contextlib.contextmanager
def _orthogonal_on_meta() -> Iterator[None]:
    """Record orthogonal initialisation, which torch skips on the meta device."""
    from transformers.initialization import TORCH_INIT_FUNCTIONS

    of_torch = TORCH_INIT_FUNCTIONS["orthogonal_"]
    TORCH_INIT_FUNCTIONS["orthogonal_"] = lambda tensor, *_, **__: tensor.copy_(torch.empty_like(tensor))
    try:
        yield
    finally:
        TORCH_INIT_FUNCTIONS["orthogonal_"] = of_torch


def _simplest(program: Program, numel: int) -> InitialValue:
    first, *others = program.steps
    if not others and first.operation == "normal_" and first.numbers[0] == 0:
        return Normal(first.numbers[1], program.seed, program.fqn)
    if not others and first.operation in CONSTANT:
        return Constant(first.numbers[0] if first.numbers else 0.0)
    return program


def _since_last_fill(steps: list[Step], numel: int) -> tuple[Step, ...]:
    fills = [i for i, s in enumerate(steps) if s.operation in RANDOM + CONSTANT and (s.begin, s.end) == (0, numel)]
    return tuple(steps[fills[-1] :]) if fills else ()


class _Recorder(TorchDispatchMode):
    """Records operations in place on the memory of some tensors, also through views."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.steps: defaultdict[str, list[Step]] = defaultdict(list)
        self._names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        changed = args[0] if func._schema.is_mutable and args else None
        if isinstance(changed, Tensor) and (name := self._names.get(changed.untyped_storage()._cdata)):
            self.steps[name].append(_step(func, changed, args[1:], kwargs or {}))
        return func(*args, **(kwargs or {}))


def _step(func: Any, changed: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
    given = dict(zip((argument.name for argument in func._schema.arguments[1:]), args, strict=False)) | kwargs
    numbers, operation = [], func._schema.name.removeprefix("aten::")
    for argument in func._schema.arguments[1:]:
        value = given.get(argument.name, argument.default_value)
        if argument.name in ("generator", "alpha") and value in (None, 1):
            continue
        numbers.append(value)
        if not isinstance(value, int | float):
            operation = "of another tensor"
    begin = changed.storage_offset()
    if not changed.is_contiguous():
        operation = "of scattered elements"
    if operation == "clamp_" and None in numbers:
        operation, numbers = "clamp_", [-math.inf if numbers[0] is None else numbers[0], numbers[1] or math.inf]
    return Step(operation, tuple(numbers), begin, begin + changed.numel())
