"""The preflight's table, and the settings that would fit."""

import dataclasses
import functools
import itertools
from dataclasses import dataclass
from enum import Enum
from typing import Any

from bigtrain.config import ActivationCheckpointing, EngineKind, ModelConfig, ModelKind, Offload, Preflight, TrainConfig
from bigtrain.config.check import FSDP_KINDS, check
from bigtrain.config.parallel import copies, shared
from bigtrain.errors import PreflightError
from bigtrain.log import get_logger
from bigtrain.models.sizes import ModelSizes, is_language_model
from bigtrain.plan.estimate import COMPONENTS, Estimate, estimate
from bigtrain.plan.machine import Machine

GIB = 2**30
MARGIN = 0.1  # share of the estimate that is added for fragmentation and for what the formulas leave out
RESERVE_BYTES = {"cuda": 3 * GIB // 2, "cpu": GIB // 2}
"""Added per process, by device type: libraries, communication buffers, workspaces."""
MAX_SUGGESTIONS = 4
MAX_RANKS = 2**16
SHORTEST_SEQUENCE = 128

Setting = tuple[str, Any]  # dotted key of the configuration, and value
Change = tuple[Setting, ...]  # settings that are changed together


@dataclass(frozen=True, slots=True)
class Report:
    """The estimate of a run beside what the machine has."""

    config: TrainConfig  # resolved, with a precision
    machine: Machine  # this rank's
    measured: tuple[ModelSizes, ModelConfig | None]  # what ``measure_model`` says of the model

    @property
    def estimate(self) -> Estimate:
        """Memory of one rank, without margin and reserve."""
        return self.estimate_of(self.config, self.machine.world_size)

    @property
    def fits(self) -> bool:
        return self._has_room_for(self.estimate)

    def estimate_of(self, config: TrainConfig, world_size: int) -> Estimate:
        """Return the estimate of another configuration of the same model, on such devices."""
        return estimate(
            config,
            world_size=world_size,
            precision=config.engine.precision,
            local_world_size=min(self.machine.local_world_size, world_size),
            device_type=self.machine.device_type,
            measured=self.measured,
        )

    def require(self, wish: Preflight, advice: str) -> None:
        """Warn of a run that does not fit, or raise a PreflightError, as ``preflight`` says."""
        if self.fits:
            return
        message = "\n".join([self.table(), *self.suggestions()])
        if wish is Preflight.stop:
            raise PreflightError(f"{message}\npreflight=warn {advice}")
        get_logger().warning(message)

    def needed_bytes(self, guess: Estimate) -> tuple[int, int]:
        """Return what a rank needs of its device and, besides, of the host, with margin and reserve."""
        device, host = guess.device_bytes, guess.host_bytes
        if self.machine.device_type == "cpu":  # the device is the host
            device, host = device + host, 0
        needed = int(device * (1 + MARGIN)) + RESERVE_BYTES[self.machine.device_type]
        return needed, int(host * (1 + MARGIN)) + RESERVE_BYTES["cpu"] if host else 0

    def table(self) -> str:
        """Return the estimate as text, in GiB per component."""
        on_cpu, needed = self.machine.device_type == "cpu", self.needed_bytes(self.estimate)
        heads = ["memory" if on_cpu else "GPU memory", *(["host memory"] if needed[1] else [])]
        lines = [self._title(), " " * 26 + "".join(f"{head:>13}" for head in heads)]
        for name, *values in self._rows():
            lines.append(f"  {name:<24}" + "".join(f"{value / GIB:>9.2f} GiB" for value in values[: len(heads)]))
        return "\n".join([*lines, *self._remarks()])

    def suggestions(self) -> list[str]:
        """Return lines on the settings that would fit here, smallest change first, or on how many ranks would do."""
        changes = [" ".join(_typed(setting) for setting in change) for change in self.fitting_changes()]
        return ["These settings would fit:", *(f"  {text}" for text in changes)] if changes else [self._ranks_needed()]

    def fitting_changes(self) -> list[Change]:
        """Return what to change for the run to fit here, smallest change first; none includes another."""
        world_size, found = self.machine.world_size, list[Change]()
        for change in self._candidates():
            keys = {key for key, _ in change}
            if any(keys >= {key for key, _ in smaller} for smaller in found):
                continue
            config = with_settings(self.config, change)
            if self._has_room_for(self.estimate_of(config, world_size)) and not check(
                config, world_size=world_size, local_world_size=self.machine.local_world_size
            ):
                found.append(change)
            if len(found) == MAX_SUGGESTIONS:
                break
        return found

    def _has_room_for(self, guess: Estimate) -> bool:
        device, host = self.needed_bytes(guess)
        return device <= self.machine.available_bytes and host <= self.machine.available_host_bytes

    def _candidates(self) -> list[Change]:
        """Return all combinations of settings that need less memory: few changes first, then mild, a shorter length last."""
        axes = list(_axes(self.config, self.machine.device_type))
        ranked = []
        for picks in itertools.product(*(range(len(axis) + 1) for axis in axes)):  # 0 leaves the axis alone
            change = tuple(axis[pick - 1] for axis, pick in zip(axes, picks, strict=True) if pick)
            # Later axes change more, and later settings of an axis do.
            mildness = sum(10 * place + pick for place, pick in enumerate(picks) if pick)
            shortens = any(key == "data.sequence_length" for key, _ in change)
            ranked.append(((shortens, len(change), mildness), change))
        return [change for _, change in sorted(ranked, key=lambda item: item[0]) if change]

    def _ranks_needed(self) -> str:
        """Return how many such ranks would do, with all settings exhausted that leave the run the same."""
        batch = self.config.train.global_batch_size
        divisors = [n for n in range(self.machine.world_size + 1, batch + 1) if batch % n == 0]
        multiples = itertools.takewhile(lambda n: n <= MAX_RANKS, (batch * 2**i for i in range(1, 32)))
        for world_size in [n for n in [*divisors, *multiples] if n % copies(self.config.parallel) == 0]:
            for kind in (EngineKind.fsdp, EngineKind.zero3):
                change: Change = (
                    ("engine.kind", kind),
                    ("engine.offload", Offload.none),
                    ("engine.activation_checkpointing", ActivationCheckpointing.full),
                    ("engine.activation_checkpointing_every", 1),
                    ("train.micro_batch_size", 1),
                    ("train.global_batch_size", max(batch, world_size)),
                )
                config = with_settings(self.config, change)
                if self._has_room_for(self.estimate_of(config, world_size)):
                    new = [
                        item for item in change if functools.reduce(getattr, item[0].split("."), self.config) != item[1]
                    ]
                    settings = " ".join(_typed(item) for item in new)
                    return f"No setting makes it fit here. {world_size} ranks with as much memory each would do: {settings}"
        return (
            "No setting makes it fit here, nor do more ranks with as much memory each: "
            "a single sequence and the largest block need more than one of them has."
        )

    def _title(self) -> str:
        config, length = self.config, self.config.data.sequence_length
        layout = "".join(f" {setting}" for setting in shared(config.parallel))
        return (
            f"{config.model.name} {'fits' if self.fits else 'does not fit'}. Estimated memory per rank with "
            f"engine={config.engine.kind.name}{layout} in {config.engine.precision.name}, world size {self.machine.world_size}, "
            f"micro-batches of {config.train.micro_batch_size}{f' x {length} tokens' if length else ''}:"
        )

    def _rows(self) -> list[tuple[str, int, int]]:
        """Return (name, bytes on the device, bytes in host memory) of every line of the table."""
        guess, machine = self.estimate, self.machine
        rows = [(name, guess.device[name], guess.host[name]) for name in COMPONENTS]
        rows.append(("not all at once", -guess.not_at_once, 0))
        if machine.device_type == "cpu":
            rows = [(name, device + host, 0) for name, device, host in rows]
        needed = self.needed_bytes(guess)
        _, *held = zip(*rows, strict=True)
        device, host = (total - sum(column) for total, column in zip(needed, held, strict=True))
        return [
            *rows,
            (f"margin {MARGIN:.0%}, libraries", device, host),
            ("needed", *needed),
            ("available", machine.available_bytes, machine.available_host_bytes),
        ]

    def _remarks(self) -> list[str]:
        """Return what the estimate leaves out."""
        remarks = ["Counted from shapes, not measured; fragmentation and compiled graphs are in the margin only."]
        if not self.estimate.device["master weights"] + self.estimate.host["master weights"]:
            remarks.append("The fp32 parameters are the master weights.")
        is_counted = self.config.model.kind is not ModelKind.own and is_language_model(self.config.model)
        if is_counted and self.config.model.kind is ModelKind.hf:
            remarks.append("Activations are those of the most similar native model; other layers may keep more.")
        if not is_counted:
            remarks.append("Activations and loss are not counted: what this network keeps is not known.")
        if self.config.engine.kind is EngineKind.accelerate:
            remarks.append("engine=accelerate is counted as DDP; ZeRO in your Accelerate configuration needs less.")
        return remarks


def with_settings(config: TrainConfig, change: Change) -> TrainConfig:
    """Return a copy of ``config`` with other values for some dotted keys."""
    for key, value in change:
        config = _replace(config, key.split("."), value)
    return config


def _replace(section: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return dataclasses.replace(section, **{name: _replace(getattr(section, name), rest, value) if rest else value})


def _typed(setting: Setting) -> str:
    """Return a setting as one types it."""
    key, value = setting
    text = value.name if isinstance(value, Enum) else str(value).lower()
    return f"{'engine' if key == 'engine.kind' else key}={text}"


def _axes(config: TrainConfig, device_type: str) -> list[list[Setting]]:
    """Return settings that need less memory, of each list one at most: of time, of placement, then the length."""
    engine, train, length = config.engine, config.train, config.data.sequence_length or 0
    order = (ActivationCheckpointing.none, ActivationCheckpointing.selective, ActivationCheckpointing.full)
    undone = []
    if (
        engine.activation_checkpointing is not ActivationCheckpointing.none
        and engine.activation_checkpointing_every > 1
    ):
        undone.append(("engine.activation_checkpointing_every", 1))
    if engine.kind in FSDP_KINDS and engine.fsdp.accumulate_whole_gradients:
        undone.append(("engine.fsdp.accumulate_whole_gradients", False))
    if engine.kind in FSDP_KINDS and not engine.fsdp.reshard_after_forward:
        undone.append(("engine.fsdp.reshard_after_forward", True))
    kinds = (EngineKind.fsdp, EngineKind.zero2, EngineKind.zero3)
    lengths = itertools.takewhile(lambda n: n >= SHORTEST_SEQUENCE, (length // 2**i for i in range(1, 16)))
    return [
        [("logging.layer_norms_every_steps", 0)] if config.logging.layer_norms_every_steps else [],
        [
            ("engine.activation_checkpointing", value)
            for value in order[order.index(engine.activation_checkpointing) + 1 :]
        ],
        [
            ("train.micro_batch_size", size)
            for size in range(train.micro_batch_size - 1, 0, -1)
            if train.micro_batch_size % size == 0
        ],
        undone,
        [("checkpoint.asynchronous", False)] if config.checkpoint.asynchronous and device_type == "cpu" else [],
        [("engine.kind", kind) for kind in kinds if kind is not engine.kind],
        [("engine.offload", Offload.cpu)] if engine.offload is Offload.none and device_type != "cpu" else [],
        [("data.sequence_length", n) for n in lengths],
    ]
