"""What a network says of the samples of a run, as columns that other runs read: on all ranks, a part at a time."""

import dataclasses
import io
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bigtrain import log
from bigtrain.config import (
    AugmentConfig,
    ModelConfig,
    ModelKind,
    Precision,
    Scored,
    TaskKind,
    TrainConfig,
    component_data,
    is_live,
)
from bigtrain.config.convert import to_dict
from bigtrain.config.tasks import OF_NEXT_TOKENS, head_of, num_outputs_of
from bigtrain.data.read.index import record_file
from bigtrain.data.read.scores import FORMAT, SCORES_FILE, ScoredSet, ScoresIndex
from bigtrain.data.read.stream import SampleStream
from bigtrain.distributed.collectives import on_rank0, pick_device
from bigtrain.engine.base import Engine
from bigtrain.engine.build import build_engine, require_causal
from bigtrain.engine.state import MODEL, initialise
from bigtrain.errors import ConfigError
from bigtrain.files import sync, write_anew
from bigtrain.models import build_model
from bigtrain.models.hf.build import with_hf_shape
from bigtrain.processes import RankInfo
from bigtrain.run.data import open_data, require_tokenizer, with_num_labels
from bigtrain.run.directory import find_whole, is_run, read_config
from bigtrain.run.evaluation import in_group, load_engine
from bigtrain.run.frozen import hash_of, starting_values
from bigtrain.run.parts import make_parts
from bigtrain.tasks import build_objective
from bigtrain.tasks.scoring import TOP_IDS, score

