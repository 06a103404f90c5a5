"""Columns that a model writes beside samples: transformers' numbers at any world size and after a kill, read by training."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from bigtrain.config import (
    CheckpointConfig,
    Content,
    DataConfig,
    DataSource,
    Divergence,
    EngineKind,
    Packing,
    PreferenceLoss,
    RunConfig,
    Scored,
    TaskConfig,
)
from bigtrain.config.check import check, resolve
from bigtrain.config.score import ScoreConfig
from bigtrain.data.read.scores import SCORES_FILE
from bigtrain.distributed.collectives import shut_down
from bigtrain.errors import BigtrainError
from bigtrain.run import launching, scored
from bigtrain.run.data import open_data
from bigtrain.run.scoring import score_samples
from bigtrain.tasks.base import IGNORE_INDEX
from bigtrain.tasks.distillation import Distillation
from bigtrain.tasks.kto import KTO
from bigtrain.testing.parity import Case, compare, configure, trace
from bigtrain.testing.ranks import run_ranks
from tests.distributed.launches import LAUNCH, Launch, fork
from tests.distributed.ranks import small_config, with_engine

STEPS = 3
ENGINES = ("ddp", "fsdp", "zero2", "zero3")
SHAPE = {"vocab_size": 264, "max_positions": 96}
ARGS = [
    *("+model=gpt_nano", "model.num_layers=2", "model.hidden_dim=24", "model.num_heads=3", "model.vocab_size=264"),
    *("model.max_positions=96", "data=jsonl", "data.tokenizer=bytes", "batch_size=3", "part_samples=7"),
]
PAIRS = [*ARGS, "task=preference", "data.content=preference", "data.path=pairs.jsonl"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with pairs of answers, questions with answers, and a published model."""
    place = tmp_path_factory.mktemp("score")
    rows = [
        {"prompt": f"say {n}", "chosen": f"{n}, gladly" * (n % 3 + 1), "rejected": "no" * (n % 5 + 1)}
        for n in range(60)
    ]
    (place / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    rated = [{"prompt": row["prompt"], "completion": row["chosen"], "label": n % 3 > 0} for n, row in enumerate(rows)]
    (place / "rated.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rated))
    answers = [{"prompt": row["prompt"], "answer": row["chosen"]} for row in rows]
    (place / "answers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in answers))
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    llama = transformers.LlamaConfig(**shape, vocab_size=264, max_position_embeddings=96, initializer_range=0.3)
    transformers.LlamaForCausalLM(llama).save_pretrained(place / "llama")
    return place


def configuration(place, task, content):
    config = small_config("ddp", model=SHAPE)
    files = {Content.preference: "pairs.jsonl", Content.rated: "rated.jsonl", Content.pairs: "answers.jsonl"}
    path = str(place / files[content])
    config.data = DataConfig(source=DataSource.jsonl, path=path, root=str(place / "data"), content=content)
    config.data.tokenizer, config.task = "bytes", task
    if content is Content.pairs:
        config.data.packing = Packing.best_fit
    return resolve(config)


def asking(config, **asked):
    return ScoreConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)}, **asked)


def by_transformers(place, samples, name):
    """Return the log-probability of the answers of pairs."""
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "llama")
    tokens, targets = samples[name], samples[f"{name}_targets"]
    with torch.no_grad():
        log_p = model(tokens).logits.log_softmax(dim=-1)
    return (log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != IGNORE_INDEX)).sum(dim=1)


@pytest.mark.parametrize("world_sizes", [(1, 2), pytest.param((3, 4), marks=pytest.mark.slow)])
def test_log_probabilities_are_those_of_transformers_on_any_number_of_ranks(place, world_sizes):
    config = configuration(place, TaskConfig(kind="preference"), Content.preference)
    for world_size in world_sizes:
        done = fork("score.py", *PAIRS, "by=llama", f"out=of{world_size}", cwd=place, world_size=world_size)
        assert done.code == 0 and f"of{world_size}: 60 samples" in done.out, done.err
        for side, stream in open_data(config).items():
            samples = stream.gather(np.arange(stream.num_ids))
            expected = torch.stack([by_transformers(place, samples, name) for name in ("chosen", "rejected")], dim=1)
            found = np.load(place / f"of{world_size}" / f"{side}.log_probabilities.npy")
            assert found.dtype == np.float32 and np.allclose(found, expected, rtol=1e-6, atol=1e-5)
    assert not list(place.glob("*.parts"))


