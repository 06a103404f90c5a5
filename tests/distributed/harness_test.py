"""lm-evaluation-harness in training and on runs: the scores that it gives to the export, at any world size."""

import json
from pathlib import Path

import pytest

from tests.distributed.launches import events, fork

pytest.importorskip("lm_eval")

TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "writing": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{line}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 20}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
TEXT = "tick tock\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with tasks that need no network, a corpus and prompts."""
    directory = tmp_path_factory.mktemp("harness")
    (directory / "tasks").mkdir()
    rows = [
        {"question": ["tick", "tock\ntick", "t"][i % 3] + " s" * (i % 4), "choices": [" tock", " tick", " on"]}
        | {"answer": i % 3, "text": TEXT * (1 + i), "line": [" tock", " tock", "ick tock"][i % 3]}
        for i in range(7)
    ]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, body in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: train\ndataset_kwargs:\n  data_files: {directory}/rows.jsonl\n"
        (directory / f"tasks/{name}.yaml").write_text(head + body)
    (directory / "corpus.txt").write_text(TEXT * 800)
    (directory / "prompts.txt").write_text("tick\nto\n\nt\n")
    return directory


def settings(place: Path, *more: str) -> list[str]:
    return [
        *("+model=gpt_nano", "data=text", f"data.path={place}/corpus.txt", "data.tokenizer=bytes", "train.steps=80"),
        *("train.global_batch_size=4", "model.hidden_dim=24", "model.num_heads=3", "model.num_layers=2"),
        *(
            "model.max_positions=64",
            "validation.every_steps=40",
            "validation.batches=1",
            "optimizer.lr=2e-2",
            "scheduler.warmup_steps=4",
        ),
        *(f"validation.lm_eval=[{','.join(TASKS)}]", f"validation.lm_eval_tasks={place}/tasks"),
        *(f"validation.prompts={place}/prompts.txt", "validation.prompt_tokens=5"),
        *("validation.metric=lm_eval/rolling/word_perplexity", *more),
    ]


def evaluated(place: Path, path: str, world_size: int = 1) -> dict[str, float]:
    arguments = [f"checkpoint={path}", f"tasks=[{','.join(TASKS)}]", f"tasks_directory={place}/tasks", "json=true"]
    done = fork("evaluate.py", *arguments, cwd=place, world_size=world_size)
    assert done.code == 0, done.out + done.err
    return json.loads(done.out.splitlines()[-1])


@pytest.mark.slow
def test_scores_are_those_of_the_export_at_every_world_size_in_training_and_behind(place: Path):
    for engine, world_size in (("zero3", 3), ("ddp", 1)):
        run = fork(
            "train.py", *settings(place, f"engine={engine}", f"run.name={engine}"), cwd=place, world_size=world_size
        )
        assert run.code == 0, run.out + run.err
    exported = fork("export.py", "checkpoint=runs/ddp", "out=exported", cwd=place)
    assert exported.code == 0, exported.out + exported.err
    expected = evaluated(place, "exported")
    names = {"choices/acc", "rolling/word_perplexity", "rolling/bits_per_byte", "writing/exact_match"}
    assert set(expected) == {f"lm_eval/{name}" for name in names}
    assert expected["lm_eval/writing/exact_match"] > 0, "it has learnt a line"
    assert evaluated(place, "runs/ddp", world_size=2) == pytest.approx(expected, rel=1e-6)
    for engine in ("zero3", "ddp"):
        run = place / "runs" / engine
        first, last = events(run, "validation")
        assert {name: last[name] for name in expected} == pytest.approx(expected, rel=1e-5), engine
        assert first["lm_eval/rolling/bits_per_byte"] != last["lm_eval/rolling/bits_per_byte"]
        texts = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
        assert [(text["step"], text["prompt"]) for text in texts] == [
            (step, prompt) for step in (40, 80) for prompt in ("tick", "to", "t")
        ]
        assert texts == [json.loads(line) for line in (place / "runs/ddp/samples.jsonl").read_text().splitlines()]


def test_mistakes_are_told_before_training(place: Path):
    (place / "code").mkdir()
    (place / "code/own.yaml").write_text("task: own\nprocess_docs: !function ideas.process\n")
    (place / "gone").mkdir()
    gone = (place / "tasks/choices.yaml").read_text().replace("rows.jsonl", "gone.jsonl").replace(": choices", ": gone")
    (place / "gone/gone.yaml").write_text(gone)
    (place / "outside").mkdir()
    (place / "outside/own.yaml").write_text("include: ../code/own.yaml\ntask: other\n")
    mistakes = {
        f"validation.lm_eval_tasks={place}/outside": "include names a file outside",
        f"validation.lm_eval_tasks={place}/gone validation.lm_eval=[gone]": "cannot open gone: FileNotFoundError",
        "validation.lm_eval=[chioces]": "no task chioces",
        f"validation.lm_eval_tasks={place}/code": "!function would run code",
        "validation.prompts=nowhere.txt": "validation.prompts=nowhere.txt cannot be read",
        "validation.metric=lm_eval": "validation.metric=lm_eval",
    }
    for mistake, told in mistakes.items():
        done = fork("train.py", *settings(place, "run.name=wrong", *mistake.split(" ")), cwd=place)
        assert done.code == 2
        assert told in done.out + done.err, (mistake, done.out + done.err)
        assert not (place / "runs/wrong/metrics.jsonl").exists()
