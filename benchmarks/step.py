"""Tokens per second and peak memory of the trainer and its peers: ``python benchmarks/step.py --ranks 2``.

    python benchmarks/step.py
    python benchmarks/step.py --model gpt2_124m --sequence-length 2048 --batch 16 --compile

All train the same Transformer from the same weights on the same batches, with fused AdamW, clipping and a look at the
loss every ten steps; the script fails if their losses part. Each is in processes of its own and all take turns on
this machine. Ours is ``trainer.train`` itself. Peers get our module, so that what differs is the trainer, and
once more as people use them: nanoGPT's kind of model and loop, and HF Trainer with GPT-2 of transformers.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import turns
import yaml
from overhead import bare_loop, bare_optimizer, fill, make_model, make_values, silence
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from turns import Measured, Pacer

from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.store import RunState
from bigtrain.config import (
    DataConfig,
    DataSource,
    EngineConfig,
    EngineKind,
    ModelConfig,
    Precision,
    RunConfig,
    SchedulerConfig,
    SchedulerKind,
    TrainConfig,
    TrainingConfig,
)
from bigtrain.config.check import check, resolve
from bigtrain.config.convert import from_dict
from bigtrain.data.order.cursor import Cursor
from bigtrain.data.read.batch import Batch
from bigtrain.distributed.collectives import init_process_group, pick_device, shut_down
from bigtrain.engine.build import build_engine
from bigtrain.engine.wrap import wrap_blocks
from bigtrain.models.flops import flops_per_token
from bigtrain.models.hf.native import hf_config, hf_tensors
from bigtrain.models.sizes import model_sizes
from bigtrain.processes import RankInfo
from bigtrain.run import launching, trainer
from bigtrain.run.data import open_data
from bigtrain.run.recovery import Start, fill_state
from bigtrain.supervise.launch import Launch
from bigtrain.tasks.base import TaskModel
from bigtrain.tasks.causal_lm import CausalLM
from bigtrain.telemetry.files import METRICS_FILE

PRESETS = sorted(path.stem for path in (turns.REPOSITORY / "configs/model").glob("*.yaml") if path.stem != "hf")
SMALL = ModelConfig(name="gpt_30m", vocab_size=8192, num_layers=8, hidden_dim=512, num_heads=8, max_positions=256)
"""29.5 million parameters: a step takes about a second on two cores."""
LOG_EVERY_STEPS = 10
TOLERANCES = {"fp32": 1e-4}
"""Relative difference of losses that still is the same work; in lower precision :data:`LOW_PRECISION`."""
LOW_PRECISION = 2e-2


class Unsaved(Saver):
    """Saves nothing: the checkpoint at the end of a run is no part of its steps, and needs room on a disk."""

    def save(self, run_state: RunState) -> None:
        pass

    def _check_room(self) -> None:
        pass


def ours(config: TrainConfig, pacer: Pacer) -> float | None:
    """``trainer.train``, with all that it does between steps."""
    info = RankInfo.from_env()
    device = pick_device(info)
    init_process_group(info, device, timeout_seconds=turns.PATIENCE_SECONDS)
    engine = build_engine(config, lambda: make_model(config), info=info, device=device)
    fill_state(config, engine, Start(), info)
    pace(engine, pacer)
    directory, streams = Path(config.run.root) / str(config.run.name), open_data(config)
    run = trainer.Run(
        config=config,
        launch=Launch(directory, info.rank, config.supervision),
        engine=engine,
        streams=streams,
        recorder=launching.open_recorder(config, 0, engine, streams["train"]),
        saver=Unsaved(directory, engine.state.entries, config.checkpoint),
        start=Cursor(),
    )
    pacer.begin()
    with silence(), run.recorder:
        trainer.train(run)
    shut_down()
    return last_loss(directory) if info.rank == 0 else None


def pace(engine: Any, pacer: Pacer) -> None:
    """Let an engine tell of its steps."""
    step = engine.step

    def paced_step(lr: float) -> torch.Tensor:
        norm = step(lr)
        pacer.step_done()
        return norm

    engine.step = paced_step


def last_loss(directory: Path) -> float:
    """Return what the run's own record says."""
    return json.loads((directory / METRICS_FILE).read_text().splitlines()[-1])["loss"]


