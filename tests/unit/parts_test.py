"""A user's own parts: what opens the doors, what does not, and the values of an own network."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bigtrain.cli import own_parts, submit
from bigtrain.config import ModelConfig, ModelKind, TaskConfig, TrainConfig, parts
from bigtrain.config.check import check, fit_micro_batch, resolve
from bigtrain.config.convert import from_dict
from bigtrain.errors import ConfigError
from bigtrain.models import build_initial_values, build_model
from bigtrain.models.generation import generate
from bigtrain.models.own import Uncached
from bigtrain.tasks import build_objective

IDEAS = """
import subprocess
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn
from torch.nn.init import trunc_normal_

from bigtrain.config.bounds import Bound
from bigtrain.tasks.base import Objective


@dataclass(frozen=True)
class focal(Objective):
    \"\"\"Easy ones count less.\"\"\"

    gamma: Annotated[float, Bound(ge=0)] = 2.0
    \"\"\"How much.\"\"\"
    name: str = "a"
    fields = {"x": None}

    def count(self, samples):
        return samples["x"].sum(axis=1)

    def __call__(self, network, x):
        return network(x).sum()[None]


@dataclass(frozen=True)
class half(Objective):
    fields = {}


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.ones, self.drawn = nn.Parameter(torch.ones(300)), nn.Parameter(torch.randn(100, 100) / 4)


class Net(nn.Module):
    def __init__(self, unwritten, norm):
        super().__init__()
        self.plain, self.cut, self.turned = nn.Linear(300, 400), nn.Linear(400, 300), nn.Linear(64, 64)
        self.scale, self.table = Scale(), nn.Embedding(40, 8, padding_idx=3)
        trunc_normal_(self.cut.weight, std=0.5, a=-0.5, b=0.5)
        nn.init.orthogonal_(self.turned.weight)
        self.register_buffer("positions", torch.arange(7))
        self.free = nn.Parameter(torch.empty(5)) if unwritten == 1 else None
        self.norm = nn.BatchNorm1d(3) if norm else None


@dataclass(frozen=True)
class net:
    unwritten: int = 0
    norm: bool = False

    def __post_init__(self):
        if self.unwritten > 2:
            raise ValueError("unwritten: at most 2")

    def build(self):
        return Net(self.unwritten, self.norm)


def nothing():
    return None
