"""Columns that ``bigtrain score`` has written, beside the samples of a run: read by its task, or to choose among them."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch.distributed as dist

from bigtrain.config import PERPLEXITIES, TrainConfig, Verify
from bigtrain.data.read.scores import Scores, open_scores
from bigtrain.data.read.stream import SampleStream
from bigtrain.errors import DataError, some
from bigtrain.log import get_logger
from bigtrain.tasks import build_objective
from bigtrain.tasks.scoring import LOG_PROBABILITIES, NUM_TARGETS


def add_scores(config: TrainConfig, name: str, stream: SampleStream) -> None:
    """Give a set of samples the columns of ``data.scores`` that the task reads."""
    if config.data.scores is None:
        return
    wanted = [key for key, field in build_objective(config.task).fields.items() if field.is_optional]
    directory, vocab_size = Path(config.data.scores), config.model.vocab_size
    verify = config.data.verify is Verify.full and (not dist.is_initialized() or dist.get_rank() == 0)
    read = partial(open_scores, directory, name, stream.content, vocab_size=vocab_size, verify=verify)
    low, high = (getattr(config.data, key) for key in PERPLEXITIES)
    if low is None and high is None:
        stream.scored(read(wanted))
    elif name == "train":
        _choose(stream, read((LOG_PROBABILITIES, NUM_TARGETS)), low or 1.0, high or math.inf)


def _choose(stream: SampleStream, scores: Scores, low: float, high: float) -> None:
    """Train on samples within perplexities alone, and say how many others there are."""
    if scores.columns.keys() != {LOG_PROBABILITIES, NUM_TARGETS}:
        raise DataError(f"data.scores: has {some(scores.columns, 2)}; score again, with what=log_probabilities")
    nats = -scores.columns[LOG_PROBABILITIES].astype(np.float64) / np.maximum(scores.columns[NUM_TARGETS], 1)
    perplexities, told = np.exp(nats), f"perplexities from {low:g} to {high:g}"
    least, median, most = np.quantile(perplexities, (0, 0.5, 1))
    left_out = stream.keep((low <= perplexities) & (perplexities <= high), f"{scores.told} {told}")
    what = f"{told} are {stream.num_samples} of {stream.num_samples + left_out} training samples"
    found = f"data.scores: {what}; all are between {least:.4g} and {most:.4g}, half of them below {median:.4g}"
    if not stream.num_samples:
        raise DataError(f"{found}; choose others")
    get_logger().info(found)
