"""The command line as users meet it: real processes, exit codes, and what appears on the terminal."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bigtrain.cli import checkpoints, generate, hydra_cli, report, watch
from bigtrain.cli.settings import group_options
from bigtrain.config import TrainConfig
from bigtrain.errors import ConfigError

LAUNCH = Path(__file__).parents[2] / "launch"

LAUNCHERS = ["train.py", "prepare.py", "validate.py", "generate.py", "export.py", "verify_resume.py", "parity.py"]
LAUNCHERS += ["submit.py", "where.py"]
# What a launcher may import before it has work to do; torch alone is 2,000. benchmarks/startup.py has the seconds.
MAX_IMPORTED_MODULES = 400

# A launcher like the real ones whose work is a line of Python.
STUB = """
import os, sys
from bigtrain.cli import hydra_cli
from bigtrain.errors import DataError
hydra_cli.RANK_0_HEAD_START_SECONDS = {head_start}
def run(config):
    {work}
hydra_cli.main(hydra_cli.read_run, run, lambda: "help")
"""


def environment(**changes: str) -> dict[str, str]:
    launcher_variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "HYDRA_FULL_ERROR")
    kept = {key: value for key, value in os.environ.items() if key not in launcher_variables}
    return kept | {"OMP_NUM_THREADS": "1"} | changes


def start(command: list[str], cwd: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=cwd, env=environment(**env), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(script: Path | str, *args: str, cwd: Path, **env: str) -> tuple[int, str, str]:
    """Run a launcher to its end and return its exit code, standard output and standard error."""
    process = start([sys.executable, str(LAUNCH / script), *args], cwd, **env)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def stub(directory: Path, work: str, *, head_start: float = 0.2) -> Path:
    path = directory / "stub.py"
    path.write_text(STUB.format(work=work, head_start=head_start))
    return path


def problem(*args: str) -> str:
    """Return the message that ``args`` get from the launchers of runs, in this process."""
    with pytest.raises(ConfigError) as caught:
        hydra_cli.read_run(list(args))
    return str(caught.value)


# Exit codes and streams


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["+model=gpt_nano", "train.stpes=1"], "train.stpes: unknown key; did you mean 'train.steps'?"),
        (["+model=gpt_nano", "+train.stpes=1"], "train.stpes: unknown key; did you mean 'train.steps'?"),
        (["+model=gpt_nano", "engine=fdsp"], "engine=fdsp: unknown; did you mean 'fsdp'?"),
        (["--train.steps=1"], "unrecognized arguments: --train.steps=1; settings are written key=value"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(args: list[str], message: str, tmp_path: Path):
    code, out, err = run("train.py", *args, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_a_model_the_presets_are_listed(tmp_path: Path):
    code, _, err = run("train.py", cwd=tmp_path)
    assert code == 2
    assert "no model is chosen" in err
    assert group_options("model")
    assert all(f"+model={preset}" in err for preset in group_options("model"))
    assert "Traceback" not in err


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_help_and_mistakes_answer_quickly_and_without_torch(launcher: str, tmp_path: Path):
    for args, expected in ((["--help"], 0), (["foo.bar=1"], 2)):
        command = [sys.executable, "-X", "importtime", str(LAUNCH / launcher), *args]
        process = start(command, tmp_path)
        out, err = process.communicate(timeout=60)
        assert process.returncode == expected
        assert (len(out) > 300) == (expected == 0)
        imported = set(re.findall(r"\| +([\w.]+)$", err, re.MULTILINE))
        assert "bigtrain.errors" in imported
        assert not {"torch", "numpy", "transformers", "deepspeed", "wandb"} & imported
        assert expected != 0 or "hydra" not in imported
        assert len(imported) < MAX_IMPORTED_MODULES


def test_help_names_presets_groups_and_the_most_used_settings(tmp_path: Path):
    _, out, _ = run("train.py", "-h", cwd=tmp_path)
    for text in ("fsdp*", "stdlib*", "+experiment", "train.steps=1000", "optimizer.lr=0.0003", "torchrun", "--cfg job"):
        assert text in out
    assert all(preset in out for preset in group_options("model"))


def test_hydra_shows_the_composed_configuration(tmp_path: Path):
    code, out, err = run("train.py", "engine=zero2", "--cfg", "job", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "kind: zero2" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argument", ["--local_rank=0", "--local-rank=3"])
def test_the_argument_of_old_launchers_is_dropped(argument: str, tmp_path: Path):
    code, out, _ = run(stub(tmp_path, "print(config.train.steps)"), argument, "+model=gpt_nano", cwd=tmp_path)
    assert (code, out) == (0, "1000\n")


@pytest.mark.parametrize(("work", "expected"), [("return 75", 75), ("return 0", 0), ("return None", 0)])
def test_the_exit_code_is_that_of_the_run(work: str, expected: int, tmp_path: Path):
    assert run(stub(tmp_path, work), "+model=gpt_nano", cwd=tmp_path) == (expected, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["stub.py"]


def test_an_error_of_the_user_in_the_run_has_no_traceback_and_a_fault_has_one(tmp_path: Path):
    code, out, err = run(stub(tmp_path, "raise DataError('no such file')"), "+model=gpt_nano", cwd=tmp_path)
    assert (code, out, err) == (2, "", "no such file\n")
    code, _, err = run(stub(tmp_path, "raise RuntimeError('ours')"), "+model=gpt_nano", cwd=tmp_path)
    assert code == 1
    assert "Traceback" in err
    assert "hydra/" not in err


def test_contradictions_are_found_for_the_world_of_the_launcher(tmp_path: Path):
    script = stub(tmp_path, "pass")
    hsdp = ["engine=hsdp", "engine.dp_shard=2"]
    assert run(script, "+model=gpt_nano", *hsdp, cwd=tmp_path, WORLD_SIZE="2")[0] == 0
    code, _, err = run(script, "+model=gpt_nano", *hsdp, "optimizer.lr=0", cwd=tmp_path, WORLD_SIZE="3")
    assert code == 2
    assert err.splitlines() == [
        "engine.dp_shard=2 does not divide the world size 3",
        "optimizer.lr=0.0: must be more than 0",
    ]


def test_settings_without_effect_are_named_by_rank_0(tmp_path: Path):
    script, args = stub(tmp_path, "pass"), ["+model=gpt_nano", "engine.dp_shard=2"]
    assert run(script, *args, cwd=tmp_path) == (0, "", "warning: engine.dp_shard is ignored by engine=fsdp\n")
    assert run(script, *args, cwd=tmp_path, RANK="1", WORLD_SIZE="2") == (0, "", "")


# Ranks


def test_a_mistake_on_the_command_line_is_named_by_rank_0_at_once_and_later_by_a_rank_that_is_alone_with_it(
    tmp_path: Path,
):
    script = stub(tmp_path, "pass")
    assert run(script, "lr=1", cwd=tmp_path, RANK="0", WORLD_SIZE="2")[2].startswith("lr: unknown key")
    code, out, err = run(script, "lr=1", cwd=tmp_path, RANK="1", WORLD_SIZE="2")
    assert (code, out, err.startswith("[rank 1] lr: unknown key")) == (2, "", True)


def test_a_rank_that_fails_alone_speaks_for_itself(tmp_path: Path):
    work = "raise DataError('first' + chr(10) + 'second') if os.environ['RANK'] == '1' else SystemExit(0)"
    args = ["+model=gpt_nano"]
    code, _, err = run(stub(tmp_path, work), *args, cwd=tmp_path, RANK="1", WORLD_SIZE="2")
    assert (code, err) == (2, "[rank 1] first\n[rank 1] second\n")


def test_a_rank_that_is_ended_while_rank_0_speaks_stays_silent(tmp_path: Path):
    # Even where the run has left a handler behind that swallows the launcher's SIGTERM.
    work = "import signal; signal.signal(15, lambda *_: None); print('up', flush=True); raise DataError('same')"
    script = stub(tmp_path, work, head_start=60.0)
    process = start([sys.executable, str(script), "+model=gpt_nano"], tmp_path, RANK="1", WORLD_SIZE="2")
    assert process.stdout.readline() == "up\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (-signal.SIGTERM, "")


def test_torchrun_shows_a_mistake_once(tmp_path: Path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = start([*torchrun, str(LAUNCH / "train.py"), "+model=gpt_nano", "train.stpes=1"], tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1  # torchrun's own code for any failure
    assert err.count("did you mean 'train.steps'?") == 1
    assert re.search(r"exitcode\s*: 2", err)


# What is said, in this process for speed

MISTAKES = {
    "modle: unknown key; did you mean 'model'?": ["+modle=gpt_nano"],
    "optimiser.lr: unknown key; did you mean 'optimizer.lr'?": ["optimiser.lr=1"],
    "lr: unknown key; did you mean 'optimizer.lr'?": ["+lr=1"],
    "engin: unknown key; did you mean 'engine'?": ["engin=fsdp"],
    "model=gpt_nan: unknown; did you mean 'gpt_nano'?": ["+model=gpt_nan"],
    "model=gpt_nano: write +model=gpt_nano": ["model=gpt_nano"],
    "experiment=demo: write +experiment=demo": ["experiment=demo"],
    "+engine=zero1: write engine=zero1": ["+engine=zero1"],
    "++engine=zero1: write engine=zero1": ["++engine=zero1"],
    "engine.kind: unknown value 'fdsp'; did you mean 'fsdp'?": ["engine.kind=fdsp"],
    "train.steps: expected int, got 'abc'": ["train.steps=abc"],
    "train.steps: expected int, got 100000.0": ["train.steps=1e5"],
    "train.steps: expected int, got None": ["train.steps=null"],
    "engine.compile: expected bool, got 'maybe'": ["engine.compile=maybe"],
    "optimizer.betas[1]: expected float, got 'b'": ["optimizer.betas=[0.9,b]"],
    "train: expected a section with keys, got 5": ["train=5"],
    "train.seed=1,2: one value, please": ["train.seed=1,2"],
    "cannot read 'foo'; settings are written key=value": ["foo"],
    "cannot read 'train.steps=(1'": ["train.steps=(1"],
    "Could not delete 'model'": ["~model"],
    "train.steps: While dereferencing": ["train.steps=${run.name}"],
    "--multirun is not offered": ["-m", "train.seed=1"],
    "unrecognized arguments: --lr": ["--lr"],
    "Cannot find primary config 'nope'": ["--config-name=nope"],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_named_with_the_way_out(message: str):
    found = problem(*MISTAKES[message])
    assert found.startswith(message)
    assert "\n" not in found


def test_all_mistakes_are_named_at_once():
    found = problem("+model=gpt_nano", "train.stpes=1", "engine.kind=x", "+foo=1", "train.seed=a").splitlines()
    assert [line.split(":")[0] for line in found] == ["train.stpes", "engine.kind", "foo", "train.seed"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hidden_dmi: 3", "model.hidden_dmi: unknown key; did you mean 'model.hidden_dim'?"),
        ("_target_: os.system", "model._target_: unknown key"),
        ("hidden_dim: wide", "model.hidden_dim: Value 'wide'"),
        ("hidden_dim: [1", "while parsing a flow sequence"),
    ],
)
def test_a_mistake_in_a_preset_of_the_users_own_is_named(text: str, message: str, tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(text + "\n")
    assert problem(f"--config-dir={tmp_path}", "+model=mine").startswith(message)


def test_a_preset_of_the_users_own_names_the_run(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("hidden_dim: 64\n")
    config = hydra_cli.read_run([f"--config-dir={tmp_path}", "+model=mine"])
    assert (config.run.name, config.model.hidden_dim) == ("mine", 64)


def test_what_is_missing_is_asked_for():
    with pytest.raises(ConfigError, match=r"^checkpoint: missing; write checkpoint=\.\.\.$"):
        hydra_cli.read(generate.GenerateConfig, [])
    with pytest.raises(ConfigError, match=r"^prompt and prompts=a\.txt: leave one of them out"):
        generate.run(hydra_cli.read(generate.GenerateConfig, ["checkpoint=x", "prompt=a", "prompts=a.txt"]))


@settings(max_examples=20, deadline=None)
@example("${seed")
@example('Hello, "world" (it\'s) a={1: 2} \\')
@example("null")
@given(st.text(alphabet="a${}'\" \\=,()[]:#\n!.-+~@é", max_size=12))
def test_text_needs_no_quotes_of_hydras(text: str):
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return  # a user who quotes for Hydra is understood
    config = hydra_cli.read(generate.GenerateConfig, ["checkpoint=x", f"prompt={text}"])
    assert config.prompt == text


def test_text_keeps_what_hydra_offers():
    config, _ = hydra_cli.compose(
        TrainConfig, ["run.name='a b'", "data.path=null", "run.root=x/${train.seed}"], config_name="train"
    )
    assert (config.run.name, config.data.path, config.run.root) == ("a b", None, "x/0")


def test_a_batch_script_that_counts_failures_is_told_the_limit(tmp_path: Path):
    command = ("where.py", "+model=gpt_nano", "supervision.max_failed_attempts=7")
    assert run(*command, cwd=tmp_path) == (0, "runs/gpt_nano\n", "") and not (tmp_path / "runs").exists()
    assert run(*command, cwd=tmp_path, BIGTRAIN_RESERVE="1") == (0, "runs/gpt_nano\n0 7\n", "")
    again = {"BIGTRAIN_RESERVE": "1", "SLURM_RESTART_COUNT": "1"}
    assert run(*command, cwd=tmp_path, **again) == (0, "runs/gpt_nano\n1 7\n", "")
    assert run(*command, cwd=tmp_path) == (0, "runs/gpt_nano\n", "")


PRESET_TEXTS = ["010", "12_34", "1e3", "yes", "on", "1:30", "2024-01-01", "8"]


def test_text_in_a_preset_is_what_is_written_there(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("source: text\npath: 1e3\n")
    (tmp_path / "model" / "010.yaml").write_text("hidden_dim: 64\nnum_heads: 0x4\n")
    for number, text in enumerate(PRESET_TEXTS):
        content = f"# @package _global_\ndefaults:\n  - /model: 010\nrun:\n  name: {text}\ntrain: {{steps: 010}}\n"
        (tmp_path / "experiment" / f"e{number}.yaml").write_text(content)
        config, choices = hydra_cli.compose(
            TrainConfig, [f"--config-dir={tmp_path}", f"+experiment=e{number}", "data=mine"], config_name="train"
        )
        assert (config.run.name, config.data.path, choices["model"]) == (text, "1e3", "010")
        assert (config.train.steps, config.model.hidden_dim, config.model.num_heads) == (8, 64, 4), "numbers are YAML's"
    (tmp_path / "experiment" / "m.yaml").write_text(
        "# @package _global_\ndata:\n  mixture:\n    010: &one {path: 010, weight: 2}\n    b: {<<: *one, source: jsonl}\n"
        "run:\n  name: null\n  root: '1_0'\n"
    )
    config, _ = hydra_cli.compose(TrainConfig, [f"--config-dir={tmp_path}", "+experiment=m"], config_name="train")
    assert {name: part.path for name, part in config.data.mixture.items()} == {"010": "010", "b": "010"}
    assert (config.run.name, config.run.root) == (None, "1_0")


def test_a_number_in_a_section_on_the_command_line_is_no_text():
    assert problem("+model=gpt_nano", "run={name:12_34}").startswith("run.name: expected str, got 1234; text that")
    assert "data.mixture.a.path" in problem("+model=gpt_nano", "data.mixture={a:{path:1e3,source:text}}")
    config, _ = hydra_cli.compose(TrainConfig, ["run={name:'12_34',root:x}"], config_name="train")
    assert config.run.name == "12_34"


@pytest.mark.parametrize("option", ["--config-dir {0}", "-cd {0}", "--config-dir={0}"])
def test_options_may_stand_between_settings(option: str, tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntrain:\n  log_every_steps: 3\n")
    written = option.format(tmp_path).split(" ")
    settings_ = ["+model=gpt_nano", "+experiment=mine", "train.steps=2"]
    for place in range(len(settings_) + 1):
        config = hydra_cli.read_run([*settings_[:place], *written, *settings_[place:]])
        assert (config.train.log_every_steps, config.train.steps) == (3, 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["~data.filters"], "~data.filters: nothing is removed here; leave the setting out"),
        (["~run.name"], "~run.name: nothing is removed here"),
        (["--nproc-per-node=2"], "unrecognized arguments: --nproc-per-node=2; torchrun's options go in front"),
        (
            [f"run.name={'a' * 300}"],
            "run.name=aaaaaaaaaaaaaaaaaaaa...: 300 characters; the name of a directory has 255",
        ),
        ([f"run.root=x/{'é' * 200}"], f"run.root=x/{'é' * 200}: a name of 400 bytes; 255 are possible"),
        ([f"data.path={'a/' * 2100}", "data=text"], f"data.path={'a/' * 2100}: a path of 4200 bytes"),
    ],
)
def test_what_no_parser_or_file_system_takes_is_named(args: list[str], message: str):
    found = problem("+model=gpt_nano", *args)
    assert found.startswith(message) and "\n" not in found
    assert problem("+model=gpt_nano", f"run.name={'a' * 256}").startswith("run.name=")
    assert hydra_cli.read_run(["+model=gpt_nano", f"run.name={'a' * 255}"]).run.name == "a" * 255


@pytest.mark.parametrize(
    "read",
    [checkpoints.read, report.read, partial(hydra_cli.read_runs, watch.WatchConfig)],
    ids=["checkpoints", "report", "watch"],
)
def test_the_name_of_a_run_that_no_file_system_takes_is_named(read: Callable[[list[str]], object]):
    with pytest.raises(ConfigError, match="a name of 300 bytes; 255 are possible"):
        read(["a" * 300])


CLOSED = ["<&- >&- 2>&-", ">/dev/full 2>/dev/full"]


@pytest.mark.parametrize("streams", CLOSED)
def test_a_run_trains_though_nobody_can_hear_of_it(streams: str, tmp_path: Path):
    small = "model.num_layers=1 data.sequence_length=16 data=synthetic engine=ddp train.global_batch_size=4"
    command = f"exec {sys.executable} {LAUNCH}/train.py +model=gpt_nano {small} train.steps=3 {streams}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment(), timeout=120, check=False)
    assert done.returncode == 0
    assert len((tmp_path / "runs/gpt_nano/metrics.jsonl").read_text().splitlines()) == 3
    assert '"code": 0' in (tmp_path / "runs/gpt_nano/exit.json").read_text()


@pytest.mark.parametrize(
    ("command", "streams", "code", "err"),
    [
        ("where.py +model=gpt_nano", ">&-", 0, ""),
        ("watch.py --help", "<&- >&-", 0, ""),
        ("train.py --cfg job", ">&-", 0, ""),
        ("where.py +model=nope", "2>&-", 2, ""),
        ("where.py +model=gpt_nano", ">/dev/full", 1, "standard output cannot be written: No space left on device\n"),
        ("report.py --help", ">/dev/full", 1, "standard output cannot be written: No space left on device\n"),
        ("where.py +model=nope", ">/dev/full 2>/dev/full", 2, ""),
        ("train.py --help", "| true; exit ${PIPESTATUS[0]}", None, ""),
    ],
)
def test_closed_and_full_streams(command: str, streams: str, code: int | None, err: str, tmp_path: Path):
    shell = f"{sys.executable} {LAUNCH}/{command} {streams}"
    done = subprocess.run(
        ["bash", "-c", shell], cwd=tmp_path, env=environment(), timeout=60, check=False, capture_output=True, text=True
    )
    assert code in (None, done.returncode)
    assert done.stderr == err


def test_the_command_and_the_scripts_are_the_same(tmp_path: Path):
    for command in (["-m", "bigtrain"], [str(Path(sys.executable).with_name("bigtrain"))]):
        python = [sys.executable] if command[0] == "-m" else []
        process = start([*python, *command, "verify-resume", "--help"], tmp_path)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        assert "  bigtrain verify_resume +model=gpt_nano\n" in out and "launch/" not in out
    assert "  python launch/verify_resume.py +model=gpt_nano\n" in run("verify_resume.py", "--help", cwd=tmp_path)[1]


def test_an_unknown_command_is_told_the_known_ones(tmp_path: Path):
    process = start([sys.executable, "-m", "bigtrain", "trian"], tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("bigtrain trian: there is no such command; did you mean train?\n")
