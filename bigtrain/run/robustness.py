"""How many images are still told right when each pixel is moved against its label."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from bigtrain.config import TrainConfig
from bigtrain.data.read.batch import Batch
from bigtrain.data.read.stream import SampleStream
from bigtrain.engine.base import Engine
from bigtrain.run.data import held_out_batches
from bigtrain.tasks.base import IGNORE_INDEX


def fgsm_accuracy(engine: Engine, sets: Mapping[str, SampleStream], config: TrainConfig) -> dict[str, float]:
    """Return ``fgsm_<size>/accuracy`` for each of ``validation.fgsm``, over all sets; all ranks call this.

    The fast gradient sign method (Goodfellow et al., "Explaining and Harnessing Adversarial Examples", 2015): a step of
    that size, for pixels from 0 to 1, along the sign of the gradient of the loss, cut to what pixels can be.
    """
    sizes = config.validation.fgsm
    if not sizes:
        return {}
    right = torch.zeros(1 + len(sizes), dtype=torch.float64)
    for stream in sets.values():
        for step in held_out_batches(stream, config, engine, batches=config.validation.batches):
            for batch in step:
                right += _right(engine, batch.to(engine.device), sizes, stream.facts)
    count, *found = engine.mesh.total(right).tolist()
    return {f"fgsm_{size:g}/accuracy": number / count for size, number in zip(sizes, found, strict=True) if count}


def _right(engine: Engine, batch: Batch, sizes: list[float], facts: Mapping[str, Any]) -> torch.Tensor:
    """Return how many samples count, and how many are right after a step of each size: fp64 ``(1 + sizes,)``."""
    labels_B, pixels_BCHW = batch["labels"], batch["pixels"].detach().requires_grad_()
    # Without what wraps it for training: a reducer would wait for the gradients of the weights.
    engine.module.eval()
    module: Any = getattr(engine.module, "module", engine.module)
    with torch.enable_grad(), engine.autocast():
        logits_BC = module(pixels_BCHW, predicts=True).float()
        loss = F.cross_entropy(logits_BC, labels_B, ignore_index=IGNORE_INDEX, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, pixels_BCHW)
    mean, deviation = (pixels_BCHW.new_tensor(facts[name]).view(1, -1, 1, 1) for name in ("mean", "deviation"))
    counted = [(labels_B != IGNORE_INDEX).sum()]
    for size in sizes:
        moved = (pixels_BCHW.detach() * deviation + mean + 255 * size * gradient.sign()).clamp(0, 255)
        with torch.no_grad(), engine.autocast():
            predicted_B = module((moved - mean) / deviation, predicts=True).argmax(dim=1)
        counted.append((predicted_B == labels_B).sum())
    return torch.stack(counted).double().cpu()
