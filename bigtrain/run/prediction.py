"""What a trained network says of inputs: on all ranks, in the order of the inputs, a part of the output at a time."""

import contextlib
import csv
import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bigtrain.checkpoint.manifest import MANIFEST_FILE, hash_file
from bigtrain.config import TaskKind
from bigtrain.config.tasks import OF_NEXT_TOKENS
from bigtrain.data.read.batch import build_batch
from bigtrain.data.read.records import Records
from bigtrain.data.read.tokenizer import TOKENIZER_FILE
from bigtrain.distributed.collectives import on_rank0
from bigtrain.engine.base import Engine
from bigtrain.errors import ConfigError
from bigtrain.run.directory import label_names
from bigtrain.run.evaluation import load_engine, opened
from bigtrain.run.inputs import list_images, open_inputs
from bigtrain.run.parts import make_parts
from bigtrain.run.validation import writing_of
from bigtrain.tasks import build_objective
from bigtrain.tasks.answers import Predicts, Wanted


@dataclass(frozen=True, slots=True)
class _Job:
    """A trained network with the inputs that it answers."""

    engine: Engine
    objective: Predicts
    records: Records
    wanted: Wanted
    batch_size: int
    checkpoint: Path
    files: list[str]  # name of each input that is a file

    def answers(self, rows: NDArray[np.int64], *, most_rows: int) -> list[dict[str, Any]]:
        """Return the answers to some rows.

        All ranks, with fewer rows too, compute as often: they gather weights together.
        """
        answers, network = list[dict[str, Any]](), partial(self.engine.module, predicts=True)
        for first in range(0, most_rows, self.batch_size):
            own = rows[first : first + self.batch_size]
            read = own if len(own) else np.zeros(1, dtype=np.int64)
            batch = build_batch(self.records.read(read, read)).to(self.engine.device)
            with torch.no_grad():
                found = self.objective.answers(network, *batch.values(), wanted=self.wanted)
            answers += map(self.records.finished, own.tolist(), found)
        named = zip(rows.tolist(), answers, strict=True)
        return [{"file": self.files[row], **answer} for row, answer in named] if self.files else answers


@contextlib.contextmanager
def _opened(path: Path, inputs: Any, wanted: Wanted, batch_size: int) -> Iterator[_Job]:
    """Load a run's network and open the inputs; all ranks call this."""
    with opened(path) as (config, run):
        objective = build_objective(config.task)
        if not isinstance(objective, Predicts):
            way = "an objective that does has 'answers'"
            if config.task.kind in OF_NEXT_TOKENS:
                way = "bigtrain generate continues a prompt"
            raise ConfigError(f"task={config.task.kind} predicts nothing of inputs; {way}")
        has_settings = wanted.top_k > 1 or wanted.threshold is not None
        if has_settings and config.task.kind in set(TaskKind.__members__) - {TaskKind.classification}:
            raise ConfigError(f"top_k, threshold: task={config.task.kind} gives no probabilities; leave them out")
        if wanted.top_k > 1 and wanted.threshold is not None:
            raise ConfigError(f"top_k={wanted.top_k}, threshold={wanted.threshold}: leave one of them out")
        records = open_inputs(inputs, run, config)
        is_directory = isinstance(inputs, Path) and inputs.is_dir()
        files = [str(file.relative_to(inputs)) for file in list_images(inputs)] if is_directory else []
        writing = writing_of(run if (run / TOKENIZER_FILE).is_file() else None, config)
        wanted = dataclasses.replace(wanted, label_names=tuple(label_names(run)), writing=writing)
        engine, checkpoint = load_engine(path, config)
        engine.module.eval()
        yield _Job(engine, objective, records, wanted, batch_size, checkpoint, files)


def predict(path: Path, inputs: Any, *, wanted: Wanted, batch_size: int = 32) -> list[dict[str, Any]]:
    """Return the answers of a run, or of one of its checkpoints, to inputs in their order; every rank returns all."""
    with _opened(path, inputs, wanted, batch_size) as job:
        return job.answers(np.arange(job.records.num_rows), most_rows=job.records.num_rows)


def predict_file(
    path: Path, inputs: Path, out: Path, *, wanted: Wanted, batch_size: int = 32, part_rows: int = 1024
) -> int:
    """Write the answers to a file of inputs to ``out``, ``.jsonl`` or ``.csv``; return how many. All ranks call this.

    Finished parts of ``part_rows`` inputs lie in ``<out>.parts`` until all are there: killed and started again, the rest
    is done, at any world size. BigtrainError: no whole checkpoint, inputs that do not fit, or a task that answers nothing.
    """
    if out.suffix not in (".jsonl", ".csv"):
        raise ConfigError(f"out={out}: name a file that ends with .jsonl or .csv")
    with _opened(path, inputs, wanted, batch_size) as job:
        num_rows = job.records.num_rows
        request = {
            "inputs": str(job.files) if job.files else hash_file(inputs),
            "weights": hash_file(job.checkpoint / MANIFEST_FILE),
            "wanted": str(job.wanted),
            "batch_size": str(batch_size),
            "part_rows": str(part_rows),
        }
        parts = {
            Path(f"{out}.parts", f"{number:08d}{out.suffix}"): range(first, min(first + part_rows, num_rows))
            for number, first in enumerate(range(0, num_rows, part_rows))
        }

        def make(rows: range | None) -> str:
            answers = job.answers(np.array(rows or [], dtype=np.int64), most_rows=min(part_rows, num_rows))
            return encode(answers, out.suffix, with_header=bool(rows) and rows.start == 0)

        make_parts(out, parts, request, make)
        on_rank0(partial(_join, out, list(parts)))
    return num_rows


def encode(answers: list[dict[str, Any]], suffix: str, *, with_header: bool) -> str:
    """Return answers as lines of JSON or CSV; lists in CSV are JSON."""
    if suffix == ".jsonl":
        return "".join(f"{json.dumps(answer, ensure_ascii=False)}\n" for answer in answers)
    text = io.StringIO()
    if not answers:
        return ""
    writer = csv.DictWriter(text, list(answers[0]), lineterminator="\n")
    if with_header:
        writer.writeheader()
    lists = (list, dict)
    writer.writerows({k: json.dumps(v) if isinstance(v, lists) else v for k, v in answer.items()} for answer in answers)
    return text.getvalue()


def _join(out: Path, parts: list[Path]) -> None:
    partial_file = out.with_name(f"{out.name}.partial")
    with partial_file.open("wb") as joined:
        for part in parts:
            joined.write(part.read_bytes())
    partial_file.replace(out)
    shutil.rmtree(parts[0].parent)
