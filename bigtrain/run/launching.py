"""A launch of a run on this rank: what it trains, from where, and how it ends."""

import dataclasses
import math
import os
import uuid
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from bigtrain import log
from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.store import discard_after
from bigtrain.config import Load, Precision, TrainConfig
from bigtrain.config.convert import from_dict, to_dict
from bigtrain.data.order.cursor import Cursor
from bigtrain.data.read.cache import cache_directory
from bigtrain.data.read.stream import SampleStream
from bigtrain.distributed.collectives import (
    broadcast_json,
    differing_rank,
    init_process_group,
    on_rank0,
    pick_device,
    shut_down,
)
from bigtrain.engine.base import Engine
from bigtrain.engine.build import build_engine, require_hardware
from bigtrain.engine.state import MODEL
from bigtrain.errors import EXIT_FINISHED, ConfigError, of_all_ranks
from bigtrain.files import writing
from bigtrain.models import build_model
from bigtrain.models.hf.files import stored_tensors
from bigtrain.plan import Report, preflight
from bigtrain.processes import RankInfo
from bigtrain.run.banner import banner
from bigtrain.run.data import (
    check_continuation,
    open_data,
    require_tokenizer,
    with_class_weights,
    with_num_labels,
    with_steps,
)
from bigtrain.run.directory import continued_model, is_run, reached_step, write_run_files
from bigtrain.run.frozen import describe_frozen, parameters_of, without_frozen
from bigtrain.run.generated import open_classifier
from bigtrain.run.privacy import open_account
from bigtrain.run.recovery import Start, begin_standing, fill_state, find_start, go_back, nothing_to_do, why_ended
from bigtrain.run.sampling import require_texts
from bigtrain.run.trainer import End, Run, train
from bigtrain.supervise.launch import Launch
from bigtrain.supervise.signals import StopLimits
from bigtrain.telemetry.files import repair
from bigtrain.telemetry.gauges import Gauges
from bigtrain.telemetry.profiling import explained, save_hang
from bigtrain.telemetry.recorder import NullRecorder, Recorder


def run(config: TrainConfig, *, outlived: bool = False) -> int:
    """Train by rank 0's ``config`` from the newest checkpoint on; return the code. An ``outlived`` process goes on."""
    info = RankInfo.from_env()
    log.setup(info.rank)
    device = pick_device(info)
    precision = config.engine.precision or (Precision.bf16 if device.type == "cuda" else Precision.fp32)
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision=precision))
    require_hardware(precision, device)  # before anything is prepared or written
    report = preflight(
        dataclasses.replace(config, model=continued_model(config.model, config.run.directory)),
        world_size=info.world_size,
        local_world_size=info.local_world_size,
        device_type=device.type,
        precision=precision,
    )
    report.require(config.preflight, "goes on regardless")
    init_process_group(info, device)
    # Rank 0's configuration is the configuration of the run.
    own_imports, config = config.imports, from_dict(TrainConfig, broadcast_json(to_dict(config)))
    require_same_imports(own_imports)
    launch = Launch(config.run.directory, info.rank, config.supervision)
    try:
        with launch, explained(config, config.run.directory, info, device):
            end = _run(config, info, device, launch, report)
            launch.end(end.code, end.reason)
        # Some launchers end all ranks as soon as one has ended: all wait until rank 0 has written everything. Not after
        # a failure, when a collective could wait for ever for ranks that are gone.
        code = broadcast_json(end.code)
        shut_down()
    finally:
        if outlived:
            launch.leave()
    return code


