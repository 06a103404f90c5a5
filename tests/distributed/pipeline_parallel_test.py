"""Ranks that have some blocks each compute the run of one process, and mistakes between them would be seen."""

import dataclasses

import pytest

from bigtrain.config import (
    ActivationCheckpointing,
    EngineKind,
    ModelConfig,
    ParallelConfig,
    PpSchedule,
    Precision,
)
from bigtrain.config.check import check, resolve
from bigtrain.config.layout import stage_blocks
from bigtrain.engine.state import MODEL
from bigtrain.run.step import train_step
from bigtrain.testing.parity import Case, compare, configure, trace
from bigtrain.testing.ranks import run_ranks
from tests.distributed.checkpoint_test import leg
from tests.distributed.launches import SMALL, events, fork, metrics
from tests.distributed.parity_test import gate_config, llama_config
from tests.distributed.ranks import laid_out, small_config
from tests.distributed.tensor_parallel_test import GPT, LLAMA, assert_same, of_one_process
from tests.distributed.verify_resume_test import verify

NETWORKS = {"gpt": GPT | {"num_layers": 4}, "llama": LLAMA | {"num_layers": 4}}
INTERLEAVED = {"pp_schedule": PpSchedule.interleaved}
FULL = {"activation_checkpointing": ActivationCheckpointing.full}
SELECTIVE = {"activation_checkpointing": ActivationCheckpointing.selective}
BF16 = {"precision": Precision.bf16}


def run_config(network):
    """Ragged targets, and gradients that are clipped in every step."""
    config = resolve(dataclasses.replace(gate_config(), model=ModelConfig(**NETWORKS[network])))
    config.train.steps, config.optimizer.grad_clip = 20 if network == "gpt" else 10, 0.5
    return config


def staged(config, engine, world_size, *, dp_shard=None, pp=2, tp=1, cp=1, pp_schedule=None, micro=1, **fields):
    """Return the configuration of a case, which would be accepted."""
    parallel = ParallelConfig(pp=pp, tp=tp, cp=cp, pp_schedule=pp_schedule or PpSchedule.one_f_one_b)
    return laid_out(config, engine, world_size, parallel, micro=micro, dp_shard=dp_shard, **fields)


def watched(config):
    """Return the trajectory, the names of what this rank holds, and the bits of its copy of tied rows."""
    engines = []

    def step(engine, batch, lr):
        engines.append(engine)
        return train_step(engine, batch, lr)

    trajectory, engine = trace(config, step), engines[0]
    held = {key.removeprefix(MODEL) for key, entry in engine.state.entries.items() if entry.boxes}
    tied = None if engine._tied is None else engine.state.entries["model.embed_tokens.weight"].boxes[0].view.numpy()
    return trajectory, held, None if tied is None else tied.tobytes()


def trace_all(configs):
    return [watched(config) for config in configs]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """What one process computes of each network."""
    configs = {name: run_config(name) for name in NETWORKS}
    documents = llama_config(tmp_path_factory.mktemp("documents"))
    configs["documents"] = resolve(dataclasses.replace(documents, model=ModelConfig(**NETWORKS["llama"])))
    return of_one_process(configs)


