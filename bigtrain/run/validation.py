"""What a model reaches on samples that it is not trained on: loss, metrics, what it writes, and what it gets wrong."""

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bigtrain.config import DataConfig, ModelKind, TrainConfig
from bigtrain.config.packages import require
from bigtrain.data.read.batch import Batch
from bigtrain.data.read.images import visible
from bigtrain.data.read.index import read_index
from bigtrain.data.read.loader import count_targets
from bigtrain.data.read.stream import SampleStream
from bigtrain.data.read.tokenizer import build_tokenizer, load_tokenizer
from bigtrain.distributed.collectives import broadcast_json, gather_json
from bigtrain.engine.base import Engine
from bigtrain.files import write_anew
from bigtrain.run.data import HELD_OUT, held_out_batches, sets_of
from bigtrain.run.generated import frechet
from bigtrain.run.step import coupled
from bigtrain.tasks import build_objective
from bigtrain.tasks.answers import Predicts, Wanted, Writing
from bigtrain.tasks.base import IGNORE_INDEX, Objective, num_sums, split_sums
from bigtrain.tasks.causal_lm import CausalLM
from bigtrain.tasks.metrics import scores_by_label
from bigtrain.tasks.texts import error_rate, rouge_l
from bigtrain.telemetry.files import CLASSIFICATION_FILE

NUM_WRITTEN = 10  # texts of a validation that are recorded
NUM_MISTAKES = 24  # images that are shown
WRITTEN_METRICS = ("exact", "bleu", "chrf", "rouge_l", "wer", "cer")
"""Share of texts that are the target; BLEU and chrF of sacrebleu, each of all texts together; the mean ROUGE-L; and edits
per word and per character."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Loss and metrics of one set, or of several together."""

    metrics: dict[str, float]
    """``loss`` and the task's; of a set with a name as ``name/loss``, besides those of all together."""
    confusion: NDArray[np.float64] | None  # ``(C, C)``, a row per true label, if the task counts them
    by_label: dict[
        str, list[float]
    ]  # precision, recall and F1, and AUC of several labels a sample, if the task has labels
    texts: list[dict[str, str]]  # on rank 0, what was written of the first of ``validation.written_samples`` samples


def validate(engine: Engine, sets: Mapping[str, SampleStream], config: TrainConfig, *, batches: int | None) -> Measured:
    """Return the mean loss per target, and the task's metrics, at any world size.

    ``sets`` are by name, one without a name as ``""``; of each ``batches`` global batches are taken, by default all.
    """
    objective, texts = build_objective(config.task), {}
    totals = {name: _add_up(engine, stream, objective, config, batches) for name, stream in sets.items()}
    if config.validation.written_samples:
        texts = {name: write_validation(engine, stream, config) for name, stream in sets.items()}

    def measure(chosen: list[str]) -> tuple[dict[str, float], dict[str, NDArray[np.float64]]]:
        """Return metrics and sums of some sets together."""
        num_targets, loss_sum, *_ = total = torch.stack([totals[name] for name in chosen]).sum(dim=0).numpy()
        loss = float(loss_sum / num_targets) if num_targets else float("nan")  # all in shards that are skipped
        sums = split_sums(objective, total[2:], held_out=True)
        metrics = {"loss": loss, **objective.metrics(loss, sums)}
        if texts:
            metrics |= written_metrics([text for name in chosen for text in texts[name]])
        size = sets[chosen[0]].bytes_per_token if len(chosen) == 1 else None
        if isinstance(objective, CausalLM) and size:
            metrics["bits_per_byte"] = loss / math.log(2) / size
        return metrics, sums

    metrics, sums = measure(list(sets))
    if config.validation.frechet:
        metrics["frechet"] = frechet(engine, sets.values(), config, batches=batches)
    for name in filter(None, sets):
        metrics |= {f"{name}/{key}": value for key, value in measure([name])[0].items()}
    by_label = {name: values.tolist() for name, values in scores_by_label(sums).items()}
    return Measured(
        metrics, sums.get("confusion"), by_label, [text for part in texts.values() for text in part][:NUM_WRITTEN]
    )


def _add_up(
    engine: Engine, stream: SampleStream, objective: Objective, config: TrainConfig, batches: int | None
) -> torch.Tensor:
    """Return targets, summed loss and the objective's sums over samples of a set, over all ranks: fp64 ``(2 + K,)``."""
    batches = batches or math.ceil(stream.num_samples / config.train.global_batch_size)
    total = torch.zeros(2 + num_sums(objective, held_out=True), dtype=torch.float64)
    for micro_batches in held_out_batches(stream, config, engine, batches=batches):
        found = engine.evaluate(coupled(engine, micro_batches, trains=False)).double().cpu()
        for batch, sums in zip(micro_batches, found, strict=True):
            total[0] += count_targets(objective, batch)
            total[1:] += sums
    return engine.mesh.total(total)


def score_tasks(engine: Engine, config: TrainConfig, run: Path) -> dict[str, float]:
    """Return the scores of ``validation.lm_eval``; none without it. All ranks call this."""
    settings = config.validation
    if not settings.lm_eval:
        return {}
    from bigtrain.run.harness import scores

    tasks, limit = settings.lm_eval, settings.lm_eval_limit
    return scores(engine, config, run, tasks=tasks, directory=settings.lm_eval_tasks, limit=limit)


