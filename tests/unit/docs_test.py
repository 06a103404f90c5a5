"""The pages of documentation: what is written from the code is current, and what is read is readable."""

import re
from pathlib import Path

import pytest

from bigtrain.cli import settings
from bigtrain.config import TrainConfig
from bigtrain.config.convert import key_types

REPOSITORY = Path(__file__).parents[2]
PAGES = [
    page for folder in ("", "benchmarks", "docker", "docs", "slurm") for page in (REPOSITORY / folder).glob("*.md")
]
MAX_COLUMNS = 120
MAX_PARAGRAPH_LINES = 7


def long_lines(page: str) -> list[int]:
    """Return the numbers of the lines that are too long; rows of tables cannot be broken."""
    lines = enumerate(page.splitlines(), 1)
    return [number for number, line in lines if len(line) > MAX_COLUMNS and not line.startswith("| ")]


def long_paragraphs(page: str) -> list[str]:
    """Return how paragraphs and entries of lists begin that have too many lines; blocks of code are none."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-|#]|\d+\.) ?)", text)
    return [block.strip().splitlines()[0] for block in blocks if block.strip().count("\n") >= MAX_PARAGRAPH_LINES]


def dead_links(page: Path) -> list[str]:
    """Return the links of a page to files that are not there."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    return [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_the_page_of_settings_is_current():
    renew = "python -m bigtrain.cli.settings > docs/settings.md"
    assert (REPOSITORY / "docs/settings.md").read_text() == settings.page(), f"renew it: {renew}"


def test_every_setting_and_every_bound_is_listed():
    listed = {setting.key: setting for setting in settings.settings()}
    assert listed.keys() == key_types(TrainConfig).keys()
    assert listed["train.steps"] == ("train.steps", "int, at least 1", "1000", "Optimizer steps of the whole run.")
    assert listed["data.packing"][1:3] == (
        "concat | best_fit | documents | preferences or null, not with source=synthetic | records | images | own",
        "null",
    )
    assert listed["model.rope_scaling.factor"][1:3] == ("float, at least 1", "<needed>")
    assert listed["data.mixture.*.weight"].kind == "float, at least 0"
    assert listed["train.micro_batch_size"].kind == "int or null, at least 1, at most 1000000"
    assert listed["optimizer.betas"].kind == "list of float, at least 0, less than 1"
    assert listed["validation.batches"].kind.endswith("not with every_steps=0")
    assert listed["engine.fsdp"].meaning.endswith("(only with kind=fsdp | hsdp)")
    assert listed["data.mixture.*.path"][1:3] == ("path or URL or null", "null")
    assert [setting.key for setting in listed.values() if not setting.meaning] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_pages_have_short_lines_and_paragraphs_and_links_that_lead_somewhere(page: Path):
    assert long_lines(page.read_text()) == []
    assert long_paragraphs(page.read_text()) == []
    assert dead_links(page) == []


def test_long_paragraphs_are_found():
    lines = "one\n" * (MAX_PARAGRAPH_LINES + 1)
    page = f"{lines}\n- {lines}\n```\n{lines}```\n\n| a |\n" + "| b |\n" * 9
    assert long_paragraphs(page) == ["one", "- one"]


def test_long_lines_and_dead_links_are_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"short\n{'x' * 121}\n| {'x' * 121} |\n[a](page.md) [b](https://x.org) [c](gone.md#part)\n")
    assert long_lines(page.read_text()) == [2]
    assert dead_links(page) == ["gone.md"]


def missing_paths(page: str) -> list[str]:
    """Return the modules and scripts that a page names and that are not there."""
    named = set(re.findall(r"`([\w./]+/[\w.]+\.(?:py|sbatch|yaml|sh)|\w+_test\.py)[`:]", page))
    roots = (REPOSITORY, REPOSITORY / "bigtrain", *(REPOSITORY / "tests").iterdir())
    return sorted(path for path in named if not any((root / path).exists() for root in roots))


def missing_tests(page: str) -> list[str]:
    """Return the tests that a page names, by how they begin, and that are not there."""
    sources = "".join(path.read_text() for path in (REPOSITORY / "tests").glob("*/*_test.py"))
    return [name for name in re.findall(r"(test_\w+)…?`", page) if f"def {name}" not in sources]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_pages_name_modules_and_tests_that_exist(page: Path):
    assert missing_paths(page.read_text()) == []
    assert missing_tests(page.read_text()) == []


def test_missing_modules_and_tests_are_found():
    page = "`engine/state.py` and `engine/states.py`, `slurm/train.sbatch`, `docs_test.py`, `gone_test.py: test_missing_pages_…`"
    assert missing_paths(page) == ["engine/states.py", "gone_test.py"]
    assert missing_tests(page) == ["test_missing_pages_"]


def unknown_settings(page: str) -> list[str]:
    """Return the keys in code of a page that look like settings and are none; whole sections are named as well."""
    known = {part for key in key_types(TrainConfig) for part in (key, key.rpartition(".")[0])}
    patterns = [re.compile(re.escape(key).replace(r"\*", r"[\w<>]+")) for key in known]
    sections = "|".join(sorted({key.partition(".")[0] for key in known if "." in key}))
    code = re.findall(r"`([^`\n]+)`", page) + re.findall(r"^```(?:bash)?\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    named = re.findall(rf"(?<![\w./`-])((?:{sections})\.\w[\w.]*)(?==|\s|$|`|,)", "\n".join(code))
    own = r".*\.(bin|npy|safetensors|py|jsonl?|sbatch)|(model|task|data)\.settings\..*"
    own += r"|data\.(order|prepare|read)|train\.stpes"  # packages, and a mistake that is shown
    return [key for key in named if not (re.fullmatch(own, key) or any(p.fullmatch(key) for p in patterns))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_pages_name_settings_that_exist(page: Path):
    text = page.read_text()
    if page.name == "moving.md":  # whose first columns are the settings of other programs
        text = re.sub(r"^\| [^|]*\|", "|", text, flags=re.MULTILINE)
    assert unknown_settings(text) == []


def test_unknown_settings_are_found():
    page = "`data.mixture.web.weight=2 train.stps=1`, `model.settings.width`, `engine.fsdp`\n```\nx data.pth=a\n```\n"
    assert unknown_settings(page) == ["train.stps", "data.pth"]
