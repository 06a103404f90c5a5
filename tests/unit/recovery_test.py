"""What a run begins with, and what it goes back to: never to random weights that nobody has asked for."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.store import Origin, RunState, checkpoint_path
from bigtrain.config import CheckpointConfig, DataConfig, DataSource, Load, ModelConfig, RunConfig, TrainConfig
from bigtrain.config.check import resolve
from bigtrain.config.convert import to_dict
from bigtrain.data.order.cursor import Cursor
from bigtrain.data.read.tokenizer import build_tokenizer
from bigtrain.distributed.collectives import init_process_group, shut_down
from bigtrain.engine.state import MODEL, OPTIMIZER, whole_entry
from bigtrain.errors import CheckpointError, NoRestartError
from bigtrain.processes import RankInfo
from bigtrain.run.data import require_tokenizer
from bigtrain.run.recovery import Start, fill_state, find_start, go_back
from bigtrain.supervise.bad_numbers import RollBack
from bigtrain.telemetry.files import JsonLines

INFO = RankInfo(0, 1, 0, 1)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    init_process_group(INFO, torch.device("cpu"))
    yield
    shut_down()


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return resolve(
        TrainConfig(
            run=RunConfig(root=str(tmp_path / "runs"), name="first"),
            model=ModelConfig(name="small", hidden_dim=24, num_heads=3),
            data=DataConfig(source=DataSource.synthetic),
        )
    )


def named(config: TrainConfig, name: str, **checkpoint: Any) -> TrainConfig:
    settings = dataclasses.replace(config.checkpoint, **checkpoint)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, name=name), checkpoint=settings)


def save(config: TrainConfig, *steps: int, origin: Origin | None = None, weight: float = 1.0) -> list[Path]:
    """Save a checkpoint of two tensors at every step, and record it."""
    directory = config.run.directory
    entries = {f"{MODEL}w": whole_entry(torch.full((6,), weight)), f"{OPTIMIZER}w.m": whole_entry(torch.ones(6))}
    saver = Saver(directory, entries, CheckpointConfig(keep="all"))
    events = JsonLines(directory / "events.jsonl")
    for step in steps:
        saver.save(RunState(step, 0, 8 * step, "synthetic", to_dict(config), {}, 1, origin=origin))
        assert saver.finish().error is None
        events.write({"event": "checkpoint", "step": step})
    events.close()
    return [checkpoint_path(directory, step) for step in steps]


def damage(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")


class Samples:
    def __init__(self) -> None:
        self.left_out: list[tuple[int, int]] = []

    def leave_out(self, first: int, end: int) -> None:
        self.left_out.append((first, end))


class FakeEngine:
    def __init__(self) -> None:
        self.state, self.num_commits = self, 0
        self.weights, self.moments = torch.zeros(6), torch.full((6,), 7.0)
        self.entries = {f"{MODEL}w": whole_entry(self.weights), f"{OPTIMIZER}w.m": whole_entry(self.moments)}

    def commit(self) -> None:
        self.num_commits += 1


def back(config: TrainConfig, start: Start, first: int, last: int, *, begin: Cursor | None = None) -> Start:
    samples = Samples()
    begin = begin or Cursor()
    found = go_back(config, RollBack(first, last), samples, start=start, begin=begin, rollbacks=0)
    batch = config.train.global_batch_size
    assert samples.left_out == [tuple(begin.samples + (step - begin.step) * batch for step in (first - 1, last))]
    return found


def test_a_seeded_run_goes_back_to_its_seed(config: TrainConfig):
    (seed,) = save(config, 60)
    grown = named(config, "grown", resume=str(config.run.directory))
    start = find_start(grown)
    assert (start.checkpoint, start.origin) == (seed, Origin(checkpoint=str(seed)))
    begin = start.read_state().cursor
    assert begin.step == 60
    assert back(grown, start, 65, 66, begin=begin) == start
    # What is saved later remembers it, whatever the command then says.
    (own,) = save(grown, 70, origin=start.origin)
    later = find_start(named(grown, "grown", resume="auto"))
    assert later == Start(start.origin, own)
    assert back(grown, later, 75, 76).checkpoint == own
    assert back(grown, later, 65, 66).checkpoint == seed


def test_a_seed_that_is_gone_or_damaged_ends_the_run(config: TrainConfig):
    (seed,) = save(config, 60)
    grown = named(config, "grown", resume=str(seed))
    start = find_start(grown)
    damage(seed)
    with pytest.raises(NoRestartError, match=r"the checkpoint that it began with is not whole: .*its hash is"):
        back(grown, start, 65, 66)
    shutil.rmtree(seed)
    with pytest.raises(
        NoRestartError, match=r"cannot go back: the checkpoint that it began with is not whole: .*no man"
    ):
        back(grown, start, 65, 66)


def test_a_run_from_scratch_goes_back_to_its_initial_values(config: TrainConfig):
    start = find_start(config)
    assert (start.checkpoint, start.read_state()) == (None, None)
    assert back(config, start, 3, 4) == start


def test_published_weights_are_what_a_run_goes_back_to_or_it_ends(config: TrainConfig):
    model = dataclasses.replace(config.model, init_from="gpt2")
    start = find_start(dataclasses.replace(config, model=model))
    assert start.origin == Origin(published="gpt2")
    assert back(dataclasses.replace(config, model=model), start, 3, 4) == start
    with pytest.raises(NoRestartError, match="it began with gpt2, which the model's settings no longer say"):
        back(config, start, 3, 4)


@pytest.mark.parametrize(
    ("changes", "origin"),
    [
        ({}, Origin()),
        ({"checkpoint": {"resume": "runs/seed"}}, Origin(checkpoint="runs/seed")),
        ({"model": {"init_from": "gpt2"}}, Origin(published="gpt2")),
        ({"model": {"name": "gpt2", "pretrained": True}}, Origin(published="gpt2")),
    ],
)
def test_checkpoints_from_before_say_it_by_their_configuration(
    changes: dict[str, dict[str, Any]], origin: Origin, config: TrainConfig
):
    sections = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
    (path,) = save(dataclasses.replace(config, **sections), 5)
    assert find_start(dataclasses.replace(config, **sections)) == Start(origin, path)


@pytest.mark.parametrize("newer", [True, False], ids=["pruned", "all gone"])
def test_a_run_whose_checkpoints_before_are_gone_does_not_begin_again(newer: bool, config: TrainConfig):
    start = find_start(config)
    older, newest = save(config, 10, 20)
    assert back(config, start, 15, 21).checkpoint == older
    shutil.rmtree(older)
    if not newer:
        shutil.rmtree(newest)
    with pytest.raises(
        NoRestartError, match=r"cannot go back: its checkpoints .* are gone \(step 10 was saved; .*keep="
    ):
        back(config, start, 15, 21)


def test_a_damaged_checkpoint_before_is_set_aside_for_the_one_before_it(config: TrainConfig):
    start = find_start(config)
    older, newer = save(config, 10, 20)
    damage(newer)
    assert back(config, start, 25, 26).checkpoint == older


def test_of_a_seed_only_the_weights_may_be_taken(config: TrainConfig):
    (seed,) = save(config, 60, weight=3.0)
    engine, grown = FakeEngine(), named(config, "grown", resume=str(seed), load=Load.weights)
    start = find_start(grown)
    assert (start.weights_only, start.read_state()) == (True, None)
    assert fill_state(grown, engine, start, INFO) == Cursor()
    assert engine.weights.tolist() == [3.0] * 6 and engine.moments.tolist() == [0.0] * 6 and engine.num_commits == 1
    assert back(grown, start, 3, 4) == start
    whole = find_start(named(config, "grown", resume=str(seed)))
    assert fill_state(grown, engine, whole, INFO).step == 60
    assert engine.moments.tolist() == [1.0] * 6
    # Its own checkpoints are loaded whole.
    (own,) = save(grown, 5, origin=start.origin)
    assert find_start(grown) == Start(start.origin, own)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_not_saved(value: float, tmp_path: Path):
    weights = torch.zeros(1000)
    saver = Saver(tmp_path, {f"{MODEL}w": whole_entry(weights)}, CheckpointConfig())
    weights[::2] = 3e38  # their sum is infinite, they are not
    saver.save(RunState(1, 0, 0, "synthetic", {}, {}, 1))
    assert saver.finish().error is None
    weights[[3, 999]] = value
    saver.save(RunState(2, 0, 0, "synthetic", {}, {}, 1))
    assert saver.finish().error == "rank 0: CheckpointError: 2 numbers of model.w are not finite"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_tokenizers_are_compared_by_what_they_do(tmp_path: Path):
    checkpoint = tmp_path / "run/checkpoints/step-00000005"
    checkpoint.mkdir(parents=True)
    stream = Samples()
    stream.tokenizer_directory = tmp_path / "corpus"
    stream.tokenizer_directory.mkdir()

    def write(directory: Path, text: str) -> None:
        bpe = build_tokenizer(DataConfig(tokenizer="bpe", tokenizer_vocab_size=300), [text] * 9).tokenizer
        (directory / "tokenizer.json").write_text(bpe.to_str(pretty=directory.name == "run"))

    write(stream.tokenizer_directory, "the cat sat on the mat and the hat")
    require_tokenizer(checkpoint, stream)  # its run does not say which it was
    write(tmp_path / "run", "the cat sat on the mat and the hat")
    require_tokenizer(checkpoint, stream)  # the same, written otherwise
    write(stream.tokenizer_directory, "wo der Hund auf dem Boden lag und schlief")
    before = (tmp_path / "run/tokenizer.json").read_bytes()
    with pytest.raises(
        CheckpointError, match=rf"the same ids are other text; data.tokenizer={tmp_path}/run keeps"
    ) as caught:
        require_tokenizer(checkpoint, stream)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run/tokenizer.json").read_bytes() == before
    stream.tokenizer_directory = None
    require_tokenizer(checkpoint, stream)
