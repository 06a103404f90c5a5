"""What ``same_as_trainer.py`` compares, each function called on ranks of its own by ``small_runs.call``."""

import json
import os
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from small_runs import batches, run_config, run_losses, write_models
from torch import Tensor

from bigtrain.config import DataConfig, DataSource, EngineKind, TrainConfig, TrainingConfig
from bigtrain.models.loss import IGNORE_INDEX

STEPS, WORLD_SIZE, BATCH, TOKENS = 20, 2, 8, 32
NUM_TEXTS = 400


def prepare(family: str, directory: Path) -> None:
    """Write ``pretrained/`` and ``text.jsonl``."""
    write_models(family, {}, directory)
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshr", k=draw.randint(2, 7))) for _ in range(50)]
    texts = (" ".join(draw.choices(words, k=draw.randint(5, 40))) for _ in range(NUM_TEXTS))
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def our_losses(directory: Path, engine: EngineKind) -> list[float]:
    """Return the losses of a run."""
    return run_losses(configuration(directory, engine, world_size=WORLD_SIZE))


def trainer_losses(directory: Path) -> list[float]:
    """Train the same samples with transformers' Trainer; return the losses."""
    config = configuration(directory, EngineKind.ddp, world_size=1)
    samples = list_samples(config)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]  # Trainer would make a process group
    losses: list[float] = []

    class Recording(transformers.Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)  # the micro-batch's share of the step's loss
            losses.append(loss.item())
            return loss

        def _get_train_sampler(self, *_args: Any) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(samples)

    settings = config.optimizer
    arguments = transformers.TrainingArguments(
        output_dir=str(directory / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // 2,
        gradient_accumulation_steps=2,
        learning_rate=settings.lr,
        lr_scheduler_type="constant",
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_epsilon=settings.eps,
        max_grad_norm=settings.grad_clip,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "pretrained", dtype=torch.float32)
    Recording(model=model, args=arguments, train_dataset=samples).train()
    return [first + second for first, second in zip(losses[::2], losses[1::2], strict=True)]


def list_samples(config: TrainConfig) -> list[dict[str, Tensor]]:
    """Return the samples of a run in their order, as Trainer wants them: with labels that it shifts by itself."""
    samples = []
    for batch in batches(config):
        for tokens_T, targets_T in zip(batch.tokens, batch.targets, strict=True):
            # The last target is the input of no position; a causal model's logits do not change with it.
            last = targets_T[-1:].clamp(min=0)
            labels = torch.cat([torch.tensor([IGNORE_INDEX]), targets_T])
            samples.append({"input_ids": torch.cat([tokens_T, last]), "labels": labels})
    return samples


def configuration(directory: Path, engine: EngineKind, *, world_size: int) -> TrainConfig:
    """Return the checked configuration of a run.

    Raises:
        ConfigError: listing every problem.
    """
    data = DataConfig(
        source=DataSource.jsonl,
        path=str(directory / "text.jsonl"),
        tokenizer="bytes",
        sequence_length=TOKENS,
        root=str(directory / "data"),
    )
    train = TrainingConfig(steps=STEPS, global_batch_size=BATCH)
    return run_config(directory, "pretrained", engine, data, train, world_size=world_size)