def bare(config: TrainConfig, pacer: Pacer) -> float:
    """Our model and the same engine in a loop written by hand."""
    info = RankInfo.from_env()
    device = pick_device(info)
    init_process_group(info, device, timeout_seconds=turns.PATIENCE_SECONDS)
    return plain_loop(config, bare_loop(config, info, device, make_values(config)), device, pacer)


def nanogpt(config: TrainConfig, pacer: Pacer) -> float:
    """Model and loop as nanoGPT has them: autocast, the whole model compiled, all logits at once."""
    info = RankInfo.from_env()
    device = pick_device(info)
    init_process_group(info, device, timeout_seconds=turns.PATIENCE_SECONDS)
    with torch.device(device):
        model = PlainGPT(config.model)
    fill(model, make_values(config))
    optimizer, bf16 = bare_optimizer(config, model), config.engine.precision is Precision.bf16
    compiled = torch.compile(model) if config.engine.compile else model
    if info.world_size > 1:
        compiled = DistributedDataParallel(compiled)

    def step(batch: Batch) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = compiled(batch["tokens"], batch["targets"])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return plain_loop(config, step, device, pacer)


def plain_loop(config: TrainConfig, step: Callable[[Batch], torch.Tensor], device: torch.device, pacer: Pacer) -> float:
    rows, rank, size = Rows(config), dist.get_rank(), config.train.micro_batch_size
    pacer.begin()
    for number in range(config.train.steps):
        first = number * config.train.global_batch_size + rank * size
        loss = step(rows.batch(slice(first, first + size)).to(device))
        if (number + 1) % LOG_EVERY_STEPS == 0:
            loss.item()
        pacer.step_done()
    shut_down()
    return loss.item()


class Rows(torch.utils.data.Dataset):
    """The samples of the run in the order of its steps, in memory."""

    def __init__(self, config: TrainConfig) -> None:
        stream = open_data(config)["train"]
        samples = stream.gather(stream.ids(0, config.train.steps * config.train.global_batch_size))
        self.samples = samples.pin_memory() if torch.cuda.is_available() else samples

    def batch(self, part: slice) -> Batch:
        return Batch({name: tensor[part] for name, tensor in self.samples.items()})

    def __len__(self) -> int:
        return len(self.samples["tokens"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.samples["tokens"][index], "labels": self.samples["targets"][index]}

    def loader(self, config: TrainConfig, **settings: Any) -> Any:
        size, on_gpu = config.train.micro_batch_size, torch.cuda.is_available()
        return torch.utils.data.DataLoader(self, batch_size=size, pin_memory=on_gpu, **settings)


class MeanLoss(nn.Module):
    """Our model as peers call theirs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.model(input_ids, labels) / labels.numel()}


def our_model(config: TrainConfig) -> MeanLoss:
    """Return our model for a peer, compiled block by block, as suits it best."""
    model = make_model(config)
    fill(model, make_values(config))
    wrap_blocks(TaskModel(model, CausalLM()), config.engine)
    return MeanLoss(model)


class PlainBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner = config.hidden_dim, config.ffn_dim
        self.num_heads = config.num_heads
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width)})
        self.feed_forward = nn.ModuleDict({"up": nn.Linear(width, inner), "down": nn.Linear(inner, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.attention["qkv"](self.attention_norm(x)).split(x.shape[-1], dim=2)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.attention["out"](y)
        up = self.feed_forward["up"](self.feed_forward_norm(x))
        return x + self.feed_forward["down"](F.gelu(up, approximate="tanh"))


class PlainGPT(nn.Module):
    """GPT-2 as one would write it in an hour, with the names of our parameters; the vocabulary padded to 64."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(-(-config.vocab_size // 64) * 64, config.hidden_dim)
        self.embed_positions = nn.Embedding(config.max_positions, config.hidden_dim)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_dim)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens) + self.embed_positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.final_norm(x), self.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def accelerate_loop(config: TrainConfig, pacer: Pacer) -> float:
    """The loop of Accelerate's documentation."""
    from accelerate import Accelerator

    forget_lone_rank()
    rows = Rows(config)
    precision = "bf16" if config.engine.precision is Precision.bf16 else "no"
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)
    model = our_model(config)
    model, optimizer, loader = accelerator.prepare(model, bare_optimizer(config, model), rows.loader(config))
    pacer.begin()
    for number, batch in enumerate(loader):
        loss = model(**batch)["loss"]
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        if (number + 1) % LOG_EVERY_STEPS == 0:
            loss.item()
        pacer.step_done()
    accelerator.end_training()
    return loss.item()


