"""The report: one page from the files of runs alone, read by a real browser."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigtrain.config import TrainConfig
from bigtrain.config.convert import to_dict
from bigtrain.telemetry import figures, names
from bigtrain.telemetry.gauges import Gauges
from bigtrain.telemetry.history import History, differences, read_history
from bigtrain.telemetry.report import _energy, render

SCRIPT = Path(__file__).parents[2] / "launch" / "report.py"
SECRET = "hf_" + "SECRET" * 4


def make_run(directory: Path, *, num_steps: int = 400, lr: float = 3e-4) -> Path:
    """Write what a run of two launches leaves: killed after step 200, begun again from there."""
    directory.mkdir(parents=True)
    config = TrainConfig()
    config.optimizer.lr, config.train.steps, config.run.name = lr, num_steps, directory.name
    (directory / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    lines = [json.dumps(record(step)) for step in range(1, num_steps + 1)]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 101, "lo')  # torn
    environment = {"commit": "abc", "device": "NVIDIA H200", "packages": {"torch": "2.13"}}
    launch = {"world_size": 8, "environment": environment, "peak_source": "data sheet"}
    events = [
        {"event": "start", "step": 0, "launched_at": at(0), "time": clock(5), **launch},
        {"event": "validation", "step": 200, "loss": 3.2, "time": clock(45)},
        {"event": "checkpoint", "step": 200, "time": clock(45)},
        {"event": "resume", "step": 200, "launched_at": at(100), "time": clock(105), "superseded_steps": 7, **launch},
        {"event": "fault", "step": 300, "reason": f"<b>token={SECRET}</b>", "time": clock(125)},
        {"event": "validation", "step": 400, "loss": 3.1, "time": clock(145)},
        {"event": "finished", "step": 400, "time": clock(145)},
    ]
    (directory / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (directory / "samples.jsonl").write_text(json.dumps({"step": 400, "prompt": "<p>", "text": "a & b"}) + "\n")
    (directory / "index.json").write_text(json.dumps({"validation": {"unigram_nats_per_token": 3.25}}))
    return directory


def at(seconds: float) -> float:
    return 1_700_000_000 + seconds


def clock(seconds: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(at(seconds), UTC).isoformat()


def record(step: int) -> dict[str, Any]:
    found = {"step": step, "tokens": step * 1000, "loss": None if step == 7 else 3 + 5 / step, "grad_norm": 1.0}
    found |= {"lr": 1e-3, "step_seconds": 0.2, "tokens_per_second": 5000.0}
    if step % 10 == 0:
        seconds = 5 + step * 0.2 if step <= 200 else 105 + (step - 200) * 0.2
        found |= {"time": clock(seconds), "perf/mfu_causal": 0.4, "memory/host_rss_bytes": 2**30}
        phases = {"data": 0.01, "forward_backward": 0.15, "optimizer": 0.03, "checkpoint_stall": 0.0, "logging": 0.01}
        found |= {f"perf/{name}_seconds": value for name, value in phases.items()}
        found |= {f"optim/grad_norm/blocks.{i}": 0.1 * (i + 1) for i in range(3)}
        for name, share in (("web", 0.75), ("books", 0.25)):
            found |= {f"data/tokens/{name}": int(share * step * 1000), f"data/epochs/{name}": step / 1e4 / share}
    return found


def report(*arguments: object, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=60)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page about two runs."""
    cwd = tmp_path_factory.mktemp("report")
    make_run(cwd / "runs/first")
    make_run(cwd / "runs/second", lr=1e-3)
    result = report("runs/first", "runs/second", cwd=cwd)
    assert (result.returncode, result.stdout, result.stderr) == (0, "report.html\n", "")
    return cwd / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a screen."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if path is None:
        pytest.skip("there is no Chromium on this machine (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


def test_the_page_opens_in_a_browser_without_network_or_complaints(page: Path, browser: Any, tmp_path: Path):
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900})
    tab, said, asked = context.new_page(), [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    for name in ("loss-first", "loss-second", "validation-first", "perf/mfu_causal-second", "optim/grad_norm/blocks.2"):
        boxes = [element.bounding_box() for element in tab.query_selector_all(f'[id$="curve-{name}"]')]
        assert boxes and all(box["width"] > 100 for box in boxes), name
    for event in ("resume-200", "finished-400", "checkpoint-first"):
        assert len(tab.query_selector_all(f'[id*="event-{event}"]')) >= 2, event
    assert tab.query_selector_all('[id*="event-nothing"]') == []  # the selectors do find nothing where nothing is
    text = tab.inner_text("body")
    for words in (
        "first",
        "3.25",
        "finished after step 400 of 400",
        "optimizer.lr",
        "0.0003",
        "0.001",
        "<p>a & b",
        "superseded_steps 7",
        "75.0%",
        "books",
        "The same prompts",
    ):
        assert words in text, words
    assert SECRET not in text and "<b>token=***" in text
    tab.set_viewport_size({"width": 390, "height": 800})  # a phone: nothing has to be moved sideways
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    tab.screenshot(path=tmp_path / "phone.png")
    context.close()


def test_the_page_is_one_small_file_that_points_nowhere(page: Path):
    text = page.read_text()
    assert page.stat().st_size < 2_000_000
    assert "<script" not in text and "src=" not in text
    assert [link for link in text.split('href="')[1:] if not link.startswith(("#", "data:"))] == []


def test_answers_of_several_runs_are_side_by_side(page: Path, tmp_path: Path):
    """Of prompts that all of them had, the last ones; one run has nothing to stand beside."""
    runs = [make_run(tmp_path / name, num_steps=20) for name in ("before", "after")]
    for run, texts in zip(runs, (["old", "older"], ["new"]), strict=True):
        lines = [{"step": 5, "prompt": "why?", "text": text} for text in texts]
        lines += [{"step": 5, "prompt": f"only {run.name}", "text": "alone"}]
        (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = render([read_history(run) for run in runs])
    table = text.partition("The same prompts")[2].partition("</table>")[0]
    assert re.findall("<t[hd]>(.*?)</t[hd]>", table) == ["prompt", "before", "after", "why?", "older", "new"]
    assert "The same prompts" not in render([read_history(runs[0])])


def test_a_long_run_makes_no_larger_page(tmp_path: Path):
    runs = [make_run(tmp_path / "runs" / str(n), num_steps=n) for n in (1_000, 10_000)]
    sizes = [len(render([read_history(run)]).encode()) for run in runs]
    assert max(sizes) < 2_000_000 and sizes[1] < 2 * sizes[0]


@pytest.mark.filterwarnings("error")
def test_odd_runs_have_a_page_too(tmp_path: Path):
    lines = [
        json.dumps(record(step) | ({"loss": None, "grad_norm": None} if step > 3 else {})) for step in range(1, 61)
    ]
    files = {"one": lines[:1], "diverged": lines, "foreign": ['{"a": 1}', "[1]", lines[0], '{"step": 2, "lo']}
    for name, written in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(written))
        (tmp_path / name / "events.jsonl").write_text('{"event": "start", "step": 0}\n{"event": "resu')
        (tmp_path / name / "config.yaml").write_text("train: [1, 2\n")
    histories = [read_history(tmp_path / name) for name in files]
    assert [len(history.records) for history in histories] == [1, 60, 1]
    page = render(histories)
    assert "not a number" in page and "after step 60" in page
    (tmp_path / "one/metrics.jsonl").write_text(json.dumps(record(7)))
    assert "no loss is finite" in render([read_history(tmp_path / "one")])


def test_values_below_0_are_in_the_picture(tmp_path: Path):
    lines = [json.dumps(record(step) | {"train/up": step, "train/down": -step}) for step in range(1, 9)]
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("\n".join(lines))
    with figures.drawing():
        up, down = (figures.line_figure([read_history(run)], f"train/{name}", name) for name in ("up", "down"))
    assert up.axes[0].get_ylim()[0] == 0
    assert down.axes[0].get_ylim()[0] <= -8


def test_the_loss_of_a_short_run_is_in_the_picture(tmp_path: Path):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(record(step) | {"loss": 9 - step}) for step in range(1, 9)))
    with figures.drawing():
        (axes,) = figures.loss_figure([read_history(run)], "step").axes
    assert axes.get_ylim()[1] > 8


