"""The parity gate: every engine at every world size computes the same run, and the gate can fail."""

import dataclasses
import json

import pytest
import torch
import yaml

from bigtrain.config import (
    ActivationCheckpointing,
    DataConfig,
    DataSource,
    EngineConfig,
    EngineKind,
    ModelConfig,
    Offload,
    Packing,
    Precision,
    TrainConfig,
    TrainingConfig,
)
from bigtrain.config.check import resolve
from bigtrain.config.convert import from_dict
from bigtrain.distributed.collectives import all_reduce_sum
from bigtrain.testing.parity import Case, compare, compute, configure, trace
from bigtrain.testing.ranks import run_ranks
from tests.distributed.launches import fork, metrics
from tests.distributed.ranks import zero_environ

GLOBAL_BATCH_SIZE = 8
STEPS, WARMUP_STEPS = 8, 3
WRAPPED_TYPES = {
    "ddp": "DistributedDataParallel",
    "fsdp": "FSDPModule",
    "hsdp": "FSDPModule",
    "zero1": "DeepSpeedEngine",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}


def gate_config(precision="fp32", **engine):
    """Some steps of gpt_nano on ragged targets: ranks and micro-batches hold different numbers of them."""
    with open("configs/model/gpt_nano.yaml") as file:
        model = from_dict(ModelConfig, yaml.safe_load(file))
    config = TrainConfig(
        model=model,
        data=DataConfig(source=DataSource.synthetic, synthetic_ragged=True, sequence_length=64),
        engine=EngineConfig(precision=Precision[precision], **engine),
        train=TrainingConfig(steps=STEPS, global_batch_size=GLOBAL_BATCH_SIZE),
    )
    config.scheduler.warmup_steps = WARMUP_STEPS
    return resolve(config)


def cases():
    for world_size in (1, 2, 4):
        for engine in WRAPPED_TYPES:
            dp_shard = min(world_size, 2) if engine == "hsdp" else None
            per_rank = GLOBAL_BATCH_SIZE // world_size
            # The smallest split takes part once per engine, on 2 ranks; the others run quicker in halves.
            micro_batch_size = 1 if world_size == 2 else per_rank // 2
            yield Case(EngineKind[engine], world_size, micro_batch_size, dp_shard)
        yield Case(EngineKind.accelerate, world_size, 2)
        yield Case(EngineKind.accelerate, world_size, 2, environ=zero_environ(2))
    yield Case(EngineKind.accelerate, 2, 2, environ=zero_environ(3))
    # Batches that do not come out even: on 3 ranks the third pads, on 5 the last has nothing but padding.
    for engine in ("ddp", "fsdp", "zero1", "zero3"):
        yield Case(EngineKind[engine], 3, 2)
    yield Case(EngineKind.fsdp, 5, 2)
    yield Case(EngineKind.zero2, 5, 2)


def is_slow(case):
    """At four ranks only what needs them is computed always: HSDP with two groups, and the widest world of accelerate."""
    return case.world_size == 4 and case.engine not in (EngineKind.hsdp, EngineKind.accelerate)


def wrapped_type(case):
    if case.engine is EngineKind.accelerate:
        return "DeepSpeedEngine" if case.environ else "DistributedDataParallel"
    is_bare = (case.engine, case.world_size) == (EngineKind.ddp, 1)
    return "TaskModel" if is_bare else WRAPPED_TYPES[case.engine.name]


def trace_all(configs):
    return [trace(config) for config in configs]


@pytest.fixture(scope="module")
def computed():
    """Trajectories of cases; all those that can share their processes are computed when the first is asked for."""
    known = {}

    def get(config, case, others):
        group = [c for c in others if (c.world_size, c.environ) == (case.world_size, case.environ)]
        key = config.engine.precision.name, str(case)
        if key not in known:
            configs = [configure(config, c) for c in group]
            traces = run_ranks(trace_all, case.world_size, configs, timeout_seconds=280, environ=case.environ)[0]
            known.update({(config.engine.precision.name, str(c)): t for c, t in zip(group, traces, strict=True)})
        return known[key]

    return get