CLASSIFIERS = (TaskKind.classification.name, TaskKind.token_classification.name, TaskKind.regression.name)
USUAL = {TaskKind.distillation.name: Scored.logits, TaskKind.classification.name: Scored.logits}


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is written."""

    what: Scored | None = None  # by default what the task reads
    top_k: int = 32  # tokens of a language model's logits
    fp16: bool = False  # whether logits are written in half of the space
    batch_size: int = 8  # samples of a rank in a forward pass
    part_samples: int = 1024  # samples of a part of the output


def score_run(config: TrainConfig, by: str | None, out: Path, request: Request) -> int:
    """Write columns beside all samples that a run trains on and validates on; return the samples. All ranks call this.

    Finished parts lie in ``<out>.parts`` until all are there: killed and started again, the rest is done, at any world
    size.

    Args:
        config: resolved, of the run that will read the columns.
        by: a run, one of its checkpoints, or a published model; by default what ``config`` begins with, without
            adapters.
        out: directory that is made; must not exist.
        request: what is written.

    Raises:
        BigtrainError: data or model cannot be had, or do not fit; or ``out`` exists, or has parts of another request.
    """
    log.setup(RankInfo.from_env().rank)
    request = dataclasses.replace(request, what=request.what or USUAL.get(config.task.kind, Scored.log_probabilities))
    _require_offered(config, request.what)
    config = dataclasses.replace(config, model=_model_of(config, by))
    with in_group(_to_score(config, out)) as config:
        if config.task.kind == TaskKind.distillation.name:
            config.task.kind = TaskKind.causal_lm.name  # the same samples, without what is about to be written
        config.data.scores = None
        config = with_num_labels(config)
        streams = open_data(config)
        engine, origin = _open_model(config, by, streams["train"])
        engine.module.eval()
        weights = hash_of({key: entry for key, entry in engine.state.entries.items() if key.startswith(MODEL)})
        scorer = _Scorer(engine, config, streams, request)
        about = {"model": {"origin": origin, "weights": weights}, "what": request.what.name}
        asked = {key: str(value) for key, value in dataclasses.asdict(request).items()}
        content = json.dumps({name: stream.content for name, stream in streams.items()})
        make_parts(out, scorer.parts(out), {"weights": weights, "samples": content, **asked}, scorer.make)
        on_rank0(partial(_join, out, scorer, about))
        return sum(stream.num_ids for stream in streams.values())


def _require_offered(config: TrainConfig, what: Scored) -> None:
    kind = config.task.kind
    if kind not in (*OF_NEXT_TOKENS, *CLASSIFIERS):
        raise ConfigError(f"task={kind}: its samples are not scored; {', '.join((*OF_NEXT_TOKENS, *CLASSIFIERS))} are")
    is_odd = what is Scored.log_probabilities if kind in CLASSIFIERS else False
    if is_odd or (kind == TaskKind.preference.name and what is Scored.logits):
        raise ConfigError(f"what={what.name}: is not offered with task={kind}")
    if any(is_live(part) for part in component_data(config.data).values()):
        raise ConfigError("data.on_the_fly=true: samples have no numbers before they are trained on; leave it out")


def _model_of(config: TrainConfig, by: str | None) -> ModelConfig:
    """Return the model that scores."""
    if by is None:
        return dataclasses.replace(config.model, adapter=None, freeze=[])
    if is_run(by):
        return read_config(find_whole(Path(by))[0]).model
    head, num_outputs = head_of(config.task), num_outputs_of(config.task)
    return with_hf_shape(ModelConfig(kind=ModelKind.hf, name=by, pretrained=True, head=head, num_outputs=num_outputs))


def _to_score(config: TrainConfig, out: Path) -> TrainConfig:
    """Return ``config`` with a precision, samples as they are, and the columns that it will have."""
    usual = Precision.bf16 if torch.cuda.is_available() else Precision.fp32
    engine = dataclasses.replace(config.engine, precision=config.engine.precision or usual)
    data = dataclasses.replace(config.data, scores=str(out), augment=AugmentConfig())
    return dataclasses.replace(config, engine=engine, data=data, task=dataclasses.replace(config.task))


def _open_model(config: TrainConfig, by: str | None, train: SampleStream) -> tuple[Engine, str]:
    """Return an engine with the weights that score, and where these are from."""
    if by and is_run(by):
        engine, checkpoint = load_engine(Path(by), config)
        on_rank0(lambda: require_tokenizer(checkpoint, train))
        return engine, str(checkpoint.absolute())
    info = RankInfo.from_env()
    engine = build_engine(config, lambda: build_model(config.model), info=info, device=pick_device(info))
    values = starting_values(config.model, config.train.seed)
    initialise(engine.state, values, num_threads=max(1, (os.cpu_count() or 1) // info.local_world_size))
    require_causal(engine, config)
    model = config.model
    return engine, by or model.init_from or (model.name if model.pretrained else None) or f"seed {config.train.seed}"


@dataclass(frozen=True, slots=True)
class _Scorer:
    engine: Engine
    config: TrainConfig
    streams: Mapping[str, SampleStream]
    request: Request

    def parts(self, out: Path) -> dict[Path, tuple[str, range]]:
        """Return the files of the parts, and the samples of a set that each holds."""
        parts, size = {}, self.request.part_samples
        for name, stream in self.streams.items():
            for number, first in enumerate(range(0, stream.num_ids, size)):
                path = Path(f"{out}.parts", f"{_plain(name)}-{number:08d}.npz")
                parts[path] = name, range(first, min(first + size, stream.num_ids))
        return parts

    def make(self, part: tuple[str, range] | None) -> bytes:
        """Return the columns of a part as an npz file; nothing where a rank only helps others to gather weights."""
        name, samples = part or (next(iter(self.streams)), range(0))
        most = min(self.request.part_samples, max(stream.num_ids for stream in self.streams.values()))
        found: list[dict[str, NDArray]] = []
        for begin in range(0, most, self.request.batch_size):
            ids = np.array(samples[begin : begin + self.request.batch_size], dtype=np.int64)
            columns = self.columns(self.streams[name], ids if len(ids) else np.zeros(1, dtype=np.int64))
            found += [columns] if len(ids) else []
        file = io.BytesIO()
        whole: dict[str, Any] = (
            {key: np.concatenate([part[key] for part in found]) for key in found[0]} if found else {}
        )
        np.savez(file, **whole)
        return file.getvalue()

    def columns(self, stream: SampleStream, ids: NDArray[np.int64]) -> dict[str, NDArray]:
        """Return the columns of some samples."""
        fields, is_language_model = build_objective(self.config.task).fields, self.config.task.kind in OF_NEXT_TOKENS
        samples = stream.gather(ids).items()
        read = {name: tensor for name, tensor in samples if is_language_model or fields[name].is_input}
        batch = {name: tensor.to(self.engine.device) for name, tensor in read.items()}
        dtype = torch.float16 if self.request.fp16 else torch.float32
        with torch.no_grad(), self.engine.autocast():
            found = score(self.engine.module, batch, self.request.what, top_k=self.request.top_k, dtype=dtype)
        return {name: column.cpu().numpy() for name, column in found.items()}


def _plain(name: str) -> str:
    """Return the name of a set for files."""
    return name.replace("/", ".")


def _join(out: Path, scorer: _Scorer, about: Mapping[str, Any]) -> None:
    """Put the parts together as ``out``, which appears when it is complete."""
    parts, partial_out = scorer.parts(out), out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial_out, ignore_errors=True)
    partial_out.mkdir()
    sets, id_bound = {}, 0
    for name, stream in scorer.streams.items():
        own, columns = {path: samples for path, (part, samples) in parts.items() if part == name}, {}
        for path, samples in own.items():
            with np.load(path, allow_pickle=False) as part:
                for key in part.files:
                    if key not in columns:
                        file, shape = partial_out / f"{_plain(name)}.{key}.npy", (stream.num_ids, *part[key].shape[1:])
                        columns[key] = np.lib.format.open_memmap(file, "w+", part[key].dtype, shape)
                    columns[key][samples.start : samples.stop] = part[key]
                    id_bound = max(id_bound, int(part[key].max()) + 1) if key == TOP_IDS else id_bound
        for column in columns.values():
            column.flush()
        records = {key: record_file(partial_out / f"{_plain(name)}.{key}.npy") for key in columns}
        sets[name] = ScoredSet(content=stream.content, num_samples=stream.num_ids, columns=records)
    index = ScoresIndex(format=FORMAT, id_bound=id_bound, sets=sets, **about)
    write_anew(partial_out / SCORES_FILE, json.dumps(to_dict(index), indent=1))
    for path in partial_out.iterdir():
        sync(path)
    partial_out.rename(out)
    sync(out.parent)
    shutil.rmtree(next(iter(parts)).parent)
