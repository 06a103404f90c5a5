"""Jobs for Slurm: what is refused, what is rendered, and that every value survives the shell."""

import subprocess
from pathlib import Path

import pytest

from bigtrain.cli import submit
from bigtrain.cli.settings import group_options
from bigtrain.errors import ConfigError, PreflightError

LAUNCH = Path(__file__).parents[2] / "launch"

JOB = ["+model=gpt3_1b", "cluster=slurm_h100", "dry_run=true", "train.global_batch_size=128"]
HOSTILE = 'it\'s $(touch owned) `touch owned` "a" # b; * \\ é'


def rendered(*args: str, directory: Path = Path("/work space")) -> str:
    return submit.render(*submit.read([*JOB, *args]), directory)


def problem(*args: str) -> str:
    with pytest.raises(ConfigError) as caught:
        submit.read([*JOB, *args])
    return str(caught.value)


@pytest.mark.parametrize("name", group_options("cluster"))
def test_every_cluster_composes(name: str):
    config, _ = submit.read(["+model=gpt_nano", f"cluster={name}"])
    assert (config.cluster.gpus_per_node > 0) == (config.cluster.gpu_memory_gib > 0)
    assert config.cluster.host_memory_gib > 0


def test_the_job_gets_the_settings_of_the_training_and_no_others():
    _, args = submit.read([*JOB, "engine=zero2", "cluster.num_nodes=2", "train.steps=7", "run.name=first"])
    assert args == [JOB[0], JOB[-1], "engine=zero2", "train.steps=7", "run.name=first"]


def test_the_options_of_sbatch_follow_from_the_cluster():
    text = rendered("cluster.num_nodes=4", "cluster.partition=long", "cluster.time_limit=1-00:00:00", "run.name=first")
    for option in ("--job-name=first", "--nodes=4", "--gpus-per-node=8", "--partition=long", "--time=1-00:00:00"):
        assert f"\n#SBATCH {option}\n" in text
    assert "\n#SBATCH '--chdir=/work space'\n" in text
    assert "--account" not in text
    assert "--signal=B:USR1@300" in text


def test_every_value_survives_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home = tmp_path / "a checkout's $HOME"
    (home / "slurm").mkdir(parents=True)
    show = 'printf "%s\\0" "$@" "$BIGTRAIN_SRUN_OPTIONS" >arguments\n'
    (home / "slurm/train.sbatch").write_text(show)
    monkeypatch.setattr(submit, "HOME", home)
    plain = HOSTILE.replace("\\", "")
    script = rendered(f"data.path={HOSTILE}", "data=text", f"cluster.container_image={plain}", directory=tmp_path)
    subprocess.run(["bash", "-eu"], input=script, text=True, cwd=tmp_path, check=True, timeout=20)
    *args, srun_options, end = (tmp_path / "arguments").read_text().split("\0")
    assert end == ""
    assert args == [JOB[0], JOB[-1], f"data.path={HOSTILE}", "data=text"]
    assert srun_options.splitlines()[0] == f"--container-image={plain}"
    assert not (tmp_path / "owned").exists()


def test_without_quotes_the_shell_would_take_part(tmp_path: Path):
    subprocess.run(["bash"], input=f"true {HOSTILE[5:19]}\n", text=True, cwd=tmp_path, check=True, timeout=20)
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("text", ["a\nb", "a\\b", "\x1b[0m"])
@pytest.mark.parametrize("key", ["partition", "account", "time_limit", "container_image"])
def test_what_cannot_be_quoted_for_slurm_is_refused(key: str, text: str):
    assert problem(f"cluster.{key}={text}").startswith(f"cluster.{key}=")


def test_a_run_that_cannot_fit_the_cluster_is_refused(capsys: pytest.CaptureFixture[str]):
    too_large = ["+model=gpt3_175b", "cluster=slurm_h100", "dry_run=true"]
    with pytest.raises(PreflightError, match=r"does not fit.*\n(.*\n)*.*64 ranks"):
        submit.run(submit.read(too_large))
    assert capsys.readouterr().out == ""
    assert submit.run(submit.read([*too_large, "preflight=warn"])) == 0
    assert "--nodes=1" in capsys.readouterr().out
    nodes = ["cluster.num_nodes=8", "train.global_batch_size=64", "train.micro_batch_size=1"]
    assert submit.run(submit.read([*too_large, *nodes, "engine.activation_checkpointing=full"])) == 0


