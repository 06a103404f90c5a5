"""docs/extending.md: its examples are run as they stand."""

import csv
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

from bigtrain.cli import own_parts, parity
from bigtrain.config import parts
from bigtrain.distributed.collectives import init_process_group
from bigtrain.errors import ConfigError
from bigtrain.processes import RankInfo
from bigtrain.run.launching import require_same_imports
from bigtrain.telemetry.history import read_history
from bigtrain.telemetry.report import render
from bigtrain.testing.ranks import run_ranks
from tests.distributed.launches import events, fork, metrics

PAGE = (Path(__file__).parents[2] / "docs/extending.md").read_text()
MEAN = """
from dataclasses import dataclass
from ideas import focal


@dataclass(frozen=True)
class mean(focal):
    def __call__(self, network, *tensors):
        return super().__call__(network, *tensors) / len(tensors[0])
"""
FAILING = """

class failing(csv_logger):
    def event(self, event):
        if event["event"] == "validation":
            raise ValueError("no room")
"""


def write_ideas(directory):
    blocks = re.findall(r"```python\n# (\S+?)(?:, continued)?\n(.*?)```", PAGE, re.DOTALL)
    for name in dict(blocks):
        (directory / name).write_text("".join(code for file, code in blocks if file == name))
    return dict(blocks)


def commands():
    """Return the commands of the page, by name of the command."""
    lines = [
        line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in re.split(r"(?<!\\)\n", block)
    ]
    words = [shlex.split(line.replace("\\\n", "")) for line in lines if line]
    assert [command for _, command, *_ in words] == ["parity", "train", "validate", "train"]
    return {name: words[2:] for name, words in zip(("parity", "train", "validate", "stars"), words, strict=True)}


def run_program(directory):
    os.chdir(directory)
    sys.path.insert(0, str(directory))
    with Path("said").open("w") as said:
        os.dup2(said.fileno(), 1)
        runpy.run_path("train.py")
        sys.stdout.flush()
    return Path("said").read_text().splitlines()[-1]


def test_the_examples_run(tmp_path):
    assert set(write_ideas(tmp_path)) == {"ideas.py", "train.py", "stars.py"}
    with (tmp_path / "ideas.py").open("a") as file:
        file.write(FAILING)
    train = [word.replace("csv_logger]", "csv_logger,ideas.failing]") for word in commands()["train"]]
    done = fork("train.py", *train, cwd=tmp_path)
    run = tmp_path / "runs/first"
    assert done.code == 0, done.err
    records = metrics(run)
    assert len(records) == 4 and all(0 <= record["train/accuracy"] <= 1 for record in records)
    assert f"accuracy {records[-1]['train/accuracy']:.4g}" in done.out and "perplexity" not in done.out
    (validation,) = events(run, "validation")
    assert f"accuracy {validation['accuracy']:.4g}" in done.out
    # The logger that raises is told of once, and the other one has everything.
    (failed,) = events(run, "logger_failed")
    assert "ideas.failing" in failed["error"] and "ValueError: no room" in failed["error"]
    assert "logging.also=ideas.failing: " in done.out and "the run goes on without" in done.out
    with (run / "losses.csv").open() as file:
        assert {row[0]: float(row[1]) for row in csv.reader(file)} == {
            str(record["step"]): record["loss"] for record in records
        }
    page = render([read_history(run)])
    assert (
        "accuracy: line in training, dots in validation." in page and f"accuracy {validation['accuracy']:.4g}" in page
    )

    config = (run / "config.yaml").read_text()
    assert "gamma: 1.5" in config and "depth: 2" in config and re.search(r"imports:\n  ideas: [0-9a-f]{16}\n", config)

    again = fork("validate.py", *commands()["validate"], cwd=tmp_path)
    assert again.code == 0 and re.search(r"accuracy +0\.\d{4}", again.out), again.err
    closed = fork("validate.py", "checkpoint=runs/first", cwd=tmp_path)
    assert closed.code == 2 and closed.err.splitlines() == [
        "task.kind=ideas.focal: nothing imported has it; add --import ./ideas.py",
        "model.name=ideas.mixer: nothing imported has it; add --import ./ideas.py",
    ]
    with (tmp_path / "ideas.py").open("a") as file:
        file.write("# another version\n")
    longer = fork("train.py", *commands()["train"], "train.steps=5", cwd=tmp_path)
    assert longer.code == 0 and "changed since the checkpoint: imports.ideas: " in longer.out

    stars = fork("train.py", *commands()["stars"], cwd=tmp_path)
    assert stars.code == 0 and len({record["loss"] for record in metrics(tmp_path / "runs/stars")}) == 4, stars.err
    assert "samples/s" in stars.out and "tokens" not in stars.out

    accuracies = run_ranks(run_program, 1, tmp_path, timeout_seconds=100)[0]
    assert re.fullmatch(r"0\.\d+ 0\.\d+", accuracies)
    assert [record["loss"] for record in metrics(tmp_path / "runs/second")] == [record["loss"] for record in records]


def compare_imports(contents):
    info = RankInfo.from_env()
    init_process_group(info, torch.device("cpu"), timeout_seconds=60)
    try:
        require_same_imports({"ideas": contents[info.rank]})
    except ConfigError as error:
        return str(error)


def test_ranks_with_another_file_are_refused():
    assert run_ranks(compare_imports, 2, ["a", "a"], timeout_seconds=100) == [None, None]
    refused = "--import: rank 1 has imported other files than rank 0; copy the same to every node"
    assert run_ranks(compare_imports, 2, ["a", "b"], timeout_seconds=100) == [refused, refused]


@pytest.mark.parametrize("name", ["ideas.focal", "means.mean"])
def test_parity_tells_a_mean_from_a_sum(name, tmp_path, monkeypatch, capfd):
    write_ideas(tmp_path)
    (tmp_path / "means.py").write_text(MEAN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parts, "_modules", {})
    for module in ("ideas", "means"):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(sys.modules, module)
    args = [word for word in commands()["parity"] if not word.startswith(("task=", "worlds="))]
    imports = [f"--import=./{module}.py" for module in ("ideas", "means")]
    config = parity.read(own_parts.bring_in([*imports, *args[2:], f"task={name}", "worlds=[1]"]))
    code, said = parity.run(config), capfd.readouterr()
    assert said.out.splitlines()[2].startswith("ddp world 1 micro 2")
    if name == "ideas.focal":
        assert (code, said.err.count("usual cause")) == (0, 0) and "all 1 cases agree" in said.out
    else:
        assert code == 1 and "DIFFERS" in said.out
        assert "task.kind=means.mean: with another micro-batch size (ddp world 1 micro 2)" in said.err
        assert "the usual cause is a mean" in said.err
