"""What ``tasks.py`` compares: runs of bigtrain and of transformers' Trainer, each function on ranks of its own."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trainer_losses
import transformers
from small_runs import InOrder, Recorded, batches, trainer_arguments
from small_tasks import settings_of, write_samples
from step import forget_lone_rank, pace
from torch import Tensor
from turns import Pacer

from bigtrain.cli.hydra_cli import read_run
from bigtrain.config import EngineKind, TrainConfig
from bigtrain.config.tasks import head_of
from bigtrain.models.hf.heads import HEADS
from bigtrain.run import launching

STEPS, BATCH, WORLD_SIZE = 20, 8, 2
_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True, slots=True)
class Case:
    """A network of transformers, from scratch, and what it is trained on."""

    samples: str
    """Kind of them: see ``small_tasks.py``."""
    architecture: str
    small: dict[str, Any]
    """Settings of a network of some ten thousand parameters."""
    larger: dict[str, Any] | None = None
    """Those of one whose step takes a sizeable part of a second, on larger samples."""
    settings: tuple[str, ...] = ()
    """Of the run, besides."""


_SMALL = {"vocab_size": 288, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **_BERT}
_SMALL |= {"intermediate_size": 48}
_LARGER = {"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, **_BERT}
_LARGER |= {"intermediate_size": 1024}
_LLAMA = {"num_attention_heads": 4, "max_position_embeddings": 256}
_T5 = {"dropout_rate": 0.0, "decoder_start_token_id": 0}
CASES = {
    "BERT, masked LM": Case("masked_lm", "bert", _SMALL, _LARGER),
    "BERT, classification": Case("texts", "bert", _SMALL),
    "BERT, token classification": Case("tags", "bert", _SMALL),
    "T5, sequence to sequence": Case(
        "pairs",
        "t5",
        {"vocab_size": 97, "num_heads": 4, "num_layers": 2, "d_model": 32, "d_kv": 8, "d_ff": 48, **_T5},
        {"vocab_size": 8192, "num_heads": 4, "num_layers": 3, "d_model": 256, "d_kv": 64, "d_ff": 1024, **_T5},
    ),
    "Llama with LoRA, next token": Case(
        "causal_lm",
        "llama",
        {"vocab_size": 288, **_LLAMA, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        {"vocab_size": 8192, **_LLAMA, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4},
        settings=("+adapter=lora", "model.adapter.rank=8"),
    ),
    "ViT, images": Case(
        "images", "vit", {**_SMALL, "image_size": 8, "patch_size": 2}, {**_LARGER, "image_size": 32, "patch_size": 4}
    ),
}
THEIR_NAMES = {
    "tokens": "input_ids",
    "source": "input_ids",
    "pixels": "pixel_values",
    "targets": "labels",
    "labels": "labels",
}
"""Arguments of transformers' networks by column; the tokens of a decoder, and lengths, are others."""


def prepare(case: str, directory: Path, *, larger: bool = False) -> None:
    """Write samples and, in ``network/``, the weights that both sides begin with."""
    what = CASES[case]
    if larger:
        write_larger(what.samples, directory)
    else:
        write_samples(directory)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(what.architecture, **(what.larger if larger else what.small))
    config.num_labels = {"texts": 3, "tags": 5, "images": 10}.get(what.samples, 2)
    config.save_pretrained(directory / "network")  # of which the run's configuration wants to know the sizes
    their_class(configuration(case, directory, "model.pretrained=false")).from_config(config).save_pretrained(
        directory / "network"
    )


def write_larger(samples: str, directory: Path) -> None:
    """Write samples of 128 tokens, or images of 32x32."""
    random, size = np.random.default_rng(0), (640, 128)
    tokens = random.integers(300, 8192, size)
    lengths = random.integers(32, 129, size[0])
    columns = {
        "pairs": {
            "source": tokens,
            "source_lengths": lengths,
            "tokens": np.roll(tokens, 1, axis=1),
            "targets": np.where(np.arange(size[1]) < lengths[:, None], tokens, -100),
        },
        "images": {"pixels": random.random((640, 3, 32, 32), dtype=np.float32), "labels": np.arange(640) % 10},
    }
    if samples in columns:
        np.savez(directory / f"{samples}.npz", **columns[samples])
    else:
        (directory / "text.txt").write_text("\n".join(f"word{n % 977} {n}" for n in range(60_000)))


