"""Losses of TRL's trainers on the rows of a run, for ``same_as_trainer.py``."""

import itertools
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from small_runs import Recorded, batches, trainer_arguments
from step import forget_lone_rank
from torch import Tensor
from trainer_losses import PACKED, TOKENS, configuration, with_same_adapters

from bigtrain.config import EngineKind, TrainConfig


def trl_losses(directory: Path) -> list[float]:
    """Train the same pairs or rated answers, which TRL makes ids of by itself, with its trainer; return the losses.

    The first term of ORPO is the mean log-probability of the chosen answer, as in its paper (Hong et al. 2024, eq. 6);
    TRL's own is a mean over all tokens of a micro-batch, those of prompts too. For KTO each prompt has the answer of
    another one that ours has, in place of one of its micro-batch; that is the whole step, unless the loss says otherwise.
    """
    loss = (directory / "loss").read_text()
    settings: dict[str, Any] = {}
    if loss == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    elif loss.startswith("kto"):
        from trl import KTOConfig as Config
        from trl import KTOTrainer as Trainer

        settings["train_sampling_strategy"] = "sequential"
    else:
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer

        settings["loss_type"] = [{"dpo": "sigmoid"}.get(loss, loss)]

    config = configuration(directory, EngineKind.ddp, world_size=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.data.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    rows = list_rows(config, tokenizer)
    forget_lone_rank()

    class Recording(Recorded, Trainer):
        pass

    class OfPaper(Recording):
        def concatenated_forward(self, *args: Any) -> tuple[Tensor, ...]:
            found = super().concatenated_forward(*args)
            return (*found[:4], -found[0].mean())

    arguments = Config(
        **trainer_arguments(config, directory, 1 if loss == "kto" else 2),
        beta=config.task.beta,
        max_length=TOKENS + 1,
        bf16=False,
        gradient_checkpointing=False,
        **settings,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "pretrained", dtype=torch.float32)
    model, rows = with_same_adapters(model, config), Dataset.from_list(rows)
    kind = OfPaper if loss == "orpo" else Recording
    trainer = kind(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    if loss.startswith("kto"):
        others = [ids for batch in batches(config) for ids in batch["rejected_targets"].tolist()]
        completions = [[token for token in ids if token >= 0] for ids in others]
        prepared = trainer.train_dataset.remove_columns("KL_completion_ids")
        trainer.train_dataset = prepared.add_column("KL_completion_ids", completions)
    trainer.train()
    return trainer.step_losses()


def sft_losses(directory: Path) -> list[float]:
    """Train the same chats, which TRL makes ids and labels of by itself, with its SFTTrainer; return the losses.

    Every document of ours begins with the token that ends one, so the template is given it. Chats that share a sample
    are put together as ours are, and kept apart as TRL does, by positions.
    """
    from trl import SFTConfig, SFTTrainer

    config = configuration(directory, EngineKind.ddp, world_size=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.data.tokenizer)
    tokenizer.pad_token, is_packed = tokenizer.eos_token, (directory / PACKED).exists()
    samples = list_chats(config, tokenizer)
    tokenizer.chat_template = tokenizer.eos_token + tokenizer.chat_template
    forget_lone_rank()

    class Recording(Recorded, SFTTrainer):
        pass

    def trainer(rows: list[dict[str, Any]], **settings: Any) -> Recording:
        arguments = SFTConfig(
            **trainer_arguments(config, directory, 2),
            max_length=TOKENS + 1,
            shuffle_dataset=False,
            bf16=False,
            gradient_checkpointing=False,
            **settings,
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(directory / "pretrained", dtype=torch.float32)
        dataset = Dataset.from_list(rows)
        return Recording(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)

    training = trainer([row for rows in samples for row in rows], assistant_only_loss=True)
    if is_packed:
        prepared = iter(training.train_dataset)
        packed = [[next(prepared) for _ in rows] for rows in samples]
        rows = [
            {name: [number for chat in chats for number in chat[name]] for name in ("input_ids", "labels")}
            | {"seq_lengths": [len(chat["input_ids"]) for chat in chats]}
            for chats in packed
        ]
        training = trainer(rows, packing=True, dataset_kwargs={"skip_prepare_dataset": True})
    training.train()
    return training.step_losses()


def list_chats(config: TrainConfig, tokenizer: Any) -> list[list[dict[str, Any]]]:
    """Return the rows of the file in each sample of the run, found by their ids."""
    rows = [json.loads(line) for line in Path(config.data.path).read_text().splitlines()]
    by_ids = {tuple(tokenizer.apply_chat_template(row["messages"], return_dict=False)): row for row in rows}
    return [
        [by_ids[ids] for ids in chats_of(tokens, positions, set(by_ids))]
        for batch in batches(config)
        for tokens, positions in zip(batch["tokens"], given_positions(batch), strict=True)
    ]


def given_positions(batch: Any) -> Tensor:
    """Return the positions of a batch, of which each sample is otherwise one document."""
    return (
        batch["positions"] if "positions" in dict(batch.items()) else torch.arange(TOKENS).expand(batch["tokens"].shape)
    )


def chats_of(tokens: Tensor, positions: Tensor, known: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the ids of the chats in a sample, each behind the token that opens it; what is left is padding."""
    begins = [*torch.nonzero(positions == 0).flatten().tolist(), len(tokens)]
    found = []
    for begin, end in itertools.pairwise(begins):
        ids = tuple(tokens[begin + 1 : end].tolist())
        found += [chat for length in range(len(ids), 0, -1) if (chat := ids[:length]) in known][:1]
    return found


def list_rows(config: TrainConfig, tokenizer: Any) -> list[dict[str, Any]]:
    """Return the rows of the file in the run's order, found by the ids of their chosen or only answers."""
    rows = [json.loads(line) for line in Path(config.data.path).read_text().splitlines()]
    answers = [row["prompt"] + row.get("chosen", row.get("completion")) for row in rows]
    chats = (tokenizer.apply_chat_template(messages, return_dict=False) for messages in answers)
    by_ids = {tuple(ids[: TOKENS + 1]): row for ids, row in zip(chats, rows, strict=True)}
    found = []
    for batch in batches(config):
        for ids, targets in zip(batch["chosen"].tolist(), batch["chosen_targets"].tolist(), strict=True):
            length = max(place for place, target in enumerate(targets) if target >= 0) + 1
            found.append(by_ids[*ids[:length], targets[length - 1]])
    return found
