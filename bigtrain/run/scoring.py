"""What a network says of the samples of a run, as columns that other runs read: on all ranks, a part at a time."""

import contextlib
import dataclasses
import io
import json
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
from bigtrain.checkpoint.store import Origin
from bigtrain.config import (
    AugmentConfig,
    ModelConfig,
    ModelKind,
    Scored,
    TaskKind,
    TrainConfig,
    component_data,
    is_live,
)
from bigtrain.config.convert import to_dict
from bigtrain.config.score import ScoreConfig
from bigtrain.config.tasks import OF_NEXT_TOKENS, PREDICT_LABELS, head_of, num_outputs_of
from bigtrain.data.read.batch import Batch
from bigtrain.data.read.index import record_file
from bigtrain.data.read.scores import FORMAT, SCORES_FILE, ScoredSet, ScoresIndex
from bigtrain.data.read.stream import SampleStream
from bigtrain.distributed.collectives import on_rank0, pick_device
from bigtrain.engine.base import Engine
from bigtrain.engine.build import build_engine
from bigtrain.engine.state import MODEL
from bigtrain.errors import ConfigError, as_data_error
from bigtrain.files import sync, write_anew
from bigtrain.models import build_model
from bigtrain.models.hf.build import with_hf_shape
from bigtrain.processes import RankInfo
from bigtrain.run.data import open_data, require_tokenizer, with_num_labels
from bigtrain.run.directory import find_whole, is_run, locate, read_config
from bigtrain.run.evaluation import in_group
from bigtrain.run.frozen import hash_of
from bigtrain.run.parts import make_parts
from bigtrain.run.recovery import Start, fill_state, published_weights
from bigtrain.tasks import build_objective
from bigtrain.tasks.scoring import TOP_IDS, score

OFFERED: dict[str, tuple[Scored, ...]] = {
    TaskKind.causal_lm: (Scored.log_probabilities, Scored.logits, Scored.embeddings),
    TaskKind.distillation: (Scored.logits, Scored.log_probabilities, Scored.embeddings),
    TaskKind.preference: (Scored.log_probabilities, Scored.embeddings),
    **dict.fromkeys((*PREDICT_LABELS, TaskKind.regression), (Scored.logits, Scored.embeddings)),
}
"""What is written of a task's samples; the first is the default."""


def score_samples(config: ScoreConfig) -> int:
    """Write columns beside all samples that a resolved run trains and validates on; return how many. All ranks call this.

    Finished parts lie in ``<out>.parts`` until all are there: killed and started again, the rest is done, at any world
    size. BigtrainError: data or model cannot be had, or do not fit; ``out`` exists, or has parts of another request.
    """
    log.setup(RankInfo.from_env().rank)
    kind, offered = config.task.kind, OFFERED.get(config.task.kind, ())
    if config.what not in (None, *offered) or not offered:
        names = ", ".join(what.name for what in offered) or f"nothing; {', '.join(OFFERED)} have something"
        raise ConfigError(f"what={config.what and config.what.name}: of task={kind} is written {names}")
    if any(is_live(part) for part in component_data(config.data).values()):
        raise ConfigError("data.on_the_fly=true: samples have no numbers before they are trained on; leave it out")
    # The same samples, without what is about to be written.
    task = dataclasses.replace(config.task, kind=TaskKind.causal_lm if kind == TaskKind.distillation else kind)
    data = dataclasses.replace(config.data, scores=config.out, augment=AugmentConfig())
    with in_group(dataclasses.replace(config, model=_model_of(config), data=data, task=task)) as run:
        run = with_num_labels(dataclasses.replace(run, data=dataclasses.replace(data, scores=None)))
        streams = open_data(run)
        engine, origin = _open_model(run, config.scorer, streams["train"])
        scorer = _Scorer(engine, run, streams, config, config.what or offered[0])
        weights = hash_of({key: entry for key, entry in engine.state.entries.items() if key.startswith(MODEL)})
        samples = {name: stream.content for name, stream in streams.items()}
        request = {"what": scorer.what.name, "weights": weights, "samples": str(samples)}
        request |= {name: str(getattr(config, name)) for name in ("top_k", "fp16", "batch_size", "part_samples")}
        make_parts(Path(config.out), scorer.parts(), request, scorer.make)
        join = as_data_error(config.out, problem="cannot be written")(_join)
        on_rank0(partial(join, scorer, {"origin": origin, "weights": weights}))
        return sum(stream.num_ids for stream in streams.values())


