"""What ``task_matrix.py`` runs, each function on ranks of its own by ``small_runs.call``."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

from small_tasks import settings_of

from bigtrain.cli.hydra_cli import read_run
from bigtrain.config import Scored, TrainConfig
from bigtrain.config.score import ScoreConfig
from bigtrain.run import launching
from bigtrain.run.scoring import score_samples

STEPS, SAVED = 6, 4
_SIZES = "num_attention_heads: 4, num_hidden_layers: 2, hidden_size: 32, intermediate_size: 48"
_BERT = f"{_SIZES}, hidden_dropout_prob: 0, attention_probs_dropout_prob: 0"
_T5 = "vocab_size: 97, num_heads: 4, num_layers: 2, d_model: 32, d_kv: 8, d_ff: 48, dropout_rate: 0"
_WAV2VEC2 = (
    f"{_SIZES}, vocab_size: 32, conv_dim: [16, 16], conv_kernel: [10, 3], conv_stride: [5, 2], num_feat_extract_layers: 2,"
    " num_conv_pos_embeddings: 16, num_conv_pos_embedding_groups: 2, feat_extract_norm: layer, do_stable_layer_norm: true,"
    " hidden_dropout: 0, attention_dropout: 0, activation_dropout: 0, feat_proj_dropout: 0, final_dropout: 0"
)
_WHISPER = (
    "vocab_size: 97, d_model: 32, encoder_layers: 2, decoder_layers: 2, encoder_attention_heads: 4,"
    " decoder_attention_heads: 4, encoder_ffn_dim: 48, decoder_ffn_dim: 48, num_mel_bins: 8, max_source_positions: 20,"
    " max_target_positions: 16, pad_token_id: 0, bos_token_id: 1, eos_token_id: 2, decoder_start_token_id: 1, dropout: 0"
)


def _network(architecture: str, settings: str) -> list[str]:
    return ["+model=hf", f"model.architecture={architecture}", f"model.settings={{{settings}}}"]


_DECODER = ["+model=gpt_nano", "model.num_layers=2", "model.hidden_dim=32", "model.num_heads=4", "model.vocab_size=272"]
_LORA = [*_DECODER, "+adapter=lora", "model.adapter.rank=4"]
TASKS: dict[str, tuple[str, list[str]]] = {
    "causal_lm": ("causal_lm", _DECODER),
    "causal_lm (LoRA)": ("causal_lm", _LORA),
    "causal_lm (QLoRA)": ("causal_lm", [*_LORA, "model.adapter.nf4=true"]),
    "preference (DPO, LoRA)": ("preference", _LORA),
    "distillation": ("distillation", _DECODER),
    "masked_lm": ("masked_lm", _network("bert", f"vocab_size: 272, {_BERT}")),
    "classification": ("texts", _network("bert", f"vocab_size: 97, {_BERT}")),
    "token_classification": ("tags", _network("bert", f"vocab_size: 97, {_BERT}")),
    "images (ViT)": ("images", _network("vit", f"image_size: 8, patch_size: 2, {_BERT}")),
    "images (CNN)": (
        "grey",
        [
            *("+model=cnn_mnist", "model.settings.image_size=8", "model.settings.pads=true"),
            *("model.settings.dense_dim=16", "model.settings.channels=[8,8]"),
        ],
    ),
    "regression": ("table", ["+model=mlp_mnist", "model.settings.num_inputs=6", "model.settings.num_outputs=2"]),
    "sequences (LSTM)": ("sequences", ["+model=lstm", "model.settings.hidden_dim=8"]),
    "seq2seq": ("pairs", [*_network("t5", _T5), "optimizer.eps=1e-4"]),
    "ctc": ("ctc", [*_network("wav2vec2", _WAV2VEC2), "optimizer.eps=1e-4"]),
    "speech": ("speech", _network("whisper", _WHISPER)),
}
"""Kind of samples and network by task. T5 and wav2vec2 have gradients as small as Adam's usual eps."""


def configuration(task: str, place: Path, engine: str, name: str) -> TrainConfig:
    """Return the run for the ranks that the environment says."""
    kind, network = TASKS[task]
    world_size = int(os.environ["WORLD_SIZE"])
    shard = next(size for size in (2, world_size) if world_size % size == 0)
    run = [f"engine={engine}", "engine.precision=fp32", f"train.steps={STEPS}", "train.global_batch_size=7"]
    run += [f"engine.dp_shard={shard}"] if engine == "hsdp" else []
    run += ["optimizer.lr=1e-2", "scheduler.warmup_steps=1", "train.log_every_steps=1", "validation.every_steps=2"]
    run += [
        "checkpoint.every_steps=2",
        "checkpoint.asynchronous=false",
        f"run.root={place}/runs",
        f"run.name={_slug(name)}",
    ]
    return read_run([*network, *settings_of(kind, place), *run])


def write_scores(place: Path) -> None:
    """Write what a teacher, of the weights of another seed, says of the samples of distillation."""
    config = configuration("distillation", place, "fsdp", "teacher")
    config.train.seed += 1
    parts = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    score_samples(ScoreConfig(**parts, out=str(config.data.scores), what=Scored.logits, top_k=8))


def whole_run(task: str, place: Path, engine: str, name: str) -> None:
    """Train to the end, from the newest checkpoint on if there is one."""
    launching.run(configuration(task, place, engine, name))


def killed_run(task: str, place: Path, engine: str, name: str) -> None:
    """Train and end by SIGKILL in the step behind the checkpoint of step :data:`SAVED`."""
    build = launching.build_engine

    def build_mortal(*args: Any, **kwargs: Any) -> Any:
        engine = build(*args, **kwargs)
        step, taken = engine.step, 0

        def mortal_step(lr: float) -> Any:
            nonlocal taken
            if taken == SAVED:
                os.kill(os.getpid(), signal.SIGKILL)
            taken += 1
            return step(lr)

        engine.step = mortal_step
        return engine

    launching.build_engine = build_mortal
    launching.run(configuration(task, place, engine, name))


def read_records(place: Path, name: str) -> list[dict[str, Any]]:
    """Return loss, gradient norm, digest and metrics of each step, and the figures of each validation, by step."""
    directory = place / "runs" / _slug(name)
    steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    found = [
        {k: v for k, v in step.items() if k in ("step", "loss", "grad_norm", "data_digest") or k.startswith("train/")}
        for step in steps
    ]
    measured = [event for event in events if event["event"] == "validation"]
    numbers = {event["step"]: {k: v for k, v in event.items() if isinstance(v, int | float)} for event in measured}
    times = ("time", "seconds")
    return found + [{k: v for k, v in row.items() if k not in times} for _, row in sorted(numbers.items())]


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