def test_killed_it_goes_on_where_it_was(place):
    args = [*(arg for arg in PAIRS if "part_" not in arg), "by=llama", "out=killed", "part_samples=1"]
    parts = place / "killed.parts"
    with Launch([sys.executable, str(LAUNCH / "score.py"), *args], place) as running:
        running.wait_until(lambda: len(list(parts.glob("*.npz"))) > 3)
    num_done = len(list(parts.glob("*.npz")))
    assert num_done < 60 and not (place / "killed").exists()
    done = fork("score.py", *args, "task.loss=ipo", "what=embeddings", cwd=place)
    assert done.code == 2 and "has parts of another request (what)" in done.err
    marked = np.full((1, 2), 7, dtype=np.float32)
    np.savez(parts / "train-000000000001.npz", log_probabilities=marked)
    done = fork("score.py", *args, cwd=place, world_size=2)
    assert f"{num_done} of 60 parts are there already" in done.out + done.err
    found, whole = (np.load(place / name / "train.log_probabilities.npy") for name in ("killed", "of1"))
    assert (found[1] == marked).all() and np.allclose(np.delete(found, 1, 0), np.delete(whole, 1, 0), atol=1e-5)
    assert "exists already" in fork("score.py", *args, cwd=place).err


def traces(configs, engines, world_size):
    cases = [Case(EngineKind[engine], world_size, 2) for engine in engines]
    return [[trace(configure(config, case), num_steps=STEPS) for case in cases] for config in configs]


def traces_of_others(distillation, rated):
    """Train with a divergence that is a mean over the micro-batch, as others have it, and with KTO without its mean."""
    whole, kto = Distillation.__call__, KTO.__call__
    Distillation.__call__ = lambda self, *args: (sums := whole(self, *args)) * (8 / sums[1].detach().clamp(min=1))
    KTO.__call__ = lambda self, network, *args: kto(self, network, *args[:-1], torch.zeros_like(args[-1]))
    return [trace(configure(config, Case(EngineKind.ddp, 2, 1)), num_steps=STEPS) for config in (distillation, rated)]


@pytest.mark.slow
def test_objectives_that_read_them_are_equal_under_every_engine(place):
    reference = configuration(place, TaskConfig(kind="preference"), Content.preference)
    forward = configuration(place, TaskConfig(kind="distillation"), Content.pairs)
    kto = TaskConfig(kind="preference", loss=PreferenceLoss.kto, beta=0.5, undesirable_weight=1.5)
    rated = configuration(place, kto, Content.rated)
    task = TaskConfig(kind="distillation", divergence=Divergence.reverse, teacher_temperature=2.0, teacher_weight=0.8)
    assert score_samples(asking(reference, out=str(place / "reference"))) == 60
    score_samples(asking(forward, out=str(place / "teacher"), by=str(place / "llama"), top_k=16))
    score_samples(asking(rated, out=str(place / "rated"), by=str(place / "llama")))
    for config, scores in ((reference, "reference"), (forward, "teacher"), (rated, "rated")):
        config.data.scores = str(place / scores)
    configs = [reference, forward, dataclasses.replace(forward, task=task), rated]
    assert all(check(config, world_size=2, local_world_size=2) == [] for config in configs)
    expected = [found[0] for found in run_ranks(traces, 1, configs, ["ddp"], 1)[0]]
    assert expected[0].losses[0] == pytest.approx(0.6931472, abs=1e-6), "the model begins as its own reference"
    for world_size, engines in ((2, ENGINES), (3, ("fsdp",))):
        found = run_ranks(traces, world_size, configs, engines, world_size, timeout_seconds=280)[0]
        for config, whole, by_engine in zip(configs, expected, found, strict=True):
            for engine, trajectory in zip(engines, by_engine, strict=True):
                difference = compare(trajectory, whole)
                where = config.task, engine, world_size, difference
                assert difference.loss <= 1e-5 and difference.grad_norm <= 1e-5, where
    for other, whole in zip(run_ranks(traces_of_others, 2, forward, rated)[0], expected[1::2], strict=True):
        assert compare(other, whole).loss > 1e-3