CASES = {
    2: [
        ("gpt", "ddp", {}),
        ("llama", "fsdp", INTERLEAVED | FULL),
        ("documents", "ddp", {}),
        ("gpt", "fsdp", BF16),
    ],
    4: [
        ("gpt", "fsdp", {}),
        ("llama", "ddp", {"pp": 4, "micro": 2}),
        ("llama", "ddp", {"tp": 2}),
        ("gpt", "fsdp", {"cp": 2}),
    ],
}
MORE = {
    2: [
        ("llama", "ddp", SELECTIVE | {"micro": 2}),
        ("gpt", "ddp", INTERLEAVED),
        ("documents", "fsdp", INTERLEAVED | SELECTIVE),
        ("llama", "ddp", BF16),
        ("llama", "fsdp", {"compile": True}),
    ],
    4: [
        ("llama", "hsdp", {"dp_shard": 2}),
        ("gpt", "hsdp", {"dp_shard": 1}),
        ("llama", "fsdp", INTERLEAVED),
        ("gpt", "fsdp", {"tp": 2}),
        ("llama", "ddp", {"cp": 2}),
        ("gpt", "ddp", {}),
    ],
    8: [("llama", "fsdp", {"tp": 2}), ("gpt", "fsdp", {"tp": 2, "cp": 2}), ("llama", "ddp", INTERLEAVED | {"tp": 2})],
}


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [*CASES.items(), *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE.items())],
    ids=["2", "4", "2 more", "4 more", "8 more"],
)
def test_every_layout_computes_what_one_process_does(world_size, cases, one_process):
    configs = [staged(one_process[name][0], engine, world_size, **how) for name, engine, how in cases]
    ranks = run_ranks(trace_all, world_size, configs, timeout_seconds=280)
    for number, (name, engine, how) in enumerate(cases):
        what, parallel = f"{name} {engine} {how} on {world_size}", configs[number].parallel
        assert_same(ranks[0][number][0], one_process[name][1], configs[number].engine.precision, what)
        # Which layout ran: a rank has the blocks of its stages and no others.
        for rank, results in enumerate(ranks):
            first, step = rank // (world_size // parallel.pp), parallel.pp
            stages = range(first, parallel.num_stages, step)
            own = {block for stage in stages for block in stage_blocks(4, stage, parallel.num_stages)}
            assert {int(held.split(".")[1]) for held in results[number][1] if held.startswith("blocks.")} == own, what
        if name == "gpt":
            part = world_size // parallel.pp
            tied = [results[number][2] for results in ranks]
            assert tied[:part] == tied[-part:] and None not in tied[:part], "copies of tied rows drift"


def test_stages_share_out_blocks_with_embedding_and_head_as_a_block_each():
    for num_blocks, num_stages in ((4, 2), (4, 4), (30, 8), (126, 16), (7, 3)):
        parts = [stage_blocks(num_blocks, number, num_stages) for number in range(num_stages)]
        assert [block for part in parts for block in part] == list(range(num_blocks))
        assert all(parts) and max(map(len, parts)) - min(map(len, parts)) <= 2


def not_exchanged(engine, batch, lr):
    """The first stage and the last keep the gradients of tied rows to themselves."""
    engine._tied = None
    return train_step(engine, batch, lr)


def uncounted_twice(engine, batch, lr):
    """Tied rows count on the first stage and on the last in the gradient's norm."""
    engine._uncounted.clear()
    return train_step(engine, batch, lr)


def averaged(engine, batch, lr):
    """Gradients are divided by the number of micro-batches, as schedules do by default."""
    engine._schedule.scale_grads = True
    return train_step(engine, batch, lr)


MISTAKES = {"tied": not_exchanged, "norm": uncounted_twice, "mean": averaged}


def trace_mistakes(config):
    return {name: trace(config, step) for name, step in MISTAKES.items()}


def test_the_gate_catches_mistakes_between_stages(one_process):
    found = run_ranks(trace_mistakes, 2, staged(run_config("gpt"), "ddp", 2), timeout_seconds=280)[0]
    for mistake, trajectory in found.items():
        difference = compare(trajectory, one_process["gpt"][1])
        print(mistake, difference)
        assert difference.grad_norm > 1e-4, mistake


CHAIN = [
    ("ddp", 2, {}),
    ("fsdp", 2, {"pp": 1}),
    ("fsdp", 4, {"tp": 2}),
    ("ddp", 1, {"pp": 1}),
    ("fsdp", 4, INTERLEAVED),
]


