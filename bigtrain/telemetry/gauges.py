"""Gauges that rank 0 reads at a logging step: throughput, utilisation, memory, the GPU's sensors."""

import contextlib
import math
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from bigtrain import __version__
from bigtrain.config import ModelConfig, ModelKind, Precision, TrainConfig
from bigtrain.log import get_logger, redact
from bigtrain.models.flops import TokenFlops, flops_per_token
from bigtrain.models.sizes import is_language_model, model_sizes, native_shape
from bigtrain.tasks import build_objective
from bigtrain.tasks.causal_lm import CausalLM, perplexity
from bigtrain.telemetry import names
from bigtrain.telemetry.peak import Peak, find_peak

_GIT_SECONDS = 5
_SENSOR_SECONDS = 5.0  # between readings of the GPU's driver
_HOST_SECONDS = 1.0  # between readings of the system
_SAME_MODEL = 0.01


class Gauges:
    """Computes the sectioned metrics of a logging step; nothing here waits for a device."""

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        world_size: int,
        num_parameters: int,
        progress: Callable[[int], dict[str, tuple[int, float]]] = lambda samples: {},
    ) -> None:
        """Count the model's operations and find the peak of rank 0's device, as which all others are taken.

        ``num_parameters``, of the model as built, checks the shape that operations are counted from. ``progress``
        returns tokens (or samples) and epochs of each data source after so many samples.
        """
        self._device = device
        self._world_size = world_size
        self._process = psutil.Process()
        self._launched_at = self._process.create_time()  # Unix time at which this process began
        self._environment = describe_environment(device)
        self._useful_seconds = 0.0
        self._progress = progress
        self._sequence_length = config.data.sequence_length
        self._has_perplexity = isinstance(build_objective(config.task), CausalLM)
        self._rss_bytes, self._rss_read_at = 0, -math.inf
        self._sensors: dict[str, float] = {}
        self._sensors_read_at = -math.inf
        self._joules, self._power = 0.0, (0.0, 0.0)  # the last reading: when, and watts
        self.flops = find_flops(config.model, config.data.sequence_length, num_parameters)
        self.peak = find_peak(device, config.engine.precision or Precision.fp32) if self.flops else None

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {"launched_at": self._launched_at, "environment": self._environment}
        if self.flops:
            described["causal_flops_per_token"] = self.flops.causal
            described["full_attention_flops_per_token"] = self.flops.full_attention
        if self.peak:
            described |= {"peak_flops_per_second": self.peak.flops_per_second, "peak_source": self.peak.source}
        return described

    def read(
        self, records: list[dict[str, Any]], phases: dict[str, float], *, step_seconds: float, rate: float
    ) -> dict[str, Any]:
        """Return the sectioned metrics of the interval of ``records``.

        ``phases`` and ``step_seconds`` are means of its steps; ``rate`` is of all ranks, in units per second.
        """
        unit = names.unit_of(records[-1])
        rate /= self._world_size
        stalled = phases.get(names.CHECKPOINT_STALL_SECONDS, 0.0) + phases.get(names.LOGGING_SECONDS, 0.0)
        self._useful_seconds += (step_seconds - stalled) * len(records)
        return {
            names.TIME: datetime.now(UTC).isoformat(timespec="milliseconds"),
            **({names.TRAIN_PERPLEXITY: perplexity(records[-1][names.LOSS])} if self._has_perplexity else {}),
            **phases,
            f"perf/{names.rate_of(records[-1])}_per_device": rate,
            **utilisation(self.flops, self.peak, rate, phases.get(names.PAIRS_PER_TOKEN)),
            names.GOODPUT: min(self._useful_seconds / max(time.time() - self._launched_at, 1e-9), 1.0),
            names.DATA_WAIT_FRACTION: phases.get(names.DATA_SECONDS, 0.0) / max(step_seconds, 1e-9),
            **self._sources(unit, records[-1][unit]),
            **self._memory(),
            **self._take_sensors(),
        }

    def _sources(self, unit: str, done: int) -> dict[str, float]:
        samples = done if unit == names.SAMPLES else done // self._sequence_length
        read: dict[str, float] = {}
        for name, (drawn, epochs) in self._progress(samples).items():
            read[f"data/{unit}/{name}"], read[f"{names.SOURCE_EPOCHS}/{name}"] = drawn, epochs
        return read

    def _memory(self) -> dict[str, float]:
        now = time.monotonic()
        if now - self._rss_read_at >= _HOST_SECONDS:
            self._rss_bytes, self._rss_read_at = self._process.memory_info().rss, now
        memory: dict[str, float] = {names.HOST_RSS_BYTES: self._rss_bytes}
        if self._device.type == "cuda":
            stats = torch.cuda.memory_stats_as_nested_dict(self._device)
            memory[names.ALLOCATED_BYTES] = stats["allocated_bytes"]["all"]["current"]
            memory[names.RESERVED_BYTES] = stats["reserved_bytes"]["all"]["current"]
            memory[names.PEAK_BYTES] = stats["allocated_bytes"]["all"]["peak"]
        return memory

    def _take_sensors(self) -> dict[str, float]:
        """Return the driver's newest readings and ask again now and then, in a thread: an answer takes milliseconds."""
        now = time.monotonic()
        if self._device.type == "cuda" and now - self._sensors_read_at >= _SENSOR_SECONDS:
            self._sensors_read_at = math.inf  # until it has answered
            threading.Thread(target=self._read_sensors, daemon=True).start()
        told, self._sensors = self._sensors, {}
        return told

    def _read_sensors(self) -> None:
        try:
            watts = torch.cuda.power_draw(self._device) / 1000
            self._sensors = {
                names.UTILISATION_PERCENT: torch.cuda.utilization(self._device),
                names.POWER_WATTS: watts,
                names.ENERGY_JOULES: self._add_energy(time.monotonic(), watts),
                names.TEMPERATURE_CELSIUS: torch.cuda.temperature(self._device),
            }
            self._sensors_read_at = time.monotonic()
        except Exception as error:  # no driver library, no permission, a sensor that a device lacks
            get_logger().info(f"the GPU's sensors cannot be read: {error}")

    def _add_energy(self, now: float, watts: float) -> float:
        """Return the energy between the first reading and this one, by the mean power of readings that follow each other."""
        before, watts_before = self._power
        if watts_before:
            self._joules += (now - before) * (watts + watts_before) / 2
        self._power = now, watts
        return self._joules


