"""The recorder of a run on each rank."""

import dataclasses
import math

import torch.distributed as dist

from bigtrain.config import TrainConfig
from bigtrain.data.read.stream import SampleStream
from bigtrain.distributed.collectives import on_rank0
from bigtrain.engine.base import Engine
from bigtrain.engine.state import MODEL
from bigtrain.run.directory import continued_model, writing
from bigtrain.telemetry.gauges import Gauges
from bigtrain.telemetry.recorder import NullRecorder, Recorder


def open_recorder(config: TrainConfig, first_step: int, engine: Engine, stream: SampleStream) -> NullRecorder:
    """Return this rank's recorder; all ranks call this."""
    directory, recorder = config.run.directory, NullRecorder()
    # Rows say their own length where data.sequence_length does not.
    data = dataclasses.replace(config.data, sequence_length=config.data.sequence_length or stream.sequence_length)
    described = dataclasses.replace(config, model=continued_model(config.model, directory), data=data)
    num_parameters = sum(math.prod(e.shape) for key, e in engine.state.entries.items() if key.startswith(MODEL))

    def open_files() -> None:
        nonlocal recorder
        with writing(directory):
            gauges = Gauges(described, engine.device, dist.get_world_size(), num_parameters, stream.progress)
            recorder = Recorder(config, directory, first_step, gauges)

    on_rank0(open_files)
    return recorder