def test_a_checkpoint_goes_from_layout_to_layout(tmp_path):
    config = small_config(model={"num_heads": 2, "num_layers": 4})
    config.train.steps = 15
    whole = run_ranks(leg, 1, config, tmp_path / "whole", 0, 15, timeout_seconds=100)[0]
    before = None
    for number, (engine, world_size, how) in enumerate(CHAIN):
        first, last = 3 * number, 3 * number + 3
        case = staged(config, engine, world_size, **how)
        ranks = run_ranks(leg, world_size, case, tmp_path / "chain", first, last, timeout_seconds=100)
        begun, ended, losses = ranks[0]
        assert before in (None, begun), f"{engine} {how}: what was loaded is not what was saved"
        assert losses == pytest.approx(whole[2][first:last], rel=1e-6)
        before = ended


def test_the_command_trains_validates_and_measures_what_one_process_does(tmp_path):
    settings = [*SMALL, "model.num_layers=4", "engine=fsdp", "engine.precision=fp32", "train.steps=4"]
    settings += ["validation.every_steps=2", "logging.layer_norms_every_steps=2", "checkpoint.every_steps=2"]
    layouts = {"one": "parallel.pp=1", "two": "parallel.pp=2", "four": "parallel.pp_schedule=interleaved"}
    for name, layout in layouts.items():
        more = ["parallel.pp=2"] if name == "four" else []
        ended = fork(
            "train.py", *settings, layout, *more, f"run.name={name}", cwd=tmp_path, world_size=1 if name == "one" else 2
        )
        assert ended.code == 0, ended
    one = metrics(tmp_path / "runs/one")
    numbers = [key for key in one[1] if key in ("loss", "lr", "grad_norm") or key.startswith("optim/")]
    validated = [event["loss"] for event in events(tmp_path / "runs/one", "validation")]
    for name in ("two", "four"):
        found = metrics(tmp_path / "runs" / name)
        assert [r["data_digest"] for r in found] == [r["data_digest"] for r in one]
        for record, expected in zip(found, one, strict=True):
            wanted = {key: pytest.approx(expected[key], rel=1e-5) for key in numbers if key in expected}
            assert {key: record[key] for key in wanted} == wanted
        losses = [event["loss"] for event in events(tmp_path / "runs" / name, "validation")]
        assert losses == pytest.approx(validated, rel=1e-6)


def test_what_cannot_be_staged_is_refused_before_a_process_group():
    config = dataclasses.replace(run_config("gpt"), parallel=ParallelConfig(pp=2, pp_schedule=PpSchedule.interleaved))
    config = configure(config, Case(EngineKind.zero2, 3, 3, parallel=config.parallel))
    config.model.num_layers, config.model.freeze = 3, ["embed_tokens.weight"]
    problems = "\n".join(check(config, world_size=3, local_world_size=3))
    for sentence in (
        "parallel.pp=2 does not divide the world size 3; use 2 or 4 ranks",
        "parallel.pp=2: not offered by engine=zero2; use engine=ddp, fsdp or hsdp",
        "parallel.pp=2: 4 stages need as many blocks, and model.num_layers=3",
        "parallel.pp=2: model.freeze is not offered with it; leave one of them out",
        "parallel.pp=2: a step has 3 micro-batches on each rank, and parallel.pp_schedule=interleaved needs a multiple of 2; "
        "use train.global_batch_size=12",
    ):
        assert sentence in problems, problems


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_killed_run_goes_on_bit_by_bit(tmp_path, engine):
    config = staged(small_config(engine, model={"num_layers": 4, "dropout": 0.1}), engine, 2)
    verdict = verify(tmp_path, config, world=2)
    assert (verdict.holds, verdict.is_bitwise) == (True, True), verdict


@pytest.mark.slow
def test_a_killed_pipeline_goes_on_in_another_layout(tmp_path):
    config = staged(small_config("fsdp", model={"num_layers": 4, "num_heads": 2}), "fsdp", 2)
    verdict = verify(tmp_path, config, world=2, resume_parallel=ParallelConfig(tp=2), resume_engine=EngineKind.ddp)
    assert (verdict.holds, verdict.is_bitwise) == (True, False), verdict
