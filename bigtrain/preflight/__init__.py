"""Whether a run fits the machine, said before anything is allocated. torch is imported only to ask a GPU."""

import dataclasses

from bigtrain.config import Precision, TrainConfig
from bigtrain.preflight.estimate import Estimate, estimate, measure_model
from bigtrain.preflight.machine import Machine, available_bytes
from bigtrain.preflight.report import Report

__all__ = ["Estimate", "Machine", "Report", "available_bytes", "estimate", "preflight"]


def preflight(
    config: TrainConfig, *, world_size: int, local_world_size: int, device_type: str, precision: Precision
) -> Report:
    """Estimate the memory of a run and compare it with this machine's.

    Args:
        config: resolved and checked configuration.
        world_size: number of ranks.
        local_world_size: ranks on this node.
        device_type: ``cuda`` (the current device is asked) or ``cpu``.
        precision: what ``engine.precision`` comes to on this device.

    Raises:
        ConfigError: if a Hugging Face model cannot be read.
    """
    available_host = available_bytes("cpu", local_world_size)
    available = available_host if device_type == "cpu" else available_bytes(device_type, local_world_size)
    machine = Machine(world_size, local_world_size, device_type, available, available_host)
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision=precision))
    return Report(config, machine, measure_model(config.model))
