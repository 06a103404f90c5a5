"""``task.class_weights=balanced``: weights that follow from how often the training side has each label."""

import dataclasses

import numpy as np

from bigtrain.config import TaskConfig, TrainConfig
from bigtrain.config.tasks import BALANCED
from bigtrain.data.read.stream import SampleStream, StoredSamples
from bigtrain.distributed.collectives import on_rank0
from bigtrain.log import get_logger
from bigtrain.tasks.base import IGNORE_INDEX


def with_class_weights(config: TrainConfig, train: SampleStream) -> TrainConfig:
    """Return ``config`` with the numbers that balanced weights are for these samples; all ranks call this."""
    if config.task.class_weights != BALANCED:
        return config
    weights = on_rank0(lambda: balanced_weights(train, config.task))
    get_logger().info(f"task.class_weights={BALANCED}: {', '.join(f'{weight:.4g}' for weight in weights)}")
    return dataclasses.replace(config, task=dataclasses.replace(config.task, class_weights=weights))


def balanced_weights(train: SampleStream, task: TaskConfig) -> list[float]:
    """Return the weight of each label, 1 of one that does not occur.

    One label per sample: ``samples / (labels that occur * samples with the label)``, as scikit-learn has it. Several:
    samples without the label by samples with it, ``pos_weight`` of torch.
    """
    parts = [part.labels() for part in train.components.values() if isinstance(part, StoredSamples)]
    labels = np.concatenate(parts)
    if task.multi_label:
        present, others = (labels == 1).sum(axis=0), (labels == 0).sum(axis=0)
    else:
        present = np.bincount(labels[labels != IGNORE_INDEX], minlength=task.num_labels)
        others = present.sum() / np.count_nonzero(present)
    return np.where(present > 0, others / np.maximum(present, 1), 1.0).tolist()
