"""Losses of TRL's DPOTrainer on the rows of a run, for ``same_as_trainer.py``."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from small_runs import Recorded, batches, trainer_arguments
from step import forget_lone_rank
from trainer_losses import TOKENS, configuration, with_same_adapters

from bigtrain.config import EngineKind, TrainConfig


def trl_losses(directory: Path) -> list[float]:
    """Train the same pairs, which TRL makes ids of by itself, with its DPOTrainer; return the losses."""
    from trl import DPOConfig, DPOTrainer

    config = configuration(directory, EngineKind.ddp, world_size=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.data.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    rows = list_rows(config, tokenizer)
    forget_lone_rank()

    class Recording(Recorded, DPOTrainer):
        pass

    arguments = DPOConfig(
        **trainer_arguments(config, directory, 2),
        beta=config.task.beta,
        loss_type=[{"dpo": "sigmoid"}.get(config.task.loss.name, config.task.loss.name)],
        max_length=TOKENS + 1,
        bf16=False,
        gradient_checkpointing=False,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "pretrained", dtype=torch.float32)
    model, rows = with_same_adapters(model, config), Dataset.from_list(rows)
    trainer = Recording(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return trainer.step_losses()


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
