"""What is not installed is named with the extra that brings it; what the machine does not have is done without."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from bigtrain import processes
from bigtrain.cli import hydra_cli, report
from bigtrain.config import DataConfig, TrainConfig
from bigtrain.config.packages import missing_packages, require
from bigtrain.data.prepare.encoder import fast_encoder
from bigtrain.data.prepare.tokenise import Coding, encoder
from bigtrain.data.read.remote import RemoteDirectory
from bigtrain.data.read.tokenizer import build_tokenizer
from bigtrain.distributed.collectives import pick_device, unused_gpus
from bigtrain.errors import ConfigError
from bigtrain.processes import RankInfo

ROOT = Path(__file__).parents[2]
NANO = ["+model=gpt_nano"]


@pytest.mark.parametrize(
    ("args", "package", "extra"),
    [
        (["logging=tensorboard"], "tensorboardX", "tensorboard"),
        (["engine.precision=fp8", "engine.compile=true", "train.micro_batch_size=1"], "torchao", "fp8"),
        (["data=text", "data.path=a.txt", "data.filters.duplicates=near"], "rensa", "dedup"),
        (["data=prepared", "data.path=s3://bucket/corpus"], "s3fs", "s3"),
        (["data.mixture={a:{source:prepared,path:'s3://b/c',weight:1}}"], "s3fs", "s3"),
    ],
)
def test_settings_name_the_extra_that_they_need(args, package, extra, monkeypatch):
    assert hydra_cli.read_run(NANO + args)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as caught:
        hydra_cli.read_run(NANO + args)
    assert str(caught.value).endswith(f" needs the package {package}: pip install 'bigtrain[{extra}]'")
    assert "\n" not in str(caught.value)
    if "data" in args[0]:
        with pytest.raises(ConfigError, match=f"needs the package {package}:"):
            hydra_cli.read_data(args)


def test_deepspeed_is_not_there_on_every_system(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert list(missing_packages(TrainConfig())) == []
    with pytest.raises(ConfigError, match=r"^engine=zero3 needs the package deepspeed, which is for Linux; use ddp"):
        hydra_cli.read_run([*NANO, "engine=zero3"])


def test_a_report_names_its_extra_before_it_reads_a_run(monkeypatch, tmp_path):
    (tmp_path / "config.yaml").touch()
    assert report.read([str(tmp_path)]).runs == [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"^bigtrain report needs the package matplotlib: pip install 'bigtrain\[rep"):
        report.read([str(tmp_path)])


def test_a_url_that_no_check_has_seen_is_refused_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"pip install 'bigtrain\[s3\]'"):
        RemoteDirectory("s3://bucket/corpus")


def test_every_extra_that_is_named_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    source = "\n".join(path.read_text() for path in (ROOT / "bigtrain").rglob("*.py"))
    named = re.findall(r'\b(?:lacking|require)\(f?"[^"]*", "([\w.]+)", "(\w+)"\)', source)
    assert {extra for _, extra in named} >= {"report", "tensorboard", "s3", "tiktoken", "dedup", "dashboard", "fp8"}
    for package, extra in ((package.replace("PIL", "pillow"), extra) for package, extra in named):
        assert any(need.startswith(package.replace("_", "-")) for need in extras[extra]), (package, extra)
        assert extra in re.search(r"\[(.*)\]", extras["all"][0])[1].split(",")
    require("this", "torch", "none")
    page = (ROOT / "docs/installation.md").read_text()
    assert [extra for extra in extras if f"`{extra}`" not in page.partition("## Extras")[2]] == []


def test_without_tiktoken_ids_are_the_same(tmp_path, monkeypatch):
    texts = ["the quick brown fox's 123 jumps\n\n  over", "größer and 日本語", ""]
    built = build_tokenizer(DataConfig(tokenizer_vocab_size=300), iter(texts * 50))
    built.tokenizer.save(str(tmp_path / "tokenizer.json"))
    coding = Coding(True, built.eos_id, 0, built.adds_special, built.reads_special)
    with_tiktoken = [fast_encoder(built.tokenizer)(text).tolist() for text in texts]
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert fast_encoder(built.tokenizer) is None
    # What an on-the-fly run of a machine with tiktoken continues with.
    encode = encoder.__wrapped__(tmp_path, coding)
    assert [encode.args[0](text).tolist() for text in texts] == with_tiktoken


def test_processors_are_counted_where_processes_are_not_bound(monkeypatch):
    assert processes.num_usable_cpus() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert processes.num_usable_cpus() == 12


@pytest.fixture
def listed_gpus(tmp_path, monkeypatch):
    """A machine whose driver lists two GPUs."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 550.54.15'\necho 'NVIDIA H100 80GB HBM3, 550.54.15'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return program


def test_gpus_that_torch_cannot_use_are_named_by_the_first_rank_of_a_node(listed_gpus, monkeypatch, caplog):
    words = "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver. Alternatively, go."
    monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError(words)))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("bigtrain.distributed.collectives.get_logger", lambda: __import__("logging").getLogger("x"))
    assert pick_device(RankInfo(9, 16, 1, 8)).type == "cpu"
    assert not caplog.messages
    assert pick_device(RankInfo(8, 16, 0, 8)).type == "cpu"
    assert caplog.messages == [
        "training on the CPU, though nvidia-smi lists 2 x NVIDIA H100 80GB HBM3 (driver 550.54.15), for torch "
        f"{torch.__version__} cannot use them: The NVIDIA driver on your system is too old (found version 12040); its build "
        "needs a driver for CUDA 13.0"
    ]


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA")
def test_a_torch_without_cuda_says_so(listed_gpus):
    assert "Torch not compiled with CUDA enabled" in unused_gpus()


def test_gpus_that_are_hidden_or_not_there_are_not_named(listed_gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unused_gpus() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for answer in ("exit 9", "true"):
        listed_gpus.write_text(f"#!/bin/sh\n{answer}\n")
        assert unused_gpus() is None
    listed_gpus.unlink()
    monkeypatch.setenv("PATH", str(listed_gpus.parent))
    assert unused_gpus() is None


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("bigtrain tr", "train"),
        ("bigtrain train engine=fs", "engine=fsdp"),
        ("bigtrain verify-resume resume_w", "resume_world="),
        ("bigtrain submit cluster=slurm_c", "cluster=slurm_cpu"),
        ("bigtrain nothing x", ""),
    ],
)
def test_words_are_completed_in_bash(line, found, tmp_path):
    program = tmp_path / "bigtrain"
    program.write_text(f"#!{sys.executable}\nfrom bigtrain.cli import main\nmain()\n")
    program.chmod(0o755)
    script = (
        'eval "$(bigtrain -sc install=bash)"; complete -p bigtrain >/dev/null || exit 9\n'
        f"COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; typed=($COMP_LINE); COMP_CWORD=$((${{#typed[@]}} - 1))\n"
        'hydra_bash_completion; echo "${COMPREPLY[@]}"'
    )
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, env=env)
    assert (ended.stdout.strip(), ended.returncode, ended.stderr) == (found, 0, "")