def _run(config: TrainConfig, info: RankInfo, device: torch.device, launch: Launch, report: Report) -> End:
    directory = launch.directory
    streams: Mapping[str, SampleStream] = {}
    if on_rank0(directory.is_dir):
        launch.claim(reached_step)
    config = with_num_labels(config)
    start = find_start(config)
    state = start.read_state()
    standing = begin_standing(config, state)

    def open_streams() -> Mapping[str, SampleStream]:
        on_rank0(lambda: require_place(config, start))
        return open_data(config, state.data if state else None)

    if config.train.is_open:  # the number of steps follows from the data
        streams = open_streams()
        config = with_steps(config, streams["train"], state)
    if state and (told := nothing_to_do(config, state, standing)):
        log.get_logger().info(told)
        on_rank0(lambda: repair(directory))
        launch.heartbeat.step = state.step
        return End(EXIT_FINISHED, why_ended(standing, config.validation) or "finished")
    streams = streams or open_streams()
    stream, begin = streams["train"], state.cursor if state else Cursor()
    config = with_class_weights(config, stream)
    changes = check_continuation(state, config, stream, info.world_size) if state else []
    account = open_account(config, stream, state, start.checkpoint)
    if start.checkpoint:
        on_rank0(lambda: require_tokenizer(start.checkpoint, stream))
    stream.require_steps(begin, config.train.steps, config.train.global_batch_size)
    on_rank0(lambda: require_texts(config, stream.tokenizer_directory))
    if config.validation.frechet:
        open_classifier(Path(config.validation.frechet))
    model = continued_model(config.model, directory)
    on_rank0(lambda: write_run_files(config, stream.tokenizer_directory, stream.facts))
    launch.claim(reached_step)
    cache = cache_directory(config.data) if stream.is_remote or stream.is_live else None
    launch_id = broadcast_json(uuid.uuid4().hex[:12])
    launch.supervise(launch_id, info.local_rank, partial(save_hang, directory), cache)
    engine = build_engine(config, lambda: build_model(model), info=info, device=device)
    fill_state(config, engine, start, info)
    frozen = describe_frozen(engine.state.entries, config.model)
    kept = without_frozen(engine.state.entries, frozen)
    parts = Run(
        config=config,
        launch=launch,
        engine=engine,
        streams=streams,
        recorder=NullRecorder(),
        saver=Saver(directory, kept, config.checkpoint, is_ours=launch.is_here),
        start=begin,
        origin=start.origin,
        standing=standing,
        frozen=frozen,
        account=account,
        rollbacks=state.rollbacks if state else 0,
        limits=StopLimits(directory, config.run.max_minutes, started=launch.started) if info.rank == 0 else None,
    )
    facts = {"world_size": info.world_size, "attempt": launch.attempt, "after": launch.previous_failure()}
    return _train(parts, start, info, report, facts | ({"changed": changes} if changes else {}))


def _train(run: Run, start: Start, info: RankInfo, report: Report, facts: dict[str, object]) -> End:
    """Train, after each rollback again, until the run ends or stops."""
    config, launch, stream = run.config, run.launch, run.streams["train"]
    launch.signal.at_once = False
    while True:
        run.recorder = open_recorder(config, run.start.step, run.engine, stream)
        with run.recorder:
            kind = "resume" if start.read_state() else "start"
            loaded = {"load": Load.weights.name} if start.weights_only else {}
            lines = banner(run, report, run.recorder.peak)
            run.recorder.message("\n".join(lines))
            run.recorder.event(
                kind, step=run.start.step, checkpoint=str(start.checkpoint or ""), banner=lines, **loaded, **facts
            )
            end = train(run)
            if isinstance(end, End):
                return end
            launch.heartbeat.enter("starting")
            start = go_back(config, end, stream, start=start, begin=run.start, rollbacks=run.rollbacks)
            bad = {"first_bad_step": end.first_step, "last_bad_step": end.last_step}
            # Record first: a checkpoint recorded as saved and not rolled back has to exist.
            run.recorder.event("rollback", step=end.last_step, checkpoint=str(start.checkpoint or ""), **bad)
            on_rank0(partial(discard_after, launch.directory, end.first_step - 1))
        run.rollbacks += 1
        run.start = fill_state(config, run.engine, start, info)
        run.standing = begin_standing(config, start.read_state())


def open_recorder(config: TrainConfig, first_step: int, engine: Engine, stream: SampleStream) -> NullRecorder:
    """Return this rank's recorder; all ranks call this."""
    directory, recorder = config.run.directory, NullRecorder()
    # Rows say their own length where data.sequence_length does not.
    data = dataclasses.replace(config.data, sequence_length=config.data.sequence_length or stream.sequence_length)
    described = dataclasses.replace(config, model=continued_model(config.model, directory), data=data)
    entries = engine.state.entries
    num_parameters = sum(math.prod(entries[MODEL + name].shape) for name in parameters_of(entries))

    def open_files() -> None:
        nonlocal recorder
        with writing(directory):
            gauges = Gauges(described, engine.device, dist.get_world_size(), num_parameters, stream.progress)
            recorder = Recorder(config, directory, first_step, gauges)

    on_rank0(open_files)
    return recorder


def require_same_imports(imports: dict[str, str]) -> None:
    """Raise a ConfigError on all ranks if some have imported other contents than rank 0; all ranks call this."""
    if (rank := differing_rank(imports)) is not None:
        problem = f"--import: rank {rank} has imported other files than rank 0; copy the same to every node"
        raise of_all_ranks(ConfigError(problem))


def require_place(config: TrainConfig, start: Start) -> None:
    """Raise a ConfigError, before anything slow, if the run cannot be written or its published weights are not whole."""
    directory = config.run.directory
    there = next(place for place in (directory.absolute(), *directory.absolute().parents) if os.path.lexists(place))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "read-only for you" if there.is_dir() else "not a directory"
        raise ConfigError(f"{directory} cannot be written: {there} is {what}; mend that or choose another run.root")
    if start.checkpoint is None and start.origin.published and not is_run(start.origin.published):
        setting = "model.init_from" if config.model.init_from else "model.name"
        stored_tensors(start.origin.published, setting=setting)
