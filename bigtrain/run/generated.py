"""What a generator makes: images from the same noise at every validation, and how far they are from real ones."""

import base64
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bigtrain.config import TaskKind, TrainConfig
from bigtrain.data.read.stream import SampleStream
from bigtrain.engine.base import Engine
from bigtrain.engine.state import MODEL
from bigtrain.errors import ConfigError, of_all_ranks
from bigtrain.files import read_json, write_anew
from bigtrain.models import build_model
from bigtrain.models.adapters import plain_name
from bigtrain.run.data import held_out_batches
from bigtrain.run.directory import FACTS_FILE, find_whole, read_config
from bigtrain.run.frozen import WeightReader
from bigtrain.tasks.base import IGNORE_INDEX
from bigtrain.tasks.gan import FOR_PICTURES, HALF, frechet_distance, moments, normal_noise
from bigtrain.telemetry.files import IMAGES_FILE

SIDE = 8  # images in a row and in a column of a picture
MOST_PICTURES = 16


@torch.no_grad()
def keep_images(engine: Engine, config: TrainConfig, run: Path, *, step: int) -> None:
    """Keep a picture of what ``task=gan`` makes of noise that is the same at every step; all ranks call this."""
    if config.task.kind != TaskKind.gan:
        return
    noise = normal_noise(np.arange(SIDE * SIDE), config.task.noise_dim, config.train.seed, FOR_PICTURES)
    engine.module.eval()
    with engine.autocast():
        images = engine.module(torch.from_numpy(noise).to(engine.device), predicts=True).float().cpu()
    if engine.mesh.rank != 0:
        return
    picture = tiled(images.numpy())
    pixels = base64.b64encode(picture.tobytes()).decode()
    before = [other for other in read_json(run / IMAGES_FILE).get("pictures", []) if other["step"] < step]
    before = before if len(before) < MOST_PICTURES else before[::2]
    new = {"step": step, "shape": list(picture.shape), "pixels": pixels}
    write_anew(run / IMAGES_FILE, json.dumps({"pictures": [*before, new]}))


def tiled(images_NCHW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return square images from -1 to 1, :data:`SIDE` a row, as one picture ``(H, W, C)`` with lines between them."""
    bytes_NCHW = np.round((images_NCHW + 1) * HALF).clip(0, 255).astype(np.uint8)
    framed = np.pad(bytes_NCHW, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=128)
    rows = framed.reshape(-1, SIDE, *framed.shape[1:])
    return np.ascontiguousarray(rows.transpose(0, 3, 1, 4, 2).reshape(len(rows) * framed.shape[2], -1, framed.shape[1]))


@torch.no_grad()
def frechet(engine: Engine, sets: Iterable[SampleStream], config: TrainConfig, *, batches: int | None) -> float:
    """Return the Fréchet distance of made images from real ones, by the features of ``validation.frechet``.

    Features are what the last layer of that classifier gets. All ranks call this, and get the same at any world size.
    ConfigError: the run is no classifier of images of this shape. CheckpointError: it has no whole checkpoint.
    """
    features_of, totals = _features(Path(str(config.validation.frechet)), engine.device), None
    engine.module.eval()
    for stream in sets:
        number = batches or -(-stream.num_samples // config.train.global_batch_size)
        for micro_batches in held_out_batches(stream, config, engine, batches=number):
            for batch in (micro_batch.to(engine.device) for micro_batch in micro_batches):
                with engine.autocast():
                    fakes = engine.module(batch["noise"], predicts=True).float()
                counts = batch["labels"] != IGNORE_INDEX
                sums = torch.stack([moments(features_of(images)[counts]) for images in (batch["pixels"], fakes)])
                totals = sums if totals is None else totals + sums
    return frechet_distance(*engine.mesh.total(totals).cpu())


def open_classifier(run: Path) -> tuple[TrainConfig, Path, dict[str, Any]]:
    """Return configuration, checkpoint and facts of the data of a classifier of images; raises as :func:`frechet`."""
    directory, checkpoint = find_whole(run)
    config, facts = read_config(directory), read_json(directory / FACTS_FILE)
    if config.task.kind != TaskKind.classification or "image_shape" not in facts:
        problem = f"validation.frechet={run}: must be a run of task=classification on data=images"
        raise of_all_ranks(ConfigError(problem))
    return config, checkpoint, facts


def _features(run: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return what the last linear layer of a classifier gets for images from -1 to 1: ``(N, C, H, W)`` to ``(N, D)``."""
    config, checkpoint, facts = open_classifier(run)
    network, reader = build_model(config.model).eval().to(device), WeightReader(checkpoint)
    for name, parameter in network.named_parameters():
        parameter.copy_(reader.read(MODEL + plain_name(name)))
    seen: list[Tensor] = []
    *_, last = (module for module in network.modules() if isinstance(module, nn.Linear))
    last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    mean, deviation = (torch.tensor(facts[name], device=device).view(-1, 1, 1) for name in ("mean", "deviation"))
    height, width, channels = facts["image_shape"]

    def features(images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != (channels, height, width):
            problem = f"its images are {(channels, height, width)}, these {tuple(images.shape[1:])}"
            raise of_all_ranks(ConfigError(f"validation.frechet={run}: {problem}"))
        network(((images + 1) * HALF - mean) / deviation)
        return seen.pop().flatten(1)

    return features