SIZED = [name for name in group_options("recipe") if name.endswith("xh100")]


@pytest.mark.parametrize("recipe", SIZED)
def test_a_recipe_with_a_number_of_gpus_fits_them(recipe: str):
    num_gpus = int(recipe.rpartition("_")[2].removesuffix("xh100"))
    job = [f"+recipe={recipe}", "cluster=slurm_h100", "data=text", "data.path=texts", "dry_run=true"]
    assert submit.run(submit.read([*job, f"cluster.num_nodes={num_gpus // 8}"])) == 0


def test_a_recipe_does_not_fit_fewer_gpus():
    job = ["+recipe=llama3_405b_512xh100", "cluster=slurm_h100", "cluster.num_nodes=8", "dry_run=true"]
    with pytest.raises(PreflightError, match="does not fit"):
        submit.run(submit.read(job))


def test_the_settings_are_checked_for_the_world_of_the_job():
    hsdp = ["engine=hsdp", "engine.dp_shard=16"]
    assert "dp_shard=16 does not divide the world size 24" in problem("cluster.num_nodes=3", *hsdp)
    assert problem("train.stpes=1").startswith("train.stpes: unknown key; did you mean 'train.steps'?")
    assert "cluster.gpus_per_node=-1" in problem("cluster.gpus_per_node=-1", "cluster.num_nodes=0").splitlines()[1]
    found = problem("cluster.time_limit=12h", "cluster.interface=10.0.0.1/24").splitlines()
    assert [line.partition("=")[0] for line in found] == ["cluster.time_limit", "cluster.interface"]


def test_what_the_job_relies_on_stays():
    for limit in ("6", "4:59", "0:05:00", "0-00:05"):
        assert "must be longer than cluster.save_before_end_seconds=300" in problem(f"cluster.time_limit={limit}")
    options = '["--constraint=ib","--nodes=7","-a1-3","--signal=B:TERM@9"]'
    found = problem(f"cluster.sbatch_options={options}")
    assert found.startswith("cluster.sbatch_options=['--nodes=7', '-a1-3', '--signal=B:TERM@9']")


@pytest.mark.parametrize(
    "limit", ["90", "90:30", "12:00:00", "2-12", "2-12:30", "2-00:00:00", "unlimited", "0", "6:01"]
)
def test_time_limits_are_those_of_slurm(limit: str):
    assert f"#SBATCH --time={limit}\n" in rendered(f"cluster.time_limit={limit}")


@pytest.mark.parametrize(("num_gpus", "devices"), [(0, "void"), (8, "all")])
def test_a_container_gets_the_gpus_that_the_nodes_have(num_gpus: int, devices: str):
    gpus = [f"cluster.gpus_per_node={num_gpus}", "cluster.gpu_memory_gib=80", "train.micro_batch_size=1"]
    assert f"export NVIDIA_VISIBLE_DEVICES={devices}\n" in rendered(*gpus, "cluster.container_image=/shared/x.sqsh")


def test_without_a_cluster_the_presets_are_listed():
    with pytest.raises(ConfigError, match="cluster=slurm_h100"):
        submit.read(["+model=gpt_nano"])


def test_a_sweep_is_a_loop_of_the_shell():
    with pytest.raises(ConfigError, match=r"--multirun is not offered.*bigtrain sweep "):
        submit.read(["--multirun", "optimizer.lr=1e-4,3e-4"])


def test_a_secret_on_the_command_line_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    found = problem("data.path=https://me:hunter22@host/x", "logging.wandb_project=0123456789abcdef0123")
    assert [line.partition(":")[0] for line in found.splitlines()] == ["data.path", "logging.wandb_project"]
    assert "hunter22" not in found
    assert "0123456789" not in found


def test_a_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert submit.run(submit.read(JOB)) == 0
    assert list(tmp_path.iterdir()) == []


def test_where_there_is_no_sbatch_the_job_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch here; the job is in runs/gpt3_1b/job"):
        submit.run(submit.read([arg for arg in JOB if arg != "dry_run=true"]))
    assert (tmp_path / "runs/gpt3_1b/job.sbatch").read_text() == rendered(directory=tmp_path)


@pytest.mark.parametrize("name", ["../up", "a/b", "/abs", "..", ".hidden", "a\nb", "-x", "a b"])
def test_a_run_name_cannot_leave_its_directory(name: str):
    assert "run.name=" in problem(f"run.name={name}")
