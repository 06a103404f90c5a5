"""Preflight: whether a run fits the machine. torch is imported only to ask a GPU."""

import dataclasses
import os

from bigtrain.config import EngineKind, Precision, TrainConfig
from bigtrain.plan.estimate import Estimate, estimate, measure_model
from bigtrain.plan.machine import Machine, available_bytes
from bigtrain.plan.report import Report

__all__ = ["Estimate", "Machine", "Report", "available_bytes", "estimate", "preflight"]


def preflight(
    config: TrainConfig, *, world_size: int, local_world_size: int, device_type: str, precision: Precision
) -> Report:
    """Estimate the memory of a run and compare it with this machine's; ConfigError if its model cannot be read."""
    available_host = available_bytes("cpu", local_world_size)
    available = available_host if device_type == "cpu" else available_bytes(device_type, local_world_size)
    machine = Machine(world_size, local_world_size, device_type, available, available_host)
    kind = config.engine.kind
    if kind is EngineKind.accelerate and os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        kind = EngineKind.__members__.get(f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}", kind)
    engine = dataclasses.replace(config.engine, precision=precision, kind=kind)
    config = dataclasses.replace(config, engine=engine)
    return Report(config, machine, measure_model(config.model))
