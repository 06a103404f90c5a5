"""The loss picture is drawn from the files of run directories alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bigtrain.config import DataSource, TrainConfig
from bigtrain.data.prepare import prepared_directory
from bigtrain.schema import to_dict

SCRIPT = Path(__file__).parents[2] / "launch" / "plot_loss.py"


def make_run(directory: Path, *, source: DataSource = DataSource.synthetic, text: Path | None = None) -> Path:
    directory.mkdir()
    config = TrainConfig()
    config.data.source, config.data.path, config.data.root = source, text and str(text), str(directory.parent / "data")
    (directory / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    steps = [{"step": step, "loss": None if step == 5 else 3 + 5 / step} for step in range(1, 101)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"step": 101, "lo')
    events = [
        {"event": "start"},
        {"event": "validation", "step": 50, "loss": 3.2},
        {"event": "validation", "step": 100, "loss": 3.1},
    ]
    (directory / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if source is not DataSource.synthetic:
        corpus = prepared_directory(config.data)
        corpus.mkdir(parents=True)
        (corpus / "index.json").write_text(json.dumps({"validation": {"unigram_nats_per_token": 6.25}}))
    return directory


def plot(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_several_runs_are_drawn_with_validation_and_unigram_line(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text\n" * 100)
    runs = [make_run(tmp_path / "first"), make_run(tmp_path / "second", source=DataSource.text, text=text)]
    out = tmp_path / "loss.svg"
    result = plot(*runs, "--out", out, "--log-x")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{out}\n", "")
    picture = out.read_text()
    for words in ("first: training", "second: validation, last 3.100", "unigram model 6.25", "optimizer step"):
        assert f"<!-- {words} -->" in picture


def test_a_run_whose_corpus_is_gone_is_drawn_without_it(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text\n" * 100)
    run = make_run(tmp_path / "run", source=DataSource.text, text=text)
    text.unlink()
    out = tmp_path / "loss.png"
    result = plot(run, "--out", out)
    assert result.returncode == 0
    assert "drawn without the unigram line" in result.stderr
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_directory_that_is_no_run_is_an_error_of_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    result = plot(tmp_path / name, "--out", tmp_path / "loss.png")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "no metrics.jsonl" in result.stderr