def test_distillation_goes_on_where_it_was_and_with_no_other_teacher(place, tmp_path):
    config = configuration(place, TaskConfig(kind="distillation"), Content.pairs)
    for teacher, top_k in (("teacher", 8), ("other", 4)):
        score_samples(asking(config, out=str(tmp_path / teacher), by=str(place / "llama"), top_k=top_k))

    def losses(root, engine, teacher="teacher", **run):
        config.checkpoint = CheckpointConfig(every_steps=3)
        config.data = dataclasses.replace(config.data, scores=str(tmp_path / teacher))
        config.run = RunConfig(name="run", root=str(tmp_path / root), **run)
        launching.run(with_engine(config, engine), outlived=True)
        lines = (config.run.directory / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    whole = losses("whole", "ddp")
    assert len(losses("parts", "fsdp", stop_after_steps=3)) == 3
    with pytest.raises(BigtrainError, match="step 3 would not have had the samples that the checkpoint has recorded"):
        losses("parts", "ddp", "other")
    shut_down()
    assert losses("parts", "ddp") == pytest.approx(whole, rel=1e-6) and len(whole) == 6


def drawn(config, first=0, count=100):
    """Return the samples of some positions of the run."""
    return open_data(config)["train"].ids(first, count)


def test_samples_are_chosen_by_the_perplexity_that_was_scored(place, monkeypatch):
    config = configuration(place, TaskConfig(), Content.pairs)
    assert (
        score_samples(asking(config, out=str(place / "nats"), by=str(place / "llama")))
        == open_data(config)["train"].num_ids + open_data(config)["validation"].num_ids
    )
    stream = open_data(config)["train"]
    batch = stream.gather(np.arange(stream.num_ids))
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "llama")
    with torch.no_grad():
        logits = model(batch["tokens"]).logits
    nats = F.cross_entropy(
        logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    counts = (batch["targets"] != IGNORE_INDEX).sum(dim=1)
    perplexities = (nats.view_as(batch["targets"]).sum(dim=1) / counts.clamp(min=1)).exp().numpy()
    low, high = np.quantile(perplexities, (0.25, 0.75)).tolist()
    right = np.flatnonzero((low <= perplexities) & (perplexities <= high) & (counts > 0).numpy())
    chosen = dataclasses.replace(config)
    chosen.data = dataclasses.replace(
        config.data, scores=str(place / "nats"), min_perplexity=low * (1 - 1e-6), max_perplexity=high * (1 + 1e-6)
    )
    assert check(chosen, world_size=1, local_world_size=1) == []
    told = []
    with monkeypatch.context() as patch:
        patch.setattr(scored, "get_logger", lambda: SimpleNamespace(info=told.append, warning=told.append))
        assert set(drawn(chosen)) == set(right) and 0 < len(right) < stream.num_samples
    (told,) = (line for line in told if "perplexities" in line)
    assert f"are {len(right)} of {stream.num_samples} training samples; all are between" in told
    first, *_ = open_data(chosen)["validation"].ids(0, 1), drawn(chosen)
    assert len(first), "what is held out is not chosen from"
    other = dataclasses.replace(chosen, data=dataclasses.replace(chosen.data, min_perplexity=None))
    contents = {open_data(each)["train"].content for each in (config, chosen, other)}
    assert len(contents) == 3, "a run does not continue with others"
    assert [*drawn(chosen, 3, 9)] == [*drawn(chosen)[3:12]]
    none = dataclasses.replace(chosen, data=dataclasses.replace(chosen.data, min_perplexity=1.0, max_perplexity=1.0))
    with pytest.raises(BigtrainError, match=r"perplexities from 1 to 1 are 0 of .* choose others"):
        open_data(none)
    index = json.loads((place / "nats" / SCORES_FILE).read_text())
    del index["sets"]["train"]["columns"]["num_targets"]
    (place / "nats" / SCORES_FILE).write_text(json.dumps(index))
    with pytest.raises(BigtrainError, match=r"has log_probabilities; score again, with what=log_probabilities"):
        open_data(chosen)
    chosen.task = TaskConfig(kind="distillation")
    problems = check(chosen, world_size=1, local_world_size=1)
    assert any("data.max_perplexity: only samples of task=causal_lm are chosen by it" in told for told in problems)


def test_what_does_not_fit_is_a_sentence(place):
    config = configuration(place, TaskConfig(kind="preference"), Content.preference)
    config.data.scores = str(place / "of1")
    stream = open_data(config)["train"]
    assert stream.gather(np.arange(3))["log_probabilities"].shape == (3, 2)
    assert (
        stream.content
        != open_data(dataclasses.replace(config, data=dataclasses.replace(config.data, scores=None)))["train"].content
    )
    index = json.loads((place / "of1" / SCORES_FILE).read_text())
    assert index["model"]["origin"] == "llama" and len(index["model"]["weights"]) == 32
    for changes, told in (
        ({"scores": str(place)}, "scores.json: cannot be read.*bigtrain score writes it"),
        ({"sequence_length": 48}, "other samples were scored .* than those of train"),
        ({"validation_fraction": 0.3}, "other samples were scored"),
    ):
        with pytest.raises(BigtrainError, match=told):
            open_data(dataclasses.replace(config, data=dataclasses.replace(config.data, **changes)))
    (place / "of1" / "train.log_probabilities.npy").write_bytes(
        (place / "of2" / "train.log_probabilities.npy").read_bytes()[:-1] + b"\1"
    )
    with pytest.raises(BigtrainError, match="is not what was written; score again"):
        open_data(config)
    resumed = dataclasses.replace(config, checkpoint=CheckpointConfig(resume="runs/chat"))
    found = [asking(one, out="x", by=by).scorer for one, by in ((config, None), (resumed, None), (resumed, "llama"))]
    assert found == [None, "runs/chat", "llama"], "a run that begins with another one is compared with that"
    for task, told in (("masked_lm", "is written nothing"), ("classification", "is written logits, embeddings")):
        with pytest.raises(BigtrainError, match=told):
            other = dataclasses.replace(config, task=TaskConfig(kind=task))
            score_samples(asking(other, out=str(place / "never"), what=Scored.log_probabilities))
