"""A resumed run is the uninterrupted one, and the command that says so can say the opposite."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtrain.checkpoint.loader import load_checkpoint
from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.store import RunState, checkpoint_path
from bigtrain.config import CheckpointConfig, EngineKind, ParallelConfig, TrainConfig
from bigtrain.data.order.cursor import Cursor
from bigtrain.data.read.loader import StepBatch, TrainLoader
from bigtrain.engine.base import Engine
from bigtrain.errors import BigtrainError
from bigtrain.optim.schedule import lr_at
from bigtrain.run import launching, recovery, trainer
from bigtrain.run.data import open_data
from bigtrain.tasks.causal_lm import CausalLM
from bigtrain.testing.ranks import run_ranks
from bigtrain.testing.resume import Check, Plan, Verdict, verify_resume
from tests.distributed.checkpoint_test import state_hashes
from tests.distributed.launches import SMALL
from tests.distributed.ranks import small_config, start_engine


def verify(tmp_path: Path, config: TrainConfig, *, after: int = 4, world: int, **plan: Any) -> Verdict:
    resume = plan.pop("resume", launching.run)
    defaults = {"resume_world_size": world, "resume_engine": config.engine.kind, "resume_parallel": config.parallel}
    whole_plan = Plan(before=3, after=after, world_size=world, **{**defaults, **plan})
    return verify_resume(config, whole_plan, tmp_path / "root", resume=resume)


def differences(verdict: Verdict) -> dict[tuple[str, str], float]:
    return {(check.name, check.steps): check.difference for check in verdict.checks}


# The verdict


def test_the_same_engine_resumes_bit_by_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    verdict = verify(tmp_path, small_config("fsdp", model={"dropout": 0.1}), world=2)
    assert (verdict.holds, verdict.is_bitwise, verdict.first_difference) == (True, True, None)
    assert all(check.allowed == 0 for check in verdict.checks)
    assert differences(verdict) == {
        ("samples", "4 to 7"): 0,
        ("data_digest", "4 to 7"): 0,
        ("lr", "4 to 7"): 0,
        ("loss", "1 to 3"): 0,
        ("loss", "4 to 7"): 0,
        ("grad_norm", "1 to 3"): 0,
        ("grad_norm", "4 to 7"): 0,
        ("weights", "7"): 0,
        ("optimizer state", "7"): 0,
    }
    assert capsys.readouterr().out.splitlines() == [
        "uninterrupted  fsdp on 2 ranks: steps 1 to 7",
        "killed         fsdp on 2 ranks: kill -9 in step 5",
        "resumed        fsdp on 2 ranks: steps 4 to 7",
    ]


def test_another_engine_and_world_size_resume_within_rounding(tmp_path: Path):
    plan = {"resume_world_size": 1, "resume_engine": EngineKind.zero2}
    verdict = verify(tmp_path, small_config("fsdp"), world=2, **plan)
    assert (verdict.holds, verdict.is_bitwise) == (True, False)
    found = differences(verdict)
    assert 0 < found["loss", "4 to 7"] <= 1e-6
    assert 0 < found["weights", "7"] <= 1e-5
    assert found["samples", "4 to 7"] == found["loss", "1 to 3"] == 0


def other_seed(config: TrainConfig) -> int:
    data = dataclasses.replace(config.data, allow_change=True)  # without it the trainer itself refuses
    return launching.run(dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, seed=1)))


def skipped_sample(config: TrainConfig) -> int:
    following = TrainLoader.__next__
    ahead = []

    def one_sample_of_the_next_step(self: TrainLoader) -> StepBatch:
        batch = ahead.pop() if ahead else following(self)
        if batch.step == 4:
            ahead.append(following(self))
            batch.micro_batches[0] = ahead[0].micro_batches[0]
        return batch

    TrainLoader.__next__ = one_sample_of_the_next_step
    return launching.run(config)


def skipped_step(config: TrainConfig) -> int:
    build = trainer.train_loader
    trainer.train_loader = lambda *args, start: build(*args, start=Cursor(start.step + 1, 8 * (start.step + 1)))
    return launching.run(config)


def forgotten_momentum(config: TrainConfig) -> int:
    load = recovery.load_state

    def load_and_forget(path: Path, entries: dict[str, Any]) -> None:
        load(path, entries)
        for key in [key for key in entries if key.endswith(".exp_avg")]:
            for box in entries[key].boxes:
                box.view.zero_()

    recovery.load_state = load_and_forget
    return launching.run(config)


def other_dropout(config: TrainConfig) -> int:
    seed_step = trainer.seed_step
    trainer.seed_step = lambda seed, *position: seed_step(seed + 1, *position)
    return launching.run(config)


@pytest.mark.parametrize(
    ("resume", "first"),
    [
        (other_seed, "step 4, samples: 8 of 8 are missing"),
        (skipped_sample, "step 5, samples: 1 of 8 are missing"),
        (skipped_step, "step 4, samples: 8 of 8 are missing"),
        (forgotten_momentum, "step 5, loss: "),
        (other_dropout, "step 4, loss: "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_resume_that_is_wrong_is_found_out(resume: Callable[[TrainConfig], int], first: str, tmp_path: Path):
    config = small_config("ddp", model={"dropout": 0.1})
    verdict = verify(tmp_path, config, after=3, world=1, resume=resume)
    assert not verdict.holds
    assert verdict.first_difference.startswith(first)
    assert not all(check.holds for check in verdict.checks)
    assert all(check.holds for check in verdict.checks if check.steps == "1 to 3"), "before the kill all is well"


def test_forgotten_momentum_is_found_across_engines_too(tmp_path: Path):
    verdict = verify(
        tmp_path,
        small_config("ddp"),
        after=3,
        world=1,
        resume=forgotten_momentum,
        resume_engine=EngineKind.fsdp,
    )
    assert not verdict.is_bitwise
    assert verdict.first_difference.startswith("step 5, loss: ")


def fault(config: TrainConfig) -> int:
    raise ZeroDivisionError("a fault of the resumed run")


def test_a_launch_that_fails_is_an_error_with_its_cause(tmp_path: Path):
    with pytest.raises(BigtrainError, match=r"ddp on 1 rank: the training failed(.|\n)*a fault of the resumed run"):
        verify(tmp_path, small_config("ddp"), after=2, world=1, resume=fault)


# The order of sums


def resumed_in_memory(world_size: int, root: Path) -> tuple[bool, bool]:
    """Train, save, train on; load into a fresh engine and train the same steps; return what is equal."""
    config = small_config("ddp", model={"dropout": 0.1})
    config.train.global_batch_size = 12

    def train(engine: Engine, first: int, last: int) -> list[tuple[float, float]]:
        pending = []
        start = Cursor(first, first * config.train.global_batch_size)
        with trainer.train_loader(open_data(config)["train"], config, engine, start=start) as loader:
            for batch in itertools.islice(loader, last - first):
                lr = lr_at(batch.step, peak_lr=config.optimizer.lr, num_steps=8, config=config.scheduler)
                trainer.seed_step(0, batch.step, engine.mesh.dp_rank, engine.device)
                loss, grad_norm = trainer.train_step(engine, batch, lr)
                pending.append({"loss": loss, "grad_norm": grad_norm})
        return [(record["loss"], record["grad_norm"]) for record in trainer.read_back(pending, CausalLM(), engine.mesh)]

    engine, fresh = start_engine(config), start_engine(config)
    train(engine, 0, 3)
    saver = Saver(root, engine.state.entries, CheckpointConfig())
    saver.save(RunState(3, 0, 0, "", {}, {}, world_size))
    assert saver.finish().error is None
    load_checkpoint(checkpoint_path(root, 3), fresh.state.entries)
    fresh.state.commit()
    same_records = train(engine, 3, 6) == train(fresh, 3, 6)
    return same_records, state_hashes(engine) == state_hashes(fresh)


def test_ddp_adds_up_in_the_same_order_after_a_resume(tmp_path: Path):
    # With three ranks and more the order matters, and DDP would change it after its first backward pass.
    assert run_ranks(resumed_in_memory, 3, 3, tmp_path) == [(True, True)] * 3


# The command


def read(*args: str) -> Any:
    from bigtrain.cli import hydra_cli, verify_resume

    return hydra_cli.compose_run(verify_resume.VerifyResumeConfig, ["+model=gpt_nano", *args])


def test_the_command_verifies_and_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from bigtrain.cli import verify_resume

    monkeypatch.chdir(tmp_path)
    code = verify_resume.run(read(*SMALL[1:], "world=1", "before=2", "after=2"))
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "uninterrupted  fsdp on 1 rank: steps 1 to 4"
    assert "weights           4           0             0" in [line.rstrip() for line in lines]
    assert lines[-1] == "THE SAME: killed in step 4 and resumed from step 2, bit by bit."
    assert list((tmp_path / "runs").iterdir()) == []


def test_the_command_says_what_differs_and_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from bigtrain.cli import verify_resume

    checks = [Check("loss", "1 to 6", 0.0, 0.0), Check("loss", "7 to 12", 3e-4, 1e-6)]
    verdict = Verdict(checks, "step 7, loss: 2.0 uninterrupted, 2.0006 resumed", is_bitwise=False)
    monkeypatch.setattr("bigtrain.testing.resume.verify_resume", lambda *_args, **_kwargs: verdict)
    assert verify_resume.run(read("world=1")) == 1
    out = capsys.readouterr().out
    assert "3.0e-04       1.0e-06   <--" in out
    assert "NOT THE SAME: first difference in step 7, loss: 2.0 uninterrupted, 2.0006 resumed" in out


def test_what_cannot_be_verified_is_refused_at_once(monkeypatch: pytest.MonkeyPatch):
    from bigtrain.cli import verify_resume

    monkeypatch.setenv("WORLD_SIZE", "2")
    args = ["world=2", "resume_world=3", "before=1", "after=0", "model.dropout=0.1", "checkpoint.resume=must"]
    with pytest.raises(BigtrainError) as caught:
        verify_resume.run(read(*args, "engine.offload=cpu", "resume_engine=ddp"))
    said = str(caught.value).splitlines()
    for start in (
        "before=1: must be at least 2",
        "after=0: must be at least 2",
        "start this command once",
        "checkpoint.resume=must: leave it out",
        "model.dropout=0.1: every rank",
        "engine.offload=cpu is not offered by engine=ddp",
    ):
        assert any(line.startswith(start) for line in said), start
    assert len(said) == 6


def test_what_holds_for_the_worlds_asked_for_is_accepted():
    from bigtrain.cli import verify_resume

    plan = verify_resume.plan_of(read("engine=hsdp", "engine.dp_shard=2", "world=2", "resume_engine=ddp"))
    same = {"resume_engine": EngineKind.ddp, "resume_parallel": ParallelConfig()}
    assert plan == Plan(before=6, after=6, world_size=2, resume_world_size=2, **same)
    plan = verify_resume.plan_of(read("parallel.pp=2", "world=2", "resume_tp=2", "resume_pp=1"))
    assert plan.resume_parallel == ParallelConfig(tp=2)


def test_misspelt_settings_are_named():
    with pytest.raises(BigtrainError, match="resume_wold: unknown key; did you mean 'resume_world'"):
        read("resume_wold=1")
