"""Every command in the pages is read as when it is typed: by the reader of its command, in its launcher's world."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.constants
import numpy as np
import pytest
from safetensors.numpy import save_file

from bigtrain.cli import hydra_cli
from bigtrain.config import TrainConfig
from bigtrain.errors import ConfigError
from tests.unit.docs_test import PAGES, REPOSITORY

BLOCK = re.compile(r"^```(?:bash)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
CALL = re.compile(r"(?:python )?(?:\S*/)?launch/(\w+)\.py|(?:-m )?bigtrain ([\w-]+)|slurm/(train)\.sbatch")
SIZE = re.compile(r"--(nproc-per-node|nnodes|nodes)=(\d+)")
PLACEHOLDERS = {"<a secret number>": "7", "$lr": "1e-3"}
LEFT_OUT = {
    "--import": "the parts are those of extending.md, whose examples a test runs",
    "microsoft/resnet-18": "the hub has its config.json",
}
MODELS = ("my-model", "my-chat-model", "chat")  # directories of transformers that pages name
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 512, "max_position_embeddings": 4096}


class Command(NamedTuple):
    """A command of a page."""

    name: str
    args: list[str]
    world: int  # ranks
    local_world: int  # of them on a node
    is_whole: bool  # not a part of one, with ``...``


def commands(page: str) -> Iterator[Command]:
    """Yield the calls of ours in a page's blocks of code."""
    for placeholder, value in PLACEHOLDERS.items():
        page = page.replace(placeholder, value)
    for line in re.sub(r"\\\n\s*", " ", "".join(BLOCK.findall(page))).splitlines():
        found = CALL.search(line)
        if found and re.match(r"\s*(bigtrain|python|torchrun|sbatch)\b", line) and not any(p in line for p in LEFT_OUT):
            name = next(filter(None, found.groups()))
            args = shlex.split(line[found.end() :], comments=True)
            sizes = {option: int(size) for option, size in SIZE.findall(line[: found.start()])}
            local = sizes.get("nproc-per-node", 8 if "nodes" in sizes else 1)
            world = local * sizes.get("nnodes", sizes.get("nodes", 1))
            yield Command(name.replace("-", "_"), [a for a in args if a != "..."], world, local, "..." not in args)


def reader(name: str) -> Callable[[list[str]], Any]:
    """Return what turns the arguments of a command into its checked configuration."""
    main: Any = importlib.import_module(f"bigtrain.cli.{name}").main
    if name == "train":
        return hydra_cli.read_run
    if main.func is hydra_cli.main:
        return main.args[0]
    return main.keywords.get("reader") or partial(hydra_cli.read, main.args[0])


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Command], Any]:
    """Return what reads a command where the models and runs that pages name are there."""
    for name in MODELS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(LLAMA))
        save_file({"lm_head.weight": np.zeros((512, 8), np.float32)}, tmp_path / name / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hydra_cli, "not_a_run", lambda path: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("RANK", "0")

    def reads(command: Command) -> Any:
        monkeypatch.setenv("WORLD_SIZE", str(command.world))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(command.local_world))
        if command.is_whole:
            return reader(command.name)(command.args)
        return hydra_cli.compose(TrainConfig, command.args, config_name="train")

    return reads


@pytest.mark.parametrize("page", [page for page in PAGES if [*commands(page.read_text())]], ids=lambda page: page.stem)
def test_commands_of_pages_are_taken(page: Path, read: Callable[[Command], Any]):
    refused = []
    for command in commands(page.read_text()):
        try:
            read(command)
        except ConfigError as error:
            refused.append(f"{command.name} {' '.join(command.args)}: {error}")
    assert refused == []


def test_a_command_that_would_be_refused_is_found(read: Callable[[Command], Any]):
    page = """```
torchrun --nproc-per-node=4 launch/train.py +model=gpt_nano parallel.tp=3   # two heads
bigtrain verify-resume +model=gpt_nano \\
    resume_engine=zero7
sbatch --nodes=2 slurm/train.sbatch +model=gpt_nano
python launch/train.py ... data.tokeniser=bpe
```"""
    uneven, misspelt, right, part = commands(page)
    assert (uneven.world, right.world, right.local_world) == (4, 16, 8)
    for command in (uneven, misspelt, part):
        with pytest.raises(ConfigError):
            read(command)
    read(right)


SHORTER = {"train.steps=300": "train.steps=4", "every_steps=100": "every_steps=2", "train.steps=200": "train.steps=2"}


def shorter(blocks: list[str]) -> str:
    code = "\n".join(blocks)
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    return code


@pytest.mark.slow
def test_the_first_page_and_the_python_of_the_readme_work_as_they_stand(tmp_path: Path):
    page = (REPOSITORY / "docs/start.md").read_text()
    typed = shorter(BLOCK.findall(page[page.index("## 2.") :]))
    python = shorter(
        re.findall(r"^```python\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    )
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    call = partial(subprocess.run, cwd=tmp_path, env=env, check=True, timeout=240, capture_output=True, text=True)
    call(["bash", "-euo", "pipefail", "-c", typed])
    assert (tmp_path / "runs/mine/report.html").stat().st_size > 100_000
    assert json.loads((tmp_path / "exported/config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    texts = (tmp_path / "mine.txt").read_text().split("\n\n")
    (tmp_path / "books").mkdir()
    for number in range(40):
        (tmp_path / "books" / f"{number}.txt").write_text("\n\n".join(texts[number::40]))
    said = call([sys.executable, "-c", python]).stdout
    assert "'code': 0" in said and "'loss'" in said