@dataclass(frozen=True, slots=True)
class _Scorer:
    engine: Engine
    config: TrainConfig
    streams: Mapping[str, SampleStream]
    asked: ScoreConfig
    what: Scored

    def parts(self) -> dict[Path, tuple[str, range]]:
        """Return the files of the parts, and the samples of a set that each holds."""
        size, directory = self.asked.part_samples, Path(f"{self.asked.out}.parts")
        return {
            directory / f"{_plain(name)}-{first:012d}.npz": (name, range(first, min(first + size, stream.num_ids)))
            for name, stream in self.streams.items()
            for first in range(0, stream.num_ids, size)
        }

    def make(self, part: tuple[str, range] | None) -> bytes:
        """Return the columns of a part as an npz file; without a part, only help others to gather weights."""
        of, samples = part or (next(iter(self.streams)), range(0))
        most = min(self.asked.part_samples, max(stream.num_ids for stream in self.streams.values()))
        found: list[dict[str, NDArray]] = []
        for begin in range(0, most, self.asked.batch_size):
            ids = np.array(samples[begin : begin + self.asked.batch_size], dtype=np.int64)
            columns = self.columns(self.streams[of].gather(ids if len(ids) else np.zeros(1, dtype=np.int64)))
            found += [columns] if len(ids) else []
        names = found[0] if found else {}
        whole: dict[str, Any] = {name: np.concatenate([columns[name] for columns in found]) for name in names}
        file = io.BytesIO()
        np.savez(file, **whole)
        return file.getvalue()

    def columns(self, batch: Batch) -> dict[str, NDArray]:
        fields, is_of_tokens = build_objective(self.config.task).fields, self.config.task.kind in OF_NEXT_TOKENS
        read = {name: tensor for name, tensor in batch.items() if is_of_tokens or fields[name].is_input}
        dtype = torch.float16 if self.asked.fp16 else torch.float32
        with torch.no_grad(), self.engine.autocast():
            on_device = Batch(read).to(self.engine.device)
            found = score(self.engine.module, on_device, self.what, top_k=self.asked.top_k, dtype=dtype)
        return {name: column.cpu().numpy() for name, column in found.items()}


def _model_of(config: ScoreConfig) -> ModelConfig:
    by = config.scorer
    if by is None:
        return dataclasses.replace(config.model, adapter=None, freeze=[])
    is_missing = Path(by).is_relative_to(config.run.root) and not Path(by).exists()
    if is_run(by) or is_missing:  # a run that is missing is told as that
        return read_config(locate(Path(by))[0]).model
    head, num_outputs = head_of(config.task), num_outputs_of(config.task)
    return with_hf_shape(ModelConfig(kind=ModelKind.hf, name=by, pretrained=True, head=head, num_outputs=num_outputs))


def _open_model(config: TrainConfig, by: str | None, train: SampleStream) -> tuple[Engine, str]:
    """Return an engine with the weights that score, and where these are from."""
    start = Start(Origin(published=published_weights(to_dict(config.model))))
    if by and is_run(by):
        _, checkpoint = find_whole(Path(by))
        on_rank0(lambda: require_tokenizer(checkpoint, train))
        start = Start(Origin(checkpoint=str(checkpoint.absolute())), checkpoint, weights_only=True)
    info = RankInfo.from_env()
    engine = build_engine(config, lambda: build_model(config.model), info=info, device=pick_device(info))
    fill_state(config, engine, start, info)
    engine.module.eval()
    return engine, start.origin.checkpoint or start.origin.published or f"seed {config.train.seed}"


def _plain(name: str) -> str:
    """Return the name of a set for files."""
    return name.replace("/", ".")


def _join(scorer: _Scorer, model: dict[str, str]) -> None:
    """Put the parts together as ``out``, which appears when it is complete."""
    out, parts = Path(scorer.asked.out), scorer.parts()
    partial_out = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial_out, ignore_errors=True)
    partial_out.mkdir()
    index = ScoresIndex(format=FORMAT, model=model, id_bound=0, sets={})
    for name, stream in scorer.streams.items():
        columns: dict[str, Any] = {}
        with contextlib.ExitStack() as opened:
            for path in (path for path, (of, _) in parts.items() if of == name):
                for key, rows in opened.enter_context(np.load(path, allow_pickle=False)).items():
                    if key not in columns:
                        columns[key] = opened.enter_context((partial_out / f"{_plain(name)}.{key}.npy").open("wb"))
                        whole = np.broadcast_to(rows[:1], (stream.num_ids, *rows.shape[1:]))
                        header = np.lib.format.header_data_from_array_1_0(whole) | {"fortran_order": False}
                        np.lib.format.write_array_header_1_0(columns[key], header)
                    columns[key].write(rows.tobytes())  # not mapped: a full disk is then an error, no signal
                    if key == TOP_IDS:
                        index.id_bound = max(index.id_bound, int(rows.max()) + 1)
        records = {key: record_file(partial_out / f"{_plain(name)}.{key}.npy") for key in columns}
        index.sets[name] = ScoredSet(content=stream.content, num_samples=stream.num_ids, columns=records)
    write_anew(partial_out / SCORES_FILE, json.dumps(to_dict(index), indent=1))
    for path in partial_out.iterdir():
        sync(path)
    partial_out.rename(out)
    sync(out.parent)
    shutil.rmtree(next(iter(parts)).parent)