def write_validation(engine: Engine, stream: SampleStream, config: TrainConfig) -> list[dict[str, str]]:
    """Return source, target and what was written of the first samples, in order, on rank 0; all ranks call this."""
    batch_size, num_wanted = config.train.global_batch_size, config.validation.written_samples
    objective, wanted = build_objective(config.task), Wanted(writing=writing_of(stream.tokenizer_directory, config))
    assert isinstance(objective, Predicts)
    engine.module.eval()
    network, decode = partial(engine.module, predicts=True), wanted.writing.decode
    found: list[tuple[int, dict[str, str]]] = []
    steps = held_out_batches(stream, config, engine, batches=math.ceil(num_wanted / batch_size))
    for number, batch in ((number, batch) for number, micro_batches in enumerate(steps) for batch in micro_batches):
        *inputs, targets = (tensor.to(engine.device) for tensor in batch.values())
        with torch.no_grad():
            written = objective.answers(network, *inputs, wanted=wanted)
        sources: list[dict[str, str]] = [{} for _ in written]
        if "source" in batch:
            texts = zip(batch["source"].tolist(), batch["source_lengths"].tolist(), strict=True)
            sources = [{"source": decode(text[:length])} for text, length in texts]
        found += [
            (number, {**source, "target": decode(target), "written": own["text"]})
            for source, target, own in zip(sources, targets.tolist(), written, strict=True)
            if target[0] != IGNORE_INDEX
        ]
    by_step = sorted((part for rank in gather_json(found) for part in rank), key=lambda part: part[0])
    return [text for _, text in by_step][:num_wanted]


def written_metrics(texts: list[dict[str, str]]) -> dict[str, float]:
    """Return :data:`WRITTEN_METRICS` of what :func:`write_validation` returns on rank 0, on every rank."""
    require("validation.written_samples", "sacrebleu", "metrics")
    import sacrebleu

    metrics = {}
    if texts:
        written, targets = [text["written"] for text in texts], [text["target"] for text in texts]
        exact = sum(one == other for one, other in zip(written, targets, strict=True)) / len(targets)
        bleu = sacrebleu.corpus_bleu(written, [targets], force=True).score
        metrics = {"exact": exact, "bleu": bleu, "chrf": sacrebleu.corpus_chrf(written, [targets]).score}
        words = [[text.split() for text in texts] for texts in (written, targets)]
        metrics |= {
            "rouge_l": rouge_l(written, targets),
            "wer": error_rate(*words),
            "cer": error_rate(written, targets),
        }
    return broadcast_json(metrics)


def writing_of(directory: Path | None, config: TrainConfig) -> Writing:
    """Return how texts end and are read, by the tokenizer in a directory or ``data.tokenizer``; else ids are words."""
    if directory:
        tokenizer, eos_id = load_tokenizer(directory), read_index(directory, check_sizes=False).tokenizer.eos_id
    elif config.data.tokenizer != DataConfig().tokenizer:
        tokenizer, eos_id, *_ = build_tokenizer(config.data, ())
    else:
        from bigtrain.models.hf.build import read_hf_config

        is_hf = config.model.kind is ModelKind.hf
        end = getattr(read_hf_config(config.model.name), "eos_token_id", None) if is_hf else None
        return Writing(-1 if end is None else end, lambda ids: " ".join(map(str, _until(ids, end))))

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(_until(ids, eos_id), skip_special_tokens=True)

    return Writing(eos_id, decode)


def _until(ids: list[int], end: int | None) -> list[int]:
    return list(takewhile(lambda token: token not in (end, IGNORE_INDEX), ids))


def write_classification(
    directory: Path,
    measured: Measured,
    engine: Engine,
    streams: Mapping[str, SampleStream],
    config: TrainConfig,
    *,
    step: int,
) -> None:
    """Write the confusion matrix of a validation, a row per true label, and the images that are wrong.

    All ranks call this. The images are those whose wrong label is the most probable: each with ``label``, what was
    ``predicted``, and ``pixels``, bytes of ``shape`` ``(H, W, C)`` in base64.
    """
    wrong: list[dict[str, Any]] = []
    sets, confusion = sets_of(streams, HELD_OUT), measured.confusion
    for stream in (stream for stream in sets.values() if "image_shape" in stream.facts):
        steps = held_out_batches(stream, config, engine, batches=config.validation.batches)
        for batch in (batch for micro_batches in steps for batch in micro_batches):
            wrong = _surest(wrong + _mistakes_in(engine, batch, stream.facts))
    if gathered := gather_json(wrong):
        names = next((list(stream.label_names) for stream in sets.values()), [])
        facts = {
            "step": step,
            "labels": [*names, *map(str, range(len(names), len(confusion)))],
            "confusion": confusion.astype(int).tolist(),
            "wrong": _surest([mistake for part in gathered for mistake in part]),
        }
        write_anew(directory / CLASSIFICATION_FILE, json.dumps(facts))


def _mistakes_in(engine: Engine, batch: Batch, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    pixels_BCHW, labels_B = batch["pixels"], batch["labels"]
    with torch.no_grad():
        logits_BC = engine.module(pixels_BCHW.to(engine.device), predicts=True).float().cpu()
    probabilities, predicted_B = logits_BC.softmax(dim=-1).max(dim=-1)
    found = []
    for i in torch.nonzero((predicted_B != labels_B) & (labels_B != IGNORE_INDEX)).flatten().tolist():
        picture = visible(pixels_BCHW[i].numpy(), facts)
        mistake = {"label": int(labels_B[i]), "predicted": int(predicted_B[i]), "probability": float(probabilities[i])}
        pixels = base64.b64encode(picture.tobytes()).decode()
        found.append({**mistake, "shape": list(picture.shape), "pixels": pixels})
    return found


def _surest(mistakes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(mistakes, key=lambda m: (-m["probability"], m["pixels"]))[:NUM_MISTAKES]
