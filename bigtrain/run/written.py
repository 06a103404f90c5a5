"""What a sequence-to-sequence model writes of held-out sources, compared with their targets."""

import math
from functools import partial
from pathlib import Path

import torch

from bigtrain.config import TrainConfig
from bigtrain.config.packages import require
from bigtrain.data.read.index import read_index
from bigtrain.data.read.stream import SampleStream
from bigtrain.data.read.tokenizer import load_tokenizer
from bigtrain.distributed.collectives import broadcast_json, gather_json
from bigtrain.engine.base import Engine
from bigtrain.run.data import held_out_batches
from bigtrain.tasks import build_objective
from bigtrain.tasks.answers import Wanted, Writing
from bigtrain.tasks.base import IGNORE_INDEX

WRITTEN_METRICS = ("exact", "bleu", "chrf")
"""Share of texts that are the target; BLEU and chrF of sacrebleu, each of all texts together."""


def write_validation(engine: Engine, stream: SampleStream, config: TrainConfig) -> list[dict[str, str]]:
    """Return source, target and what was written of ``validation.written_samples`` samples, in order, on rank 0.

    All ranks call this.
    """
    batch_size, num_wanted = config.train.global_batch_size, config.validation.written_samples
    objective = build_objective(config.task)
    steps = held_out_batches(stream, config, engine, batches=math.ceil(num_wanted / batch_size))
    wanted = Wanted(writing=writing_of(stream.tokenizer_directory))
    engine.module.eval()
    network, decode = partial(engine.module, predicts=True), wanted.writing.decode
    found: list[tuple[int, dict[str, str]]] = []
    for number, micro_batches in enumerate(steps):
        for batch in micro_batches:
            *inputs, targets = (tensor.to(engine.device) for tensor in batch.values())
            with torch.no_grad():
                written = objective.answers(network, *inputs, wanted=wanted)
            rows = zip(
                batch["source"].tolist(), batch["source_lengths"].tolist(), targets.tolist(), written, strict=True
            )
            found += [
                (number, {"source": decode(text[:length]), "target": decode(target), "written": own["text"]})
                for text, length, target, own in rows
                if target[0] != IGNORE_INDEX
            ]
    by_step = sorted((part for rank in gather_json(found) for part in rank), key=lambda part: part[0])
    return [text for _, text in by_step][:num_wanted]


def written_metrics(texts: list[dict[str, str]]) -> dict[str, float]:
    """Return :data:`WRITTEN_METRICS` of what :func:`write_validation` returns on rank 0, on every rank."""
    return (
        broadcast_json(_compare([t["written"] for t in texts], [t["target"] for t in texts]) if texts else None) or {}
    )


def _compare(written: list[str], targets: list[str]) -> dict[str, float]:
    require("validation.written_samples", "sacrebleu", "metrics")
    import sacrebleu

    exact = sum(one == other for one, other in zip(written, targets, strict=True)) / len(targets)
    bleu = sacrebleu.corpus_bleu(written, [targets], force=True).score
    return {"exact": exact, "bleu": bleu, "chrf": sacrebleu.corpus_chrf(written, [targets]).score}


def writing_of(directory: Path) -> Writing:
    """Return how the tokenizer in a directory, of a corpus or a run, ends and reads texts."""
    tokenizer, eos_id = load_tokenizer(directory), read_index(directory, check_sizes=False).tokenizer.eos_id

    def decode(ids: list[int]) -> str:
        ends = [place for place, number in enumerate(ids) if number in (eos_id, IGNORE_INDEX)]
        return tokenizer.decode(ids[: ends[0]] if ends else ids, skip_special_tokens=True)

    return Writing(eos_id, decode)
