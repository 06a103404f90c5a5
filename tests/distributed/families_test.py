"""Models of transformers train as transformers computes them: a sample of what ``benchmarks/families.py`` tries."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that calls a benchmark in this process, whose server of ranks has transformers already."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def call(name: str, *args: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *args])
        code = importlib.import_module(name).main()
        printed = capsys.readouterr().out
        assert code == 0, printed
        return printed

    return call


def test_what_transformers_imports_says_nothing_to_a_user():
    script = "import bigtrain.models.hf.build, transformers.models.llama.modeling_llama"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, text=True, capture_output=True, timeout=200, check=True)
    assert not re.search("torchao|_pytree", done.stderr), done.stderr


def test_families_from_weights_under_engines_that_shard_them(run: Callable[..., str], tmp_path: Path):
    """A transformer that two blocks have in common; and an encoder, which is refused."""
    names = ["zamba", "bert (encoder)"]
    options = [f"--only={','.join(names)}", "--engines=fsdp,zero3", "--starts=pretrained"]
    output = run("families", *options, f"--json={tmp_path / 'figures'}", f"--table={tmp_path / 'table.md'}")
    figures = json.loads((tmp_path / "figures").read_text())
    assert figures["zamba"].keys() >= {"pretrained logits", "pretrained fsdp", "pretrained zero3", "export"}, output
    assert not figures["zamba"]["failed"] | figures["zamba"]["refused"], output
    assert "is_decoder" in figures["bert (encoder)"]["refused"]["pretrained zero3"]
    table = (tmp_path / "table.md").read_text()
    assert "| zamba |" in table.partition("## Refused")[0]
    assert "| bert (encoder) |" in table.partition("## Refused")[2]


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from families import relative_difference, verdict

    figures = {"refused": {}, "failed": {}}
    assert verdict(figures | {"export": 9e-6}) == "equal"
    assert verdict(figures | {"export": 2e-5}) == "differs"
    assert verdict(figures | {"failed": {"export": "KeyError"}}) == "fails"
    assert verdict(figures | {"failed": {"build": "KeyError"}}) == "not built"
    nothing = float("nan")
    assert relative_difference([2.0, 4.0], [2.0, 4.0004]) > 9e-5
    assert relative_difference([nothing], [1.0]) == relative_difference([], [1.0]) == float("inf")


def test_a_difference_of_cells_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from task_matrix import is_equal, largest_difference

    step = {"step": 1, "loss": 2.0, "data_digest": "a"}
    assert largest_difference([step], [step]) == 0 < largest_difference([step | {"loss": 2.00004}], [step]) < 3e-5
    others = step | {"data_digest": "b"}, step | {"loss": float("nan")}, {"step": 1}
    assert all(largest_difference([other], [step]) == float("inf") for other in others)
    norms = [step | {"grad_norm": 3.0}], [step | {"grad_norm": 3.00003}]
    assert largest_difference(*norms) == 0 < largest_difference(*norms, of_norms=True) < 2e-5
    assert is_equal({"before": 9e-6, "after": 9e-7, "norms": 9e-6})
    assert not is_equal({"before": 0.0, "after": 2e-6, "norms": 0.0})
    assert not is_equal({"before": 0.0, "after": 0.0, "norms": 2e-5})
    assert not is_equal({"failed": "KeyError"})


@pytest.mark.slow
def test_losses_of_other_tasks_are_those_of_transformers_trainer(run: Callable[..., str], tmp_path: Path):
    output = run("tasks", "--only", "BERT, token classification", f"--json={tmp_path / 'losses'}")
    found = json.loads((tmp_path / "losses").read_text())["rows"]["BERT, token classification"]
    assert len(found["ours"]) == len(found["trainer"]) == 20 and found["difference"] <= 1e-4, output
    # Of two micro-batches Trainer adds the means, which is another loss.
    assert found["difference, 2 micro-batches"] > 0.1


@pytest.mark.slow
def test_a_network_of_another_task_is_exported_and_a_killed_run_goes_on_elsewhere(
    run: Callable[..., str], tmp_path: Path
):
    run("task_networks", "--only", "vit", f"--json={tmp_path / 'networks'}")
    run("task_matrix", "--only", "regression", "--engines", "zero2", "--worlds", "3", f"--json={tmp_path / 'cells'}")
    assert json.loads((tmp_path / "cells").read_text())["regression zero2 3"]["after"] <= 1e-6


def test_losses_are_those_of_transformers_trainer(run: Callable[..., str], tmp_path: Path):
    """On chats as the tokenizer's template renders them."""
    output = run("same_as_trainer", "--only=llama with chats", "--engine=zero1", f"--json={tmp_path / 'losses'}")
    losses = json.loads((tmp_path / "losses").read_text())["llama with chats"]
    assert len(losses["ours"]) == len(losses["trainer"]) == 20, output
    assert losses["difference"] <= 1e-4
    # The comparison means something: from one step to the next they change by more than that.
    assert max(abs(a - b) for a, b in zip(losses["ours"], losses["trainer"][1:], strict=False)) > 1e-2