@pytest.fixture(scope="module")
def reference():
    return compute(gate_config(), Case(EngineKind.ddp, 1, GLOBAL_BATCH_SIZE))


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if is_slow(c) else ()) for c in cases()], ids=str
)
def test_fp32_agrees_with_one_process(case, computed, reference):
    trajectory = computed(gate_config(), case, [c for c in cases() if is_slow(c) == is_slow(case)])
    assert trajectory.wrapped_type == wrapped_type(case)
    difference = compare(trajectory, reference)
    print(case, difference)
    assert difference.loss <= 1e-5
    assert difference.grad_norm <= 1e-5
    assert difference.parameters <= 1e-4


OPTIONS = [
    ("ddp", {"activation_checkpointing": "full"}),
    ("fsdp", {"activation_checkpointing": "selective"}),
    ("fsdp", {"accumulate_whole_gradients": True}),
    ("fsdp", {"offload": "cpu"}),
    ("hsdp", {"activation_checkpointing": "full", "activation_checkpointing_every": 2}),
    ("zero1", {"activation_checkpointing": "selective", "offload": "cpu"}),
    ("zero2", {"activation_checkpointing": "full", "offload": "cpu"}),
    ("zero3", {"activation_checkpointing": "full", "activation_checkpointing_every": 2, "offload": "cpu"}),
    ("zero3", {"activation_checkpointing": "selective"}),
    ("fsdp", {"compile": True, "activation_checkpointing": "selective", "prefetch_blocks": 2}),
]


def option_config(options):
    fields = dict(options)
    config = gate_config()
    config.engine.fsdp.accumulate_whole_gradients = fields.pop("accumulate_whole_gradients", False)
    config.engine.fsdp.prefetch_blocks = fields.pop("prefetch_blocks", 1)
    enums = {"activation_checkpointing": ActivationCheckpointing, "offload": Offload}
    for name, value in fields.items():
        setattr(config.engine, name, enums[name][value] if name in enums else value)
    return config


@pytest.fixture(scope="module")
def with_options():
    """Trajectories of all options, computed in the same two processes."""
    cases = [Case(EngineKind[engine], 2, 2, 2 if engine == "hsdp" else None) for engine, _ in OPTIONS]
    configs = [configure(option_config(options), case) for case, (_, options) in zip(cases, OPTIONS, strict=True)]
    return run_ranks(trace_all, 2, configs, timeout_seconds=280)[0]


@pytest.mark.parametrize("number", range(len(OPTIONS)), ids=["-".join((engine, *o)) for engine, o in OPTIONS])
def test_options_of_the_engines_agree_too(number, with_options, reference):
    difference = compare(with_options[number], reference)
    print(OPTIONS[number], difference)
    assert max(difference.loss, difference.grad_norm) <= 1e-5
    assert difference.parameters <= 1e-4


@pytest.mark.parametrize("engine", WRAPPED_TYPES)
def test_bf16_mixed_precision_agrees_with_fp32(engine, computed, reference):
    bf16_cases = {name: Case(EngineKind[name], 2, 2, 2 if name == "hsdp" else None) for name in WRAPPED_TYPES}
    case = bf16_cases[engine]
    difference = compare(computed(gate_config("bf16"), case, bf16_cases.values()), reference)
    print(case, difference)
    assert 0 < difference.loss <= 2e-3


LLAMA = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "bias": False}
LLAMA |= {"tie_embeddings": False, "vocab_size": 257, "num_layers": 3, "hidden_dim": 48, "num_heads": 6, "head_dim": 8}


def llama_config(directory):
    """A Llama (RoPE, GQA, untied) on packed documents that do not see each other."""
    text = directory / "text.jsonl"
    texts = (f"{'the cat sat on a mat ' * (1 + i % 4)}{i}" for i in range(80))
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in texts))
    config = gate_config()
    data = DataConfig(source=DataSource.jsonl, path=str(text), tokenizer="bytes", root=str(directory / "data"))
    data = dataclasses.replace(data, sequence_length=64, packing=Packing.best_fit, document_mask=True)
    train = dataclasses.replace(config.train, steps=6)
    return resolve(dataclasses.replace(config, model=ModelConfig(**LLAMA), data=data, train=train))


