"""The wheel, installed where neither the checkout nor any extra is to be seen, does from another directory what it should."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.distributed.launches import LAUNCHER_VARIABLES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
EXTRAS = ("matplotlib", "mpl_toolkits", "tensorboardx", "s3fs", "tiktoken", "rensa", "torchao", "wandb_workspaces")
SMALL = [
    *("+model=gpt_nano", "data=text", "data.path=text.txt", "data.tokenizer_vocab_size=300", "model.num_layers=2"),
    *("model.hidden_dim=24", "model.num_heads=3", "model.max_positions=16", "train.global_batch_size=8"),
    *("train.micro_batch_size=2", "validation.every_steps=0"),
]


class Installed:
    """An environment with the wheel, and a directory to work in."""

    def __init__(self, directory: Path) -> None:
        """Build the wheel and install it, without any network."""
        self.work = directory / "work"
        self.work.mkdir()
        self.bin = directory / "venv/bin"
        self._say("-m", "hatchling", "build", "-t", "wheel", "-d", str(directory), cwd=ROOT, python=sys.executable)
        self._say("-m", "venv", "--without-pip", str(directory / "venv"), python=sys.executable)
        script = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.packages = Path(self._say("-c", script).strip())
        for there in {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}:
            for path in there.iterdir():
                hidden = path.suffix == ".pth" or path.name.lower().startswith((*EXTRAS, "bigtrain", "__pycache__"))
                if not hidden and not (self.packages / path.name).exists():
                    (self.packages / path.name).symlink_to(path)
        (wheel,) = directory.glob("*.whl")
        self._say("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel))

    def run(self, *command: str, code: int = 0) -> str:
        """Run a command in the working directory; return what it said, its exit code having been as expected."""
        env = {key: value for key, value in os.environ.items() if key not in (*LAUNCHER_VARIABLES, "PYTHONPATH")}
        env |= {"PATH": f"{self.bin}:{env['PATH']}", "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, cwd=self.work, env=env, capture_output=True, text=True, timeout=200)
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended.stdout if code == 0 else ended.stderr

    def _say(self, *args: str, cwd: Path | None = None, python: str | None = None) -> str:
        command = [python or str(self.bin / "python"), *args]
        return subprocess.run(command, cwd=cwd or self.work, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    environment = Installed(tmp_path_factory.mktemp("installed"))
    lines = (f"the quick brown fox number {i} counts {i * i} lazy dogs\n\n" for i in range(300))
    (environment.work / "text.txt").write_text("".join(lines))
    return environment


def test_it_trains_resumes_generates_validates_and_exports(installed):
    where = installed.run("python", "-c", "import bigtrain; print(bigtrain.__file__)").strip()
    assert Path(where).is_relative_to(installed.packages)
    assert str(ROOT) not in installed.run("python", "-c", "import sys; print(sys.path)")
    installed.run("bigtrain", "train", *SMALL, "train.steps=6", "run.stop_after_steps=3", code=75)
    installed.run("bigtrain", "train", *SMALL, "train.steps=6")
    lines = (installed.work / "runs/gpt_nano/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert "the quick" in installed.run("bigtrain", "generate", "checkpoint=runs/gpt_nano", "prompt=the quick")
    assert "perplexity" in installed.run("bigtrain", "validate", "checkpoint=runs/gpt_nano")
    installed.run("bigtrain", "export", "checkpoint=runs/gpt_nano", "out=exported")
    script = "from transformers import AutoModelForCausalLM as A; print(A.from_pretrained('exported').config.n_layer)"
    assert installed.run("python", "-c", script).strip() == "2"


def test_a_rank_is_the_same_command(installed):
    ranks = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "bigtrain", "train"]
    installed.run(*ranks, *SMALL, "train.steps=3", "run.name=two", "engine=zero2")
    assert json.loads((installed.work / "runs/two/exit.json").read_text())["code"] == 0


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["report", "runs/two"], "report"),
        (["train", *SMALL, "logging=tensorboard"], "tensorboard"),
        (["prepare", "data=text", "data.path=text.txt", "data.filters.duplicates=near"], "dedup"),
        (["train", "+model=gpt_nano", "data=prepared", "data.path=s3://bucket/corpus"], "s3"),
    ],
)
def test_an_extra_that_is_missing_is_named_in_one_line(installed, command, extra):
    (installed.work / "runs/two").mkdir(parents=True, exist_ok=True)
    (installed.work / "runs/two/config.yaml").touch()
    said = installed.run("bigtrain", *command, code=2).splitlines()[-1]
    assert said.endswith(f"pip install 'bigtrain[{extra}]'")


def test_a_job_starts_the_installed_package(installed):
    job = installed.run("bigtrain", "submit", *SMALL, "cluster=slurm_cpu", "dry_run=true")
    assert f"{installed.packages}/bigtrain/slurm/train.sbatch" in job
    assert str(ROOT) not in job
    script = next(word for word in job.split() if word.endswith("train.sbatch"))
    assert subprocess.run(["bash", "-n", script]).returncode == 0
