"""What a classifier got wrong in its last validation, for the report."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bigtrain.config import TrainConfig
from bigtrain.data.read.batch import Batch
from bigtrain.data.read.images import visible
from bigtrain.data.read.stream import SampleStream
from bigtrain.distributed.collectives import gather_json
from bigtrain.engine.base import Engine
from bigtrain.files import write_anew
from bigtrain.run.data import held_out_batches
from bigtrain.run.sets import HELD_OUT, sets_of
from bigtrain.run.validation import Measured
from bigtrain.tasks.base import IGNORE_INDEX
from bigtrain.telemetry.files import CLASSIFICATION_FILE

MOST_SHOWN = 24


def write_classification(
    directory: Path,
    measured: Measured,
    engine: Engine,
    streams: Mapping[str, SampleStream],
    config: TrainConfig,
    *,
    step: int,
) -> None:
    """Write the confusion matrix of a validation, a row per true label, and the images that are wrong; all ranks call this.

    The images are those whose wrong label is the most probable: each with ``label``, what was ``predicted``, and
    ``pixels``, bytes of ``shape`` ``(H, W, C)`` in base64.
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
            "labels": names or [str(label) for label in range(len(confusion))],
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
        found.append(
            {
                "label": int(labels_B[i]),
                "predicted": int(predicted_B[i]),
                "probability": float(probabilities[i]),
                "shape": list(picture.shape),
                "pixels": base64.b64encode(picture.tobytes()).decode(),
            }
        )
    return found


def _surest(mistakes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(mistakes, key=lambda m: (-m["probability"], m["pixels"]))[:MOST_SHOWN]
