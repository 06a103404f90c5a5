"""Losses of TRL's DPOTrainer on the rows of a run, for ``same_as_trainer.py``."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from small_runs import batches
from torch import Tensor
from trainer_losses import BATCH, STEPS, TOKENS, configuration, with_same_adapters

from bigtrain.config import EngineKind, TrainConfig


def trl_losses(directory: Path) -> list[float]:
    """Train the same pairs, which TRL makes ids of by itself, with its DPOTrainer; return the losses."""
    from trl import DPOConfig, DPOTrainer

    config = configuration(directory, EngineKind.ddp, world_size=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.data.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    rows = list_rows(config, tokenizer)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]  # Trainer would make a process group
    losses: list[float] = []

    class Recording(DPOTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)  # the micro-batch's share of the step's loss
            losses.append(loss.item())
            return loss

        def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
            return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

        def _get_train_sampler(self, *_args: Any) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(rows)

    settings = config.optimizer
    arguments = DPOConfig(
        output_dir=str(directory / "trl"),
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
        beta=config.task.beta,
        loss_type=[{"dpo": "sigmoid"}.get(config.task.loss.name, config.task.loss.name)],
        max_length=TOKENS + 1,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "pretrained", dtype=torch.float32)
    model = with_same_adapters(model, config)
    dataset = Dataset.from_list(rows)
    Recording(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer).train()
    return [first + second for first, second in zip(losses[::2], losses[1::2], strict=True)]


def list_rows(config: TrainConfig, tokenizer: Any) -> list[dict[str, Any]]:
    """Return the rows of the file in the run's order, found by the ids of their chosen answers."""
    rows = [json.loads(line) for line in Path(config.data.path).read_text().splitlines()]
    chats = (tokenizer.apply_chat_template(row["prompt"] + row["chosen"], return_dict=False) for row in rows)
    by_ids = {tuple(ids[: TOKENS + 1]): row for ids, row in zip(chats, rows, strict=True)}
    found = []
    for batch in batches(config):
        for ids, targets in zip(batch["chosen"].tolist(), batch["chosen_targets"].tolist(), strict=True):
            length = max(place for place, target in enumerate(targets) if target >= 0) + 1
            found.append(by_ids[*ids[:length], targets[length - 1]])
    return found