def find_flops(model: ModelConfig, sequence_length: int | None, num_parameters: int) -> TokenFlops | None:
    """Return the operations per token, or None if the shape does not give the model's number of parameters."""
    if sequence_length is None:
        return None
    shape = model
    if model.kind is ModelKind.own or not is_language_model(model):
        return None
    if model.kind is ModelKind.hf:
        from bigtrain.models.hf.build import read_hf_config

        shape = native_shape(read_hf_config(model.name).get_text_config())
    if abs(model_sizes(shape).total / max(num_parameters, 1) - 1) > _SAME_MODEL:
        return None
    return flops_per_token(shape, sequence_length)


def utilisation(
    flops: TokenFlops | None, peak: Peak | None, tokens_per_second: float, pairs_per_token: float | None = None
) -> dict[str, float]:
    """Return TFLOP/s and MFU of a device, as far as they are known; a document mask leaves ``pairs_per_token``."""
    if flops is None:
        return {}
    rates = {names.TFLOPS_PER_DEVICE: flops.causal * tokens_per_second / 1e12}
    if peak is None:
        return rates
    if pairs_per_token is not None:
        rates[names.MFU_DOCUMENTS] = flops.documents(pairs_per_token) * tokens_per_second / peak.flops_per_second
    return rates | {
        names.MFU_CAUSAL: flops.causal * tokens_per_second / peak.flops_per_second,
        names.MFU_FULL_ATTENTION: flops.full_attention * tokens_per_second / peak.flops_per_second,
    }


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return commit, command, versions and machine of this launch, secrets masked."""
    packages = {}
    for name in ("torch", "deepspeed", "accelerate", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    facts = {
        "commit": _commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "bigtrain": __version__,
        "packages": packages,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
    return redact({key: value for key, value in facts.items() if value is not None})


def _commit() -> str | None:
    """Return the commit of this source, with a plus sign if tracked files were changed."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_SECONDS).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