def fabric_loop(config: TrainConfig, pacer: Pacer) -> float:
    """The loop of Lightning Fabric's documentation."""
    from lightning.fabric import Fabric

    forget_lone_rank()
    rows = Rows(config)
    fabric = Fabric(**lightning_settings(config))
    fabric.launch()
    module = our_model(config)
    model, optimizer = fabric.setup(module, bare_optimizer(config, module))
    loader = fabric.setup_dataloaders(rows.loader(config))
    pacer.begin()
    for number, batch in enumerate(loader):
        loss = model(**batch)["loss"]
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=config.optimizer.grad_clip, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()
        if (number + 1) % LOG_EVERY_STEPS == 0:
            loss.item()
        pacer.step_done()
    return loss.item()


def lightning_settings(config: TrainConfig) -> dict[str, Any]:
    world_size = config.train.global_batch_size // config.train.micro_batch_size
    return {
        "accelerator": "cuda" if torch.cuda.is_available() else "cpu",
        "devices": world_size,
        "strategy": "ddp" if world_size > 1 else "auto",
        "precision": "bf16-mixed" if config.engine.precision is Precision.bf16 else "32-true",
    }


def lightning_trainer(config: TrainConfig, pacer: Pacer) -> float:
    """Lightning's Trainer with ``self.log`` and its CSV logger, without progress bar and checkpoints."""
    import lightning
    from lightning.pytorch.loggers import CSVLogger

    info, rows = RankInfo.from_env(), Rows(config)
    # Its own would shuffle.
    sampler = torch.utils.data.DistributedSampler(rows, info.world_size, info.rank, shuffle=False)
    forget_lone_rank()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.mean_loss = our_model(config)

        def training_step(self, batch: dict[str, torch.Tensor], _index: int) -> torch.Tensor:
            loss = self.mean_loss(**batch)["loss"]
            self.log("loss", loss)
            self.last_loss = loss.detach()
            return loss

        def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, **_: Any) -> None:
            # Its own refuses fused optimizers under bf16-mixed.
            torch.nn.utils.clip_grad_norm_(self.parameters(), config.optimizer.grad_clip)

        def on_train_batch_end(self, *_: Any) -> None:
            pacer.step_done()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return bare_optimizer(config, self)

    module = Module()
    fit = lightning.Trainer(
        **lightning_settings(config),
        max_steps=config.train.steps,
        log_every_n_steps=LOG_EVERY_STEPS,
        logger=CSVLogger(config.run.root),
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    pacer.begin()
    fit.fit(module, rows.loader(config, sampler=sampler))
    return module.last_loss.item()


def hf_trainer(config: TrainConfig, pacer: Pacer, *, own_model: bool = False) -> float:
    """HF Trainer with our model, or with GPT-2 of transformers and whole-model compilation as its users have it."""
    import transformers

    forget_lone_rank()
    rows, on_gpu = Rows(config), torch.cuda.is_available()
    model = transformers_gpt2(config) if own_model else our_model(config)

    class Paced(transformers.Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.last_loss = super().training_step(*args, **kwargs)
            return self.last_loss

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    class StepDone(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            pacer.step_done()

    def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = transformers.default_data_collator(samples)
        # Our targets are the next tokens already; transformers would shift them once more.
        return batch | {"shift_labels": batch["labels"]} if own_model else batch

    settings = transformers.TrainingArguments(
        output_dir=f"{config.run.root}/hf",
        use_cpu=not on_gpu,
        per_device_train_batch_size=config.train.micro_batch_size,
        max_steps=config.train.steps,
        logging_steps=LOG_EVERY_STEPS,
        max_grad_norm=config.optimizer.grad_clip,
        lr_scheduler_type="constant",
        bf16=config.engine.precision is Precision.bf16,
        torch_compile=own_model and config.engine.compile,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
    )
    optimizers = (bare_optimizer(config, model), None)
    fit = Paced(
        model, settings, data_collator=collate, train_dataset=rows, optimizers=optimizers, callbacks=[StepDone()]
    )
    pacer.begin()
    fit.train()
    return fit.last_loss.item()


def transformers_gpt2(config: TrainConfig) -> nn.Module:
    """Return GPT-2 of transformers with our weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    native = make_model(config)
    fill(native, make_values(config))
    model = GPT2LMHeadModel(GPT2Config(**hf_config(config.model) | {"use_cache": False}))
    parameters, ours = dict(model.named_parameters()), dict(native.named_parameters())
    with torch.no_grad():
        for tensor in hf_tensors(config.model):
            parameters[tensor.name].copy_(tensor.cut_from(ours[tensor.native]))
    return model


def forget_lone_rank() -> None:
    """Let a library see a plain process where there is only one: nobody starts those with torchrun."""
    if os.environ["WORLD_SIZE"] == "1":
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]


OURS = "bigtrain"
SIDES: dict[str, tuple[str, Callable[[TrainConfig, Pacer], float | None], str]] = {
    "bare": ("by hand, our model and engine", bare, "torch"),
    "nanogpt": ("nanoGPT-style model and loop", nanogpt, "torch"),
    "accelerate": ("Accelerate, our model", accelerate_loop, "accelerate"),
    "fabric": ("Lightning Fabric, our model", fabric_loop, "lightning"),
    "lightning": ("Lightning Trainer, our model", lightning_trainer, "lightning"),
    "hf": ("HF Trainer, our model", hf_trainer, "transformers"),
    "hf-gpt2": ("HF Trainer, GPT-2 of transformers", partial(hf_trainer, own_model=True), "transformers"),
}


def make_config(args: argparse.Namespace, scratch: str, kind: EngineKind) -> TrainConfig:
    """Return the run, checked: synthetic tokens, one micro-batch per rank and step, a constant learning rate."""
    model = SMALL
    if args.model != SMALL.name:
        path = turns.REPOSITORY / f"configs/model/{args.model}.yaml"
        model = from_dict(ModelConfig, yaml.safe_load(path.read_text()))
    model.max_positions = max(model.max_positions, args.sequence_length)
    config = resolve(
        TrainConfig(
            run=RunConfig(name=f"step-{kind.name}", root=f"{scratch}/runs"),
            model=model,
            data=DataConfig(source=DataSource.synthetic, sequence_length=args.sequence_length),
            engine=EngineConfig(kind=kind, precision=Precision[args.precision], compile=args.compile),
            scheduler=SchedulerConfig(kind=SchedulerKind.constant, warmup_steps=0),
            train=TrainingConfig(
                steps=(1 + args.turns) * (1 + args.steps),
                global_batch_size=args.batch,
                micro_batch_size=args.batch // args.ranks,
                log_every_steps=LOG_EVERY_STEPS,
            ),
        )
    )
    if problems := check(config, world_size=args.ranks, local_world_size=args.ranks):
        sys.exit("\n".join(problems))
    return config


def measure(args: argparse.Namespace, sides: dict[str, partial]) -> dict[str, Measured]:
    """Let the sides take turns; say which have failed, and end if one of ours is among them."""
    # glibc may give memory back to the system after every step and fault it in again in the next, up to a fifth
    # of a step on a CPU. Which side is hit is chance, so none is: the ranks read this as they start.
    os.environ |= {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}
    measured, failures = turns.take_turns(
        sides,
        world_size=args.ranks,
        threads=args.threads,
        num_turns=1 + args.turns,
        turn_steps=args.steps,
        together=args.together,
    )
    for name, failure in failures.items():
        print(f"left out: {name} has failed: {failure.strip().splitlines()[-1]}")
    if failed := [failure for name, failure in failures.items() if name.startswith(OURS)]:
        sys.exit(failed[0])
    return measured


def loss_of(measured: Measured) -> float:
    return statistics.mean(loss for loss in measured.results if loss is not None)


def same_work(measured: dict[str, Measured], precision: str) -> list[str]:
    """Return whose last loss is not that of the first side."""
    losses = {name: loss_of(side) for name, side in measured.items()}
    expected, tolerance = next(iter(losses.values())), TOLERANCES.get(precision, LOW_PRECISION)
    return [f"{name}: loss {x:.6f}" for name, x in losses.items() if not abs(x - expected) <= tolerance * expected]


def report(args: argparse.Namespace, config: TrainConfig, measured: dict[str, Measured]) -> str:
    """Return the table; ratios are ours to theirs."""
    tokens, ours = args.batch * args.sequence_length, measured[OURS]
    flops, peak = flops_per_token(config.model, args.sequence_length), turns.peak_flops(Precision[args.precision])
    lines = [
        conditions(args, config),
        f"{'':<36}{'tokens/s':>12}{'ours is':>9}{'quartiles':>15}{'peak MB':>10}{'ours is':>9}{'CPU s':>8}{'MFU':>8}"
        f"{'last loss':>11}",
    ]
    for name, side in measured.items():
        rate = tokens / statistics.median(side.seconds)
        pairs = [theirs / own for theirs, own in zip(side.seconds, ours.seconds, strict=True)]
        low, _, high = turns.quartiles(pairs)
        ratio = statistics.median(side.seconds) / statistics.median(ours.seconds)
        mfu = f"{rate * flops.full_attention / args.ranks / peak:.1%}" if peak else "-"
        lines.append(
            f"{name:<36}{rate:>12,.0f}{ratio:>8.3f}x{f'{low:.3f} - {high:.3f}':>15}{side.peak_bytes / 1e6:>10,.0f}"
            f"{ours.peak_bytes / side.peak_bytes:>8.3f}x{statistics.median(side.cpu_seconds):>8.2f}{mfu:>8}"
            f"{loss_of(side):>11.5f}"
        )
    return "\n".join(lines)


def conditions(args: argparse.Namespace, config: TrainConfig) -> str:
    peers = turns.versions("accelerate", "lightning", "transformers")
    compiled = "compiled" if args.compile else "eager"
    return (
        f"{turns.machine()}; {peers}\n"
        f"{args.ranks} x {args.threads} threads, engine {config.engine.kind.name}, {args.precision}, {compiled}; "
        f"{config.model.name} with {model_sizes(config.model).total:,} parameters, {args.batch} x "
        f"{args.sequence_length} tokens per step; {args.turns} turns of {args.steps} steps, medians\n"
    )


def rows_of(measured: dict[str, Measured]) -> dict[str, Any]:
    """Return the figures for the JSON file."""
    return {
        name: {
            "seconds_per_step": side.seconds,
            "cpu_seconds_per_step": side.cpu_seconds,
            "peak_bytes": side.peak_bytes,
            "last_loss": loss_of(side),
        }
        for name, side in measured.items()
    }


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """Return what this script and ``engines.py`` have in common."""
    on_gpu = torch.cuda.device_count() > 0
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, help="processes of every side, started here (default 1)")
    parser.add_argument("--threads", type=int, help="per rank; by default the cores divided by the ranks")
    parser.add_argument("--model", default=SMALL.name, choices=[SMALL.name, *PRESETS], metavar="PRESET")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens per sample (default 256)")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step, over all ranks (default 4)")
    parser.add_argument("--precision", default="bf16" if on_gpu else "fp32", choices=["bf16", "fp32", "fp8"])
    parser.add_argument("--compile", action="store_true", help="torch.compile, each side in its way")
    parser.add_argument("--turns", type=int, default=8, help="of every side, after one to warm up (default 8)")
    parser.add_argument("--steps", type=int, default=20 if on_gpu else 3, help="timed steps of a turn")
    parser.add_argument("--together", type=int, default=1, help="sides that warm up at the same time (default 1)")
    turns.add_json_argument(parser)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    if min(args.ranks, args.batch, args.steps, args.turns, args.together) < 1 or args.batch % args.ranks:
        parser.error(
            "--ranks, --batch, --turns, --steps and --together are at least 1; --batch is a multiple of --ranks"
        )
    args.threads = args.threads or max((os.cpu_count() or 1) // args.ranks, 1)
    return args


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--engine", default="ddp", choices=["ddp", "fsdp"], help="ours and by hand (default ddp)")
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES), help="by default all")
    args = parse(parser)
    with tempfile.TemporaryDirectory(prefix="step-") as scratch:
        config = make_config(args, scratch, EngineKind[args.engine])
        sides = {OURS: partial(ours, config)}
        if args.precision == "fp8":  # the others have bf16, and so has ours once more
            config = replace(config, engine=replace(config.engine, precision=Precision.bf16))
            sides[f"{OURS}, bf16"] = partial(ours, replace(config, run=replace(config.run, name="step-bf16")))
        for key in args.sides:
            name, side, package = SIDES[key]
            if find_spec(package):
                sides[name] = partial(side, config)
            else:
                print(f"left out: {name}: {package} is not installed")
        print("left out: torchtitan: it does not run on a CPU, and trains its own models only")
        measured = measure(args, sides)
    print(report(args, config, measured))
    turns.write_json(args.json, "step", conditions=conditions(args, config), rows=rows_of(measured))
    if different := same_work(measured, args.precision):
        sys.exit("other work: " + ", ".join(different))


if __name__ == "__main__":
    main()