def test_a_picture_of_the_loss_alone(tmp_path: Path):
    run = make_run(tmp_path / "run")
    assert report(run, "out=loss.svg", cwd=tmp_path).returncode == 0
    assert "unigram model 3.25" in (tmp_path / "loss.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing: there is no such directory; name one, such as begun, run"),
        (["empty"], "empty: not the directory of a run: it has no config.yaml; name one, such as begun, run"),
        (["begun"], "begun: no step is finished yet"),
        ([], "which run?"),
        (["run", "out=x.doc"], ".html"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, arguments: list[str], message: str):
    make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.yaml").touch()
    result = report(*arguments, cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_totals_count_lost_time(tmp_path: Path):
    history = read_history(make_run(tmp_path / "run"))
    assert history.state == "finished"
    # 45 s of the first launch (from its process's start to its last word) and 45 s of the second; 80 s in steps
    assert history.held_seconds() == pytest.approx(90) and history.train_seconds() == pytest.approx(80)
    assert "88.9% of 0:01:30" in render([history])


@pytest.mark.parametrize(
    ("last", "seconds_ago", "state"),
    [("stop", 9000, "stopped"), (None, 0, "running"), (None, 9000, "no sign of life for 2:30:00")],
)
def test_who_gives_no_sign_any_more_has_ended(tmp_path: Path, last: str | None, seconds_ago: float, state: str):
    run = make_run(tmp_path / "run")
    lines = (run / "events.jsonl").read_text().splitlines()[:-1]
    (run / "events.jsonl").write_text("\n".join(lines + ([json.dumps({"event": last})] if last else [])) + "\n")
    for path in run.iterdir():
        os.utime(path, (path.stat().st_mtime - seconds_ago,) * 2)
    assert read_history(run).state == state


def test_differences_leave_out_names(tmp_path: Path):
    histories = [read_history(make_run(tmp_path / name, lr=lr)) for name, lr in (("a", 1.0), ("b", 2.0))]
    assert differences(histories) == [("optimizer.lr", [1.0, 2.0])]


def test_energy_is_the_sum_of_all_launches():
    gauges = object.__new__(Gauges)
    gauges._joules, gauges._power = 0.0, (0.0, 0.0)
    assert [gauges._add_energy(*reading) for reading in ((10.0, 100.0), (12.0, 200.0), (13.0, 200.0))] == [0, 300, 500]
    records = [{"step": n, names.ENERGY_JOULES: joules} for n, joules in enumerate((0.0, 300.0, 500.0, 0.0, 250.0), 1)]
    history = History(name="a", directory=Path("a"), records=records, events=[], state="finished")
    assert _energy(history, 1) == "0.75 kJ of rank 0's device"
    assert _energy(history, 4) == "0.75 kJ of rank 0's device; 3 kJ if all 4 are alike"
    assert _energy(dataclasses.replace(history, records=records[:0]), 1) == ""
