"""Training as a user sees it: commands, exit codes, files, interruptions."""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from bigtrain.checkpoint.store import find_checkpoints, step_of
from bigtrain.config import TrainConfig
from bigtrain.config.convert import from_dict
from bigtrain.optim.schedule import lr_at
from bigtrain.run.evaluation import validate_run
from bigtrain.testing.ranks import run_ranks
from tests.distributed.launches import (
    SMALL,
    TRAIN,
    Launch,
    Result,
    events,
    fork,
    launch,
    metrics,
    num_steps,
    torchrun,
    trajectory,
)

ENDLESS = [
    *(arg for arg in SMALL if not arg.startswith("train.steps=")),
    "train.steps=1000000",
    "model.dropout=0.1",
    "checkpoint.every_steps=10",
]
RUN = Path("runs/gpt_nano")


def train(cwd: Path, *args: str, world_size: int = 1) -> Result:
    """Run the training command on forked ranks."""
    return fork("train.py", *SMALL, *args, cwd=cwd, world_size=world_size)


def copy_of(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def contents(directory: Path) -> dict[Path, bytes]:
    """Return all files, but those that say of every launch that it was there."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if path.name not in ("attempt.json", "exit.json")}


# A run and what it leaves


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A finished run of a plain process: its working directory and how it ended."""
    cwd = tmp_path_factory.mktemp("finished")
    often = ["checkpoint.every_steps=3", "validation.every_steps=4", "validation.batches=2"]
    return cwd, launch([sys.executable, TRAIN, *SMALL, *often], cwd)


def test_a_run_leaves_the_files_that_it_promises(finished: tuple[Path, Result]):
    cwd, result = finished
    assert (result.code, result.err) == (0, "")
    run = cwd / RUN
    assert sorted(path.name for path in run.iterdir()) == [
        "attempt.json",
        "checkpoints",
        "config.yaml",
        "events.jsonl",
        "exit.json",
        "log",
        "metrics.jsonl",
    ]
    config = from_dict(TrainConfig, yaml.safe_load((run / "config.yaml").read_text()))
    assert (config.run.name, config.train.steps, config.data.sequence_length) == ("gpt_nano", 8, 16)
    assert config.engine.precision is not None
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
    log = (run / "log/train.log").read_text().splitlines()
    assert [line.split(maxsplit=1)[1] for line in log] == result.out.splitlines()
    assert "finished after step 8" in log[-1]


def test_metrics_have_one_object_per_step(finished: tuple[Path, Result]):
    cwd, _ = finished
    records = metrics(cwd / RUN)
    config = from_dict(TrainConfig, yaml.safe_load((cwd / RUN / "config.yaml").read_text()))
    assert [record["step"] for record in records] == list(range(1, 9))
    for record in records:
        assert record.keys() >= {"tokens", "loss", "grad_norm", "lr", "step_seconds", "tokens_per_second"}
        assert record["tokens"] == record["step"] * 8 * 16
        assert record["tokens_per_second"] == pytest.approx(8 * 16 / record["step_seconds"])
        assert record["lr"] == lr_at(record["step"] - 1, peak_lr=1e-2, num_steps=8, config=config.scheduler)
    assert [event["step"] for event in events(cwd / RUN, "checkpoint")] == [3, 6, 8]
    assert [event["step"] for event in events(cwd / RUN, "validation")] == [4, 8]


def test_the_same_command_says_that_a_finished_run_is_finished(finished: tuple[Path, Result]):
    cwd, _ = finished
    before = contents(cwd)
    result = train(cwd)
    assert (result.code, result.out) == (0, "")
    assert result.err.startswith(f"{RUN} is finished at step 8;")
    assert result.err.count("\n") == 1
    assert train(cwd, "train.steps=5").err == f"{RUN} is at step 8 already, beyond train.steps=5: nothing is trained\n"
    assert contents(cwd) == before


# Stopping and continuing


def test_a_stopped_run_continues_bitwise_under_torchrun(tmp_path: Path):
    settings = ["model.dropout=0.1", "engine=fsdp"]
    train(tmp_path, *settings, "run.name=whole", world_size=2)
    stop = "run.stop_after_steps=3"
    first = launch(torchrun(2, TRAIN, *SMALL, *settings, "run.name=parts", stop), tmp_path)
    assert first.code == 0, "torchrun would take another code for a failure"
    assert "run.stop_after_steps" in first.out
    assert "The same command continues" in first.out
    assert [step for step, *_ in trajectory(tmp_path / "runs/parts")] == [1, 2, 3]
    second = train(tmp_path, *settings, "run.name=parts", stop, world_size=2)
    assert second.code == 75
    assert "continuing after step 3" in second.out
    third = train(tmp_path, *settings, "run.name=parts", world_size=2)
    assert third.code == 0
    assert trajectory(tmp_path / "runs/parts") == trajectory(tmp_path / "runs/whole")
    # The negative control of the comparison: dropout is on, and other random numbers would show.
    train(tmp_path, "run.name=other", world_size=2)
    assert trajectory(tmp_path / "runs/parts")[0] != trajectory(tmp_path / "runs/other")[0]


def interrupt(
    command: list[str], cwd: Path, number: int, condition: Callable[[], bool], *, repeat: bool = False
) -> tuple[Result, int]:
    """Send a signal to a launch when ``condition`` holds; return how it ended and how many steps the run has then.

    With ``repeat`` it is sent until the run is saved, as launchers repeat what the terminal has sent already.
    """
    with Launch(command, cwd) as running:
        running.wait_until(condition)
        running.process.send_signal(number)
        while repeat and "continues" not in running.output() and running.process.poll() is None:
            running.process.send_signal(number)
            time.sleep(0.02)
        result = running.result()
    return result, num_steps(cwd / RUN)


def has_steps(run: Path, number: int) -> Callable[[], bool]:
    return lambda: num_steps(run) >= number


def newest_checkpoint(run: Path) -> int:
    return max((step_of(path) for path in find_checkpoints(run)), default=0)


def assert_bitwise_uninterrupted(cwd: Path, world_size: int) -> None:
    """Compare all steps so far with those of a run that was never interrupted."""
    steps = num_steps(cwd / RUN)
    fork("train.py", *ENDLESS, "run.name=whole", f"run.stop_after_steps={steps}", cwd=cwd, world_size=world_size)
    assert [step for step, *_ in trajectory(cwd / RUN)] == list(range(1, steps + 1))
    assert trajectory(cwd / RUN) == trajectory(cwd / "runs/whole")


def test_signals_save_and_a_kill_costs_only_steps(tmp_path: Path):
    command, run = [sys.executable, TRAIN, *ENDLESS], tmp_path / RUN
    steps = 0
    for name in ("SIGINT", "SIGTERM"):
        result, steps = interrupt(command, tmp_path, getattr(signal, name), has_steps(run, steps + 3), repeat=True)
        assert (result.code, result.err) == (75, "")
        last_words = result.out.splitlines()[-1]
        assert f"stopped by {name} after step {steps}" in last_words
        assert "The same command continues" in last_words
        assert newest_checkpoint(run) == steps
    result, killed_at = interrupt(
        command, tmp_path, signal.SIGKILL, lambda: steps < newest_checkpoint(run) < num_steps(run)
    )
    assert result.code == -signal.SIGKILL
    newest = newest_checkpoint(run)
    result = fork("train.py", *ENDLESS, f"run.stop_after_steps={killed_at - newest + 2}", cwd=tmp_path)
    assert f"continuing after step {newest}" in result.out
    assert num_steps(run) == killed_at + 2
    assert [event["reason"] for event in events(run, "stop")] == ["SIGINT", "SIGTERM", "run.stop_after_steps"]
    assert_bitwise_uninterrupted(tmp_path, world_size=1)


def test_signals_to_torchrun_save(tmp_path: Path):
    run, command = tmp_path / RUN, torchrun(2, TRAIN, *ENDLESS)
    result, steps = interrupt(command, tmp_path, signal.SIGINT, has_steps(run, 3))
    assert f"stopped by SIGINT after step {steps}" in result.out.splitlines()[-1]
    assert newest_checkpoint(run) == steps
    assert "[rank" not in result.err and "Traceback" not in result.err, "`make install` tells torchrun of this package"
    assert_bitwise_uninterrupted(tmp_path, world_size=2)


# Continuing in other circumstances


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a run that two ranks under FSDP stopped after step 4."""
    cwd = tmp_path_factory.mktemp("stopped")
    assert train(cwd, "run.stop_after_steps=4", world_size=2).code == 75
    return cwd


@pytest.mark.parametrize(("engine", "world_size"), [("zero2", 1), ("hsdp", 4)])
def test_another_engine_and_world_size_continue(
    engine: str, world_size: int, stopped: Path, finished: tuple[Path, Result], tmp_path: Path
):
    cwd = copy_of(stopped, tmp_path)
    result = train(cwd, f"engine={engine}", world_size=world_size)
    assert result.code == 0
    assert f"changed since the checkpoint: engine.kind: fsdp -> {engine}" in result.err + result.out
    expected = trajectory(finished[0] / RUN)
    for step, expected_step in zip(trajectory(cwd / RUN), expected, strict=True):
        assert step == pytest.approx(expected_step, rel=1e-6)
    assert events(cwd / RUN, "resume")[0]["world_size"] == world_size


def test_another_learning_rate_is_accepted_and_said(stopped: Path, tmp_path: Path):
    cwd = copy_of(stopped, tmp_path)
    result = train(cwd, "optimizer.lr=5e-3")
    assert result.code == 0
    said = [line for line in (result.err + result.out).splitlines() if "changed" in line]
    changes = ["optimizer.lr: 0.01 -> 0.005", "world size: 2 -> 1"]
    assert said == [f"changed since the checkpoint: {change}" for change in changes]
    assert events(cwd / RUN, "resume")[0]["changed"] == changes
    log = (cwd / RUN / "log/train.log").read_text()
    assert all(line in log for line in said)
    assert yaml.safe_load((cwd / RUN / "config.yaml").read_text())["optimizer"]["lr"] == 5e-3
    lrs = [record["lr"] for record in metrics(cwd / RUN)]
    assert lrs[4] < 0.7 * lrs[3]


def assert_refused(result: Result, *messages: str) -> None:
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err
    for message in messages:
        assert message in result.err


def test_another_shape_is_refused_with_the_differences(stopped: Path, tmp_path: Path):
    cwd = copy_of(stopped, tmp_path)
    before = contents(cwd)
    result = train(cwd, "model.num_layers=3", "model.hidden_dim=48")
    assert_refused(result, "step-00000004 holds another model")
    assert "model.num_layers: 2 in the checkpoint, 3 now" in result.err
    assert "model.hidden_dim: 24 in the checkpoint, 48 now" in result.err
    assert "model.num_heads" not in result.err
    assert contents(cwd) == before


def test_other_data_is_refused(stopped: Path, tmp_path: Path):
    cwd = copy_of(stopped, tmp_path)
    before = contents(cwd)
    assert_refused(train(cwd, "data.synthetic_ragged=true"), "trained on other data", "another run.name")
    assert contents(cwd) == before


def test_resume_never_and_must(stopped: Path, tmp_path: Path):
    cwd = copy_of(stopped, tmp_path)
    assert_refused(train(cwd, "checkpoint.resume=never"), "checkpoint.resume=never, but", "step-00000004 exists")
    assert_refused(train(cwd, "checkpoint.resume=must", "run.name=new"), "runs/new has no complete checkpoint")
    assert not (cwd / "runs/new").exists()
    assert train(cwd, "checkpoint.resume=never", "run.name=new", "run.stop_after_steps=1").code == 75
    assert train(cwd, "checkpoint.resume=must", "run.stop_after_steps=1").code == 75
    assert num_steps(cwd / RUN) == 5


def test_a_run_whose_checkpoints_are_gone_says_so_and_stops(stopped: Path, tmp_path: Path):
    cwd = copy_of(stopped, tmp_path)
    shutil.rmtree(cwd / RUN / "checkpoints")
    for _ in range(2):
        result = train(cwd)
        assert_refused(result, f"{RUN} had saved step 4, but {RUN}/checkpoints is not there", "checkpoint.resume=never")
    result = train(cwd, "checkpoint.resume=never", "run.stop_after_steps=1")
    assert result.code == 75 and "starts anew at step 0, and its metrics too" in result.err + result.out
    assert [step for step, *_ in trajectory(cwd / RUN)] == [1]
    assert train(cwd, "run.stop_after_steps=1").code == 75  # as any other run that has a checkpoint
    assert num_steps(cwd / RUN) == 2


def test_another_optimizer_begins_with_the_weights(stopped: Path, tmp_path: Path):
    cwd = copy_of(stopped, tmp_path)
    assert_refused(train(cwd, "optimizer=sgd"), "optimizer.kind: adamw in the checkpoint, sgd now", "load=weights")
    assert not (cwd / RUN / "failure.json").exists()
    settings = ["optimizer=sgd", f"checkpoint.resume={RUN}", "checkpoint.load=weights", "run.name=new"]
    first = train(cwd, *settings, "run.stop_after_steps=2")
    assert f"beginning at step 0 with the weights of {RUN}/checkpoints/step-00000004" in first.out
    assert train(cwd, *settings, "run.stop_after_steps=2").code == 75
    (_step, loss, *_), *_ = new = trajectory(cwd / "runs/new")
    assert [step for step, *_ in new] == [1, 2, 3, 4]
    assert loss < trajectory(cwd / RUN)[0][1] - 0.01, "no better than random weights"


@pytest.mark.parametrize("path", [RUN, RUN / "checkpoints/step-00000004"], ids=["run", "checkpoint"])
def test_a_new_run_starts_from_a_path_and_then_continues_itself(
    path: Path, stopped: Path, finished: tuple[Path, Result], tmp_path: Path
):
    cwd = copy_of(stopped, tmp_path)
    before = contents(cwd / RUN)
    first = train(cwd, f"checkpoint.resume={path}", "run.name=new", "run.stop_after_steps=2")
    assert first.code == 75
    assert f"continuing after step 4 from {RUN}/checkpoints/step-00000004" in first.out
    second = train(cwd, f"checkpoint.resume={path}", "run.name=new")
    assert "continuing after step 6 from runs/new/" in second.out
    new = trajectory(cwd / "runs/new")
    assert [step for step, *_ in new] == [5, 6, 7, 8]
    assert new[-1] == pytest.approx(trajectory(finished[0] / RUN)[-1], rel=1e-6)
    assert contents(cwd / RUN) == before


def test_a_path_without_a_checkpoint_is_refused(tmp_path: Path):
    assert_refused(train(tmp_path, "checkpoint.resume=elsewhere"), "elsewhere", "checkpoint")
    assert list(tmp_path.iterdir()) == []


# Text: validation and generation


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a run on a small corpus whose validation split is smaller than a global batch."""
    cwd = tmp_path_factory.mktemp("text")
    (cwd / "texts").mkdir()
    words = random.Random(0)
    for number in range(40):
        text = " ".join(words.choice(["the", "quick", "brown", "fox", "jumps"]) for _ in range(40))
        (cwd / f"texts/{number}.txt").write_text(text)
    result = train(
        cwd,
        *["data=text", "data.path=texts", "data.tokenizer=bytes", "model.vocab_size=257", "model.num_heads=2"],
        *["train.global_batch_size=64", "validation.every_steps=8", "validation.batches=3"],
        world_size=2,
    )
    assert result.code == 0, result.err
    index = yaml.safe_load((cwd / RUN / "index.json").read_text())
    assert 0 < index["validation"]["num_tokens"] // 16 < 64
    return cwd


def test_a_launch_says_what_will_run(text_run: Path):
    (start,) = events(text_run / RUN, "start")
    lines = start["banner"]
    assert len(lines) <= 12 and max(map(len, lines)) <= 80
    assert "step        64 samples = 2 x 16 micro-batches x 2 ranks; 1,024 tokens" in lines
    assert any("only 2 documents: a noisy loss" in line for line in lines), "two validation documents"
    assert "\n".join(line[:12].strip() for line in lines if line[0] != " ").split() == [
        *["run", "model", "data", "validation", "machine", "step", "length", "memory", "watchdog"]
    ]


def validate_in(cwd: Path) -> dict[str, float]:
    os.chdir(cwd)
    return validate_run(RUN).metrics


def test_validation_is_the_same_number_for_every_world_size(text_run: Path):
    (event,) = events(text_run / RUN, "validation")
    for world_size in (1, 2, 4):
        for result in run_ranks(validate_in, world_size, text_run):
            assert result["step"] == 8
            assert result["loss"] == pytest.approx(event["loss"], rel=1e-6)
            assert result["perplexity"] == pytest.approx(event["perplexity"], rel=1e-5)


def test_the_validate_command_prints_that_number(text_run: Path):
    (event,) = events(text_run / RUN, "validation")
    result = fork("validate.py", f"checkpoint={RUN}", cwd=text_run, world_size=2)
    assert (result.code, result.err) == (0, "")
    printed = dict(line.split() for line in result.out.splitlines())
    assert printed["step"] == "8"
    assert float(printed["loss"]) == pytest.approx(event["loss"], abs=1e-4)
    assert float(printed["loss"]) < float(printed["unigram_entropy"]) + 2.5


def test_the_generate_command_continues_a_prompt(text_run: Path):
    args = [f"checkpoint={RUN}", "prompt=the quick ", "num_samples=2", "max_new_tokens=12"]
    result = fork("generate.py", *args, cwd=text_run)
    assert (result.code, result.err) == (
        0,
        "a text ends where the model does: it takes 16 tokens in all, and the prompt has 10\n",
    )
    assert result.out.startswith("--- 1 of 2 ---\nthe quick ")
    assert "--- 2 of 2 ---\nthe quick " in result.out
    assert fork("generate.py", *args, cwd=text_run).out == result.out
    assert fork("generate.py", *args, "seed=1", cwd=text_run).out != result.out


def test_ranks_that_share_the_weights_write_the_texts_of_one_process(text_run: Path):
    (text_run / "prompts.txt").write_text("the qui\nfox\n\nbrown fox\n")
    args = [f"checkpoint={RUN}", "prompts=prompts.txt", "num_samples=2", "max_new_tokens=9"]
    alone = fork("generate.py", *args, cwd=text_run)
    assert alone.code == 0, alone.err
    assert [line for line in alone.out.splitlines() if line.startswith("---")][-1] == "--- 6 of 6 ---"
    for world_size, tp in ((2, 1), (2, 2)):
        shared = fork("generate.py", *args, f"tp={tp}", cwd=text_run, world_size=world_size)
        assert (shared.code, shared.out) == (0, alone.out), shared.err
    validated = fork("validate.py", f"checkpoint={RUN}", "tp=2", cwd=text_run, world_size=2)
    assert validated.out == fork("validate.py", f"checkpoint={RUN}", cwd=text_run).out


@pytest.mark.parametrize("command", [["validate.py"], ["generate.py", "prompt=x"]], ids=lambda c: c[0])
def test_a_missing_run_is_one_message(command: list[str], tmp_path: Path):
    result = fork(*command, "checkpoint=runs/nowhere", cwd=tmp_path)
    assert_refused(result, "runs/nowhere")
    assert result.err.count("\n") == 1


# Mishaps


def assert_one_message(result: Result, message: str) -> None:
    """Check that ranks under torchrun ended with code 2 and one message, the only traceback being torchrun's own."""
    assert result.code == 1, "torchrun's own code for any failed rank"
    assert "exitcode  : 2" in result.err.partition("Root Cause")[2]
    assert result.err.count(message) == 1
    assert result.err.count("Traceback") == 1
    assert "Traceback" not in result.err.partition(message)[0]


def test_a_run_that_cannot_fit_stops_before_anything_is_allocated(tmp_path: Path):
    # The preset that the manual names, unless this machine is large enough to train it.
    model = "gpt3_1b" if psutil.virtual_memory().available < 40 * 2**30 else "gpt3_175b"
    confined = ["bash", "-c", f'ulimit -d {3 * 2**20} && exec "$@"', "-"]
    result = launch([*confined, sys.executable, TRAIN, f"+model={model}"], tmp_path)
    assert_refused(result, f"{model} does not fit")
    for component in ("parameters", "gradients", "optimizer moments", "activations", "loss buffers", "needed"):
        assert component in result.err
    assert list(tmp_path.iterdir()) == []


def test_preflight_warn_goes_on(tmp_path: Path):
    # The next check stops it, in time.
    result = fork("train.py", "+model=gpt3_175b", "preflight=warn", "checkpoint.resume=must", cwd=tmp_path)
    assert_refused(result, "gpt3_175b does not fit", "checkpoint.resume=must, but")
    assert "preflight=warn goes on" not in result.err


FAULTY = """
from bigtrain.cli import hydra_cli, train
from bigtrain.run import trainer

whole_step = trainer.train_step

def train_step(engine, batch, lr, **options):
    if batch.step == 3 and engine.mesh.dp_rank == 1:
        raise ZeroDivisionError("a fault on rank 1")
    return whole_step(engine, batch, lr, **options)

trainer.train_step = train_step
hydra_cli.main(hydra_cli.read_run, train.run, train.help_page)
"""


def test_a_fault_of_one_rank_ends_all_and_is_shown(tmp_path: Path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    result = launch(torchrun(2, str(script), *SMALL, "checkpoint.every_steps=2"), tmp_path)
    assert result.code == 1
    # torchrun's report names the earliest fault, but in whole seconds; rank 0's lost connection may share one.
    assert "ZeroDivisionError: a fault on rank 1" in result.err.partition("ChildFailedError")[2]
    assert result.err.index("[rank1]: ZeroDivisionError") < result.err.index("ChildFailedError")
    assert (tmp_path / RUN / "checkpoints/step-00000002").is_dir()
    assert not (tmp_path / RUN / "checkpoints/step-00000004").exists()


def test_missing_data_is_one_message_from_one_rank(tmp_path: Path):
    command = torchrun(
        2, TRAIN, *SMALL, "data=text", "data.path=nowhere", "data.tokenizer=bytes", "model.vocab_size=257"
    )
    result = launch(command, tmp_path)
    assert_one_message(result, "nowhere")
    assert not (tmp_path / "runs").exists()


def test_a_run_directory_that_cannot_be_written_is_one_message(tmp_path: Path):
    (tmp_path / "runs").write_text("a file")
    result = train(tmp_path, world_size=2)
    assert_refused(result, "runs/gpt_nano", "cannot be written")
    assert result.err.count("\n") == 1


def test_metrics_that_cannot_be_written_are_one_message(tmp_path: Path):
    (tmp_path / RUN / "metrics.jsonl").mkdir(parents=True)
    result = train(tmp_path, world_size=2)
    assert_refused(result, "runs/gpt_nano", "cannot be written")
    assert result.err.count("\n") == 1