"""


@pytest.fixture
def ideas(tmp_path, monkeypatch):
    """A directory with ideas.py, nothing of which is imported yet."""
    (tmp_path / "ideas.py").write_text(IDEAS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parts, "_modules", {})
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def fails(call):
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


def test_what_is_read_opens_no_door(ideas):
    read = {"task": {"kind": "ideas.focal"}, "imports": {"ideas": "0"}}
    config = fit_micro_batch(resolve(from_dict(TrainConfig, read)), 1)
    (problem,) = check(config, world_size=1, local_world_size=1)
    assert problem == "task.kind=ideas.focal: nothing imported has it; add --import ./ideas.py"
    assert "ideas" not in sys.modules
    parts.bring_in("./ideas.py")
    assert check(config, world_size=1, local_world_size=1) == []
    # Nor does what the process has imported otherwise.
    assert "nothing imported has it" in fails(lambda: build_objective(TaskConfig(kind="subprocess.Popen")))
    assert "nothing imported has it" in fails(lambda: build_objective(TaskConfig(kind="os.system")))


def test_settings_are_checked_and_recorded(ideas):
    assert own_parts.bring_in(["--import", "./ideas.py", "task=ideas.focal"]) == ["task=ideas.focal"]
    settings = parts.settings_of("ideas.focal", {"gamma": 3}, setting="task.kind")
    assert settings == {"gamma": 3.0, "name": "a"}
    assert build_objective(TaskConfig(kind="ideas.focal", settings=settings)).gamma == 3.0

    def refused(**settings):
        return fails(lambda: parts.settings_of("ideas.focal", settings, setting="task.kind"))

    assert refused(gama=3.0) == "task.settings.gama: unknown key; did you mean 'task.settings.gamma'?"
    assert refused(gamma="much") == "task.settings.gamma: expected float, got 'much'"
    assert refused(gamma=-1.0) == "task.settings.gamma=-1.0: must be at least 0"
    assert fails(lambda: parts.settings_of("ideas.net", {"unwritten": 3}, setting="model.name")) == (
        "model.settings: ideas.net: unwritten: at most 2"
    )
    assert "ideas has no focl; did you mean 'focal'?" in fails(lambda: parts.find("ideas.focl", "task.kind"))
    assert "it has no count, __call__;" in fails(lambda: build_objective(TaskConfig(kind="ideas.half")))
    page = own_parts.help_page(["--help", "task=ideas.focal"])
    assert "Easy ones count less." in page and "task.settings.gamma=2.0  (float, at least 0)\n      How much." in page


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("gone.py", None, "--import ./gone.py: there is no such file"),
        ("bad.py", "x = 1\ndef f(:\n", "--import ./bad.py: line 2: invalid syntax"),
        (
            "bad.py",
            "def f():\n    return y\n\n\nf()\n",
            "--import ./bad.py: line 2: NameError: name 'y' is not defined",
        ),
        (
            "no-name.py",
            "",
            "--import ./no-name.py: 'no-name' cannot be the name of a module; use letters, digits and _",
        ),
        ("json.py", "", "--import ./json.py: there is another module json already; rename the file"),
    ],
)
def test_mistakes_in_a_file_are_one_sentence(file, content, problem, ideas):
    if content is not None:
        (ideas / file).write_text(content)
    assert fails(lambda: parts.bring_in(f"./{file}")) == problem
    assert parts.versions() == {} and "bad" not in sys.modules


def test_the_bytes_that_are_hashed_are_those_that_run(ideas):
    parts.bring_in("./ideas.py")
    first = parts.versions()["ideas"]
    assert not (ideas / "__pycache__").exists()
    (ideas / "ideas.py").write_text(IDEAS.replace("2.0", "1.0"))
    del sys.modules["ideas"]
    parts.bring_in("./ideas.py")
    assert parts.versions()["ideas"] != first
    assert parts.build("ideas.focal", {}, setting="task.kind").gamma == 1.0


def test_a_package_comes_in_by_its_entry_point_when_it_is_typed(ideas, monkeypatch):
    package, facts = ideas / "mypkg", ideas / "mypkg-1.2.dist-info"
    package.mkdir()
    facts.mkdir()
    (package / "__init__.py").touch()
    (package / "parts.py").write_text(IDEAS)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: mypkg\nVersion: 1.2\n")
    (facts / "entry_points.txt").write_text("[bigtrain]\nmypkg = mypkg.parts\n")
    monkeypatch.syspath_prepend(ideas)
    refused = fails(lambda: parts.find("mypkg.focal", "task.kind"))
    assert refused == "task.kind=mypkg.focal: nothing imported has it; add --import mypkg"
    assert "mypkg.parts" not in sys.modules
    assert own_parts.with_own_parts(["task=mypkg.focal"]) == ["task.kind=mypkg.focal"]
    assert parts.find("mypkg.focal", "task.kind").__name__ == "focal" and parts.versions() == {"mypkg": "mypkg 1.2"}
    assert "neither a file (./ideas.py) nor a package" in fails(lambda: parts.bring_in("ideas"))


def test_short_names_are_settings(ideas):
    args = ["task=ideas.focal", "+model=ideas.net", "data=ideas.stars", "+model=gpt_nano", "run.name=a.b"]
    assert own_parts.with_own_parts(args) == [
        "task.kind=ideas.focal",
        *("+model=own", "model.name=ideas.net", "data=own", "data.path=ideas.stars"),
        *("+model=gpt_nano", "run.name=a.b"),
    ]


def values_of(settings, seed=0):
    values = build_initial_values(ModelConfig(kind=ModelKind.own, name="ideas.net", settings=settings), seed)
    with torch.device("meta"):
        model = build_model(ModelConfig(kind=ModelKind.own, name="ideas.net", settings=settings))
    assert model.positions.tolist() == list(range(7)) and all(p.is_meta for p in model.parameters())
    whole = {}
    for name, parameter in model.named_parameters():
        whole[name] = torch.full((parameter.numel(),), math.nan)
        values[name].fill(0, whole[name])
        part = torch.empty(min(33, parameter.numel() - 5))
        values[name].fill(5, part)
        assert torch.equal(part, whole[name][5 : 5 + len(part)])
        whole[name] = whole[name].view(parameter.shape)
    return whole


def test_an_own_network_starts_as_its_code_says_and_the_same_everywhere(ideas):
    parts.bring_in("./ideas.py")
    torch.manual_seed(1)
    values = values_of({})
    torch.manual_seed(2)
    assert all(torch.equal(value, again) for value, again in zip(values.values(), values_of({}).values(), strict=True))
    drawn = [name for name, value in values_of({}, seed=1).items() if not torch.equal(value, values[name])]
    assert drawn == [name for name in values if name != "scale.ones"]
    bound = 1 / math.sqrt(300)
    assert 0.95 * bound < values["plain.weight"].max() <= bound  # nn.Linear's own
    assert (values["scale.ones"] == 1).all() and 0.24 < values["scale.drawn"].std() < 0.26
    assert 0.45 < values["cut.weight"].abs().max() <= 0.5  # and not nn.Linear's 0.05
    turned = values["turned.weight"]
    assert torch.allclose(turned @ turned.T, torch.eye(64), atol=1e-5)
    assert (values["table.weight"][3] == 0).all() and 0.8 < values["table.weight"][4:].std() < 1.2


def test_networks_that_cannot_be_trained_alike_are_refused(ideas):
    parts.bring_in("./ideas.py")
    assert fails(lambda: values_of({"unwritten": 1})) == (
        "model.name=ideas.net: its code does not say what free start from"
    )
    assert "norm (BatchNorm1d) takes means over a micro-batch" in fails(lambda: values_of({"norm": True}))
    built = ModelConfig(kind=ModelKind.own, name=parts.give(nn.Linear(2, 2)))
    assert "a module that is built already; give a function" in fails(lambda: build_model(built))
    empty = ModelConfig(kind=ModelKind.own, name="ideas.nothing")
    assert "it builds a NoneType; it must return an nn.Module" in fails(lambda: build_model(empty))


def test_a_part_of_a_program_has_the_name_of_its_module(ideas):
    parts.bring_in("./ideas.py")
    part = parts.build("ideas.focal", {"gamma": 4.0}, setting="task.kind")
    assert own_parts.given(network=None, objective=part, data=None) == ["task=ideas.focal"]
    assert parts.settings_of("ideas.focal", {"name": "b"}, setting="task.kind") == {"gamma": 4.0, "name": "b"}
    assert parts.imports() == ["./ideas.py"]


def test_text_is_generated_without_a_cache(ideas):
    class Next(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Parameter(torch.ones(()))

        def forward(self, tokens):
            return F.one_hot((tokens + 1) % 7, 9) * self.one

    model = Uncached(Next(), ModelConfig(kind=ModelKind.own, vocab_size=9, settings={"max_positions": 6}))
    assert generate(model, [4], max_new_tokens=3, temperature=0) == [5, 6, 0]
    assert len(generate(model, [4], max_new_tokens=30, temperature=0)) == 5
    assert "the model knows 0 to 8" in fails(lambda: generate(model, [9], max_new_tokens=1))


def test_a_job_imports_what_its_command_did(ideas):
    args = own_parts.bring_in(["--import=./ideas.py", "+model=gpt_nano", "task=ideas.focal", "cluster=slurm_cpu"])
    config, training = submit.read(args)
    assert training == ["--import=./ideas.py", "+model=gpt_nano", "task=ideas.focal"]
    assert config.task.settings == {"gamma": 2.0, "name": "a"} and config.imports == parts.versions()


@pytest.mark.parametrize(
    ("line", "found"), [("bigtrain train --import ./id", "./ideas.py"), ("bigtrain train --im", "--import")]
)
def test_the_option_is_completed(line, found, ideas):
    command = [sys.executable, "-c", "from bigtrain.cli import complete; complete()"]
    done = subprocess.run(command, env={"COMP_LINE": line, "PATH": ""}, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [found], done.stderr
    assert not Path("__pycache__").exists()