def configuration(case: str, directory: Path, *args: str, larger: bool = False, world_size: int = 1) -> TrainConfig:
    """Return the run, in fp32 at a constant rate."""
    model = ["+model=hf", f"model.name={directory}/network", "model.pretrained=true"]
    length = ["data.sequence_length=128"] if larger and CASES[case].samples != "images" else []
    run = [f"train.steps={STEPS}", f"train.global_batch_size={BATCH}", "engine.precision=fp32", "optimizer.lr=1e-3"]
    run += [
        "scheduler=constant",
        "scheduler.warmup_steps=0",
        f"run.root={directory}/runs",
        "checkpoint.asynchronous=false",
    ]
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    case_settings = [*settings_of(CASES[case].samples, directory), *CASES[case].settings]
    return read_run([*model, *case_settings, *length, *run, *args])


def their_class(config: TrainConfig) -> Any:
    """Return the class of transformers that finds the network of a task."""
    return getattr(transformers, HEADS[head_of(config.task)].auto)


# Ours


def our_losses(case: str, directory: Path, engine: EngineKind) -> list[float]:
    """Return the losses of a run on :data:`WORLD_SIZE` ranks, in micro-batches of 2."""
    config = configuration(
        case, directory, f"engine={engine.name}", "train.micro_batch_size=2", "run.name=ours", world_size=WORLD_SIZE
    )
    launching.run(config)
    lines = (config.run.directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def our_turns(case: str, directory: Path, args: list[str], pacer: Pacer) -> None:
    """Train as ``launch/train.py`` does, in turns."""
    build = launching.build_engine

    def build_paced(*args: Any, **kwargs: Any) -> Any:
        engine = build(*args, **kwargs)
        pace(engine, pacer)
        pacer.begin()
        return engine

    launching.build_engine = build_paced
    launching.run(
        configuration(
            case,
            directory,
            *args,
            "supervision.hang_seconds=36000",
            "supervision.first_hang_seconds=36000",
            larger=True,
        )
    )


# Theirs


def their_losses(case: str, directory: Path, num_micro_batches: int) -> list[float]:
    """Train the same samples by transformers' Trainer; return what it takes for the loss of each step."""
    config = configuration(case, directory, f"train.micro_batch_size={BATCH}", "engine=ddp", "run.name=theirs")

    class Recording(Recorded, transformers.Trainer):
        pass

    return fit(Recording, config, directory, num_micro_batches).step_losses()


def their_turns(case: str, directory: Path, args: list[str], pacer: Pacer) -> None:
    """Train by transformers' Trainer, in turns."""
    config = configuration(case, directory, *args, larger=True)

    class Told(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            pacer.step_done()

    fit(Plain, config, directory, 1, callbacks=[Told()], begin=pacer.begin)


class Plain(InOrder, transformers.Trainer):
    """Transformers' Trainer on the samples of a run."""


def fit(
    kind: Any,
    config: TrainConfig,
    directory: Path,
    num_micro_batches: int,
    *,
    callbacks: list[transformers.TrainerCallback] | None = None,
    begin: Any = None,
) -> Any:
    """Train transformers' own network on the samples of a run, in their order; return the Trainer."""
    samples = (trainer_losses.list_samples if config.model.adapter else list_samples)(config)
    forget_lone_rank()
    arguments = transformers.TrainingArguments(**trainer_arguments(config, directory, num_micro_batches))
    network = their_class(config).from_pretrained(directory / "network", dtype=torch.float32)
    if config.model.adapter:
        network = trainer_losses.with_same_adapters(network, config)
    trained = kind(model=network, args=arguments, train_dataset=samples, callbacks=callbacks)
    if begin:
        begin()
    trained.train()
    return trained


def list_samples(config: TrainConfig) -> list[dict[str, Tensor]]:
    """Return the samples of the run in their order, with the names of transformers' arguments."""
    samples = []
    for batch in batches(config):
        given = dict(batch.items())
        columns: dict[str, Tensor] = {}
        if "source" in given:
            columns["decoder_input_ids"] = given.pop("tokens")
        for name, of in (("lengths", "tokens"), ("source_lengths", "source")):
            if name in given:
                columns["attention_mask"] = (torch.arange(given[of].shape[1]) < given.pop(name)[:, None]).long()
        columns |= {THEIR_NAMES[name]: tensor for name, tensor in given.items()}
        rows = zip(*columns.values(), strict=True)
        samples += [dict(zip(columns, row, strict=True)) for row in rows]
    return samples