def test_a_llama_on_masked_documents_agrees_too(tmp_path):
    config = llama_config(tmp_path)
    reference = compute(config, Case(EngineKind.ddp, 1, GLOBAL_BATCH_SIZE))
    masked = compute(
        dataclasses.replace(config, data=dataclasses.replace(config.data, document_mask=False)),
        Case(EngineKind.ddp, 1, 8),
    )
    assert compare(masked, reference).loss > 1e-5, "the mask counts"
    cases = [Case(EngineKind[engine], 2, 2, 2 if engine == "hsdp" else None) for engine in WRAPPED_TYPES]
    trajectories = run_ranks(trace_all, 2, [configure(config, case) for case in cases], timeout_seconds=280)[0]
    for case, trajectory in zip(cases, trajectories, strict=True):
        difference = compare(trajectory, reference)
        print(case, difference)
        assert max(difference.loss, difference.grad_norm) <= 1e-5
        assert difference.parameters <= 1e-4


def test_bf16_agrees_with_every_fast_path_on(reference):
    config = gate_config("bf16", compile=True, activation_checkpointing=ActivationCheckpointing.full)
    difference = compare(compute(config, Case(EngineKind.ddp, 2, 2)), reference)
    print(difference)
    assert 0 < difference.loss <= 2e-3


def mean_of_means(engine, batch, lr):
    """The classic mistake: every micro-batch divides by its own number of targets."""
    loss_sum = torch.zeros(1)
    num_micro_batches = torch.tensor(len(batch.micro_batches) * engine.mesh.dp_size)
    total = all_reduce_sum(torch.tensor(batch.num_targets))
    for micro_batch in batch.micro_batches:
        own = (micro_batch["targets"] != -100).sum() * num_micro_batches
        loss_sum += engine.forward_backward([micro_batch], num_targets=own)
    return loss_sum / total, engine.step(lr)


def forgotten_boundary(engine, batch, lr):
    """Gradients are never communicated: no micro-batch is the last one."""

    class Endless(list):
        def __len__(self):
            return super().__len__() + 1

    total = all_reduce_sum(torch.tensor(batch.num_targets))
    return engine.forward_backward(Endless(batch.micro_batches), num_targets=total) / total, engine.step(lr)


# Without a boundary DeepSpeed does not step at all, which nobody could overlook; DDP and FSDP step on unsynchronised gradients.
MISTAKES = [("ddp", mean_of_means), ("zero2", mean_of_means), ("ddp", forgotten_boundary), ("fsdp", forgotten_boundary)]
UNCLIPPED = ("ddp", "fsdp", "zero2")


def trace_mistakes():
    """Trace every mistake, and a run without clipping under some engines."""
    config = gate_config()
    config.engine.fsdp.accumulate_whole_gradients = True  # else every micro-batch communicates
    wrong = [trace(configure(config, Case(EngineKind[engine], 2, 2)), mistake) for engine, mistake in MISTAKES]
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, grad_clip=0.0))
    return wrong, [trace(configure(config, Case(EngineKind[engine], 2, 2))) for engine in UNCLIPPED]


@pytest.fixture(scope="module")
def mistaken():
    return run_ranks(trace_mistakes, 2, timeout_seconds=280)[0]


@pytest.mark.parametrize(
    "number", range(len(MISTAKES)), ids=[f"{engine}-{mistake.__name__}" for engine, mistake in MISTAKES]
)
def test_the_gate_catches_a_wrong_step(number, mistaken, reference):
    difference = compare(mistaken[0][number], reference)
    assert difference.loss > 1e-5 or difference.grad_norm > 1e-5
    assert difference.parameters > 1e-4


@pytest.mark.parametrize("engine", UNCLIPPED)
def test_the_gate_catches_a_skipped_clip(engine, mistaken, reference):
    difference = compare(mistaken[1][UNCLIPPED.index(engine)], reference)
    print(difference)
    assert difference.loss > 1e-5
    assert difference.parameters > 1e-4


def test_the_reference_is_what_the_training_command_computes(reference, tmp_path):
    settings = ["+model=gpt_nano", "data=synthetic", "data.synthetic_ragged=true", "data.sequence_length=64"]
    sizes = [f"train.{name}_batch_size={GLOBAL_BATCH_SIZE}" for name in ("global", "micro")]
    settings += ["engine=ddp", f"train.steps={STEPS}", *sizes]
    settings += [f"scheduler.warmup_steps={WARMUP_STEPS}", "validation.every_steps=0", "engine.precision=fp32"]
    ended = fork("train.py", *settings, cwd=tmp_path)
    assert ended.code == 0, ended
    records = metrics(tmp_path / "runs/gpt_nano")
    assert [record["loss"] for record in records] == reference.losses
    assert [record["grad_norm"] for record in records] == reference.grad_norms
