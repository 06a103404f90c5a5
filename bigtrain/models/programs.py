"""A network's own initialisation of a parameter, recorded and replayed for any part of it.

It is a few operations in place: a random fill, perhaps arithmetic, perhaps another value in a row for padding. They are
recorded on the meta device, where they cost nothing, and replayed block by block with the block's own generator:
values depend on (seed, name, position) alone.
"""

import contextlib
import inspect
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bigtrain.errors import ConfigError
from bigtrain.models.init import BLOCK_ELEMENTS, Given, InitialValue, fill_blocks, generator_of, seed_of

_IS_META = inspect.getattr_static(torch.Tensor, "is_meta").__get__
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
    """Initialisation of one parameter; an :class:`InitialValue`."""

    steps: tuple[Step, ...]
    seed: int
    fqn: str

    def fill(self, start: int, out: Tensor) -> None:
        fill_blocks(start, out, self._play)

    def _play(self, block: int, buffer: Tensor) -> None:
        first = block * BLOCK_ELEMENTS
        for step in self.steps:
            if step.operation in RANDOM:
                getattr(buffer, step.operation)(*step.numbers, generator=generator_of(self.seed, self.fqn, block))
                continue
            low, high = max(step.begin - first, 0), min(step.end - first, BLOCK_ELEMENTS)
            if low < high:
                getattr(buffer[low:high], step.operation)(*step.numbers)


def recorded_values(model: nn.Module, initialise: Callable[[], None], seed: int) -> dict[str, InitialValue]:
    """Return the initial values that ``initialise()`` gives to parameters on the meta device, if they are such programs."""
    with _untied(model), Recorder() as recorder, torch.no_grad():
        initialise()
    return {
        name: Program(steps, seed, name)
        for name, parameter in model.named_parameters()
        if (steps := recorder.of(parameter))
    }


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


class _SkippedFills(TorchFunctionMode):
    """Tells a recorder of tensors that a function of ``torch.nn.init`` skips because they are on the meta device."""

    def __init__(self, recorder: "Recorder") -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func == _IS_META and sys._getframe(1).f_globals is vars(nn.init):
            self._recorder.add(args[0], _unknown(args[0]))
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Records operations in place on the memory of meta tensors, also through views."""

    def __init__(self) -> None:
        super().__init__()
        self._skipped = _SkippedFills(self)
        self._steps: defaultdict[int, list[Step]] = defaultdict(list)
        self._storages: list[torch.UntypedStorage] = []  # kept, so that none gets the identity of another

    def __enter__(self) -> "Recorder":
        self._skipped.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._skipped.__exit__(*error)

    def of(self, parameter: Tensor) -> tuple[Step, ...]:
        """Return the steps that a whole parameter's value consists of; none where they are not known."""
        steps, whole = self._steps.get(parameter.untyped_storage()._cdata, []), (0, parameter.numel())
        fills = [i for i, s in enumerate(steps) if s.operation in RANDOM + CONSTANT and (s.begin, s.end) == whole]
        since = steps[fills[-1] :] if fills else []
        return tuple(since) if all(step.operation in RANDOM + CONSTANT + ELEMENTWISE for step in since) else ()

    def has_seen(self, parameter: Tensor) -> bool:
        """Return whether anything was done to a parameter."""
        return parameter.untyped_storage()._cdata in self._steps

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        for position, argument in enumerate(func._schema.arguments if func._schema.is_mutable else ()):
            value = args[position] if position < len(args) else (kwargs or {}).get(argument.name)
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(value, Tensor) and value.is_meta:
                self.add(value, _step(func, value, args[1:], kwargs or {}) if position == 0 else _unknown(value))
        return func(*args, **(kwargs or {}))

    def add(self, changed: Tensor, step: Step) -> None:
        """Add a step to those of a tensor's memory."""
        storage = changed.untyped_storage()
        self._storages.append(storage)
        self._steps[storage._cdata].append(step)


def _unknown(changed: Tensor) -> Step:
    return Step("of another argument", (), 0, changed.numel())


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
    begin = int(changed.storage_offset())
    if not changed.is_contiguous():
        operation = "of scattered elements"
    if operation == "clamp_" and None in numbers:
        operation, numbers = "clamp_", [-math.inf if numbers[0] is None else numbers[0], numbers[1] or math.inf]
    return Step(operation, tuple(numbers), begin, begin + changed.numel())


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed``, and let memory that is left unwritten be NaN."""
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "network"))
            yield
    finally:
        torch.use_deterministic_algorithms(is_deterministic)


def built_whole(build: Callable[[], nn.Module], names: list[str], seed: int, whose: str) -> dict[str, InitialValue]:
    """Return what ``build()`` gives to parameters, all in memory at once; ConfigError for those left unwritten."""
    with seeded(seed), torch.device("cpu"):
        network = build()
    values = {name: network.get_parameter(name).detach().float() for name in names}
    if unsaid := [name for name, value in values.items() if value.isnan().any()]:
        raise ConfigError(f"{whose} does not say what {', '.join(unsaid)} start from")
    return {name: Given(value) for name, value in values.items()}
