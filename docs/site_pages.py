"""What mkdocs makes beside docs/*.md: the README as first page, `--help` of every command, the Python API, linked files.

A page links to files of the checkout as on a forge; in the site these lie below `checkout/`, sources as text.
"""

import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from bigtrain.cli import COMMANDS

REPOSITORY = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(?=[)#])")
BARE = "---\nhide: [navigation]\n---\n"
API = {
    "Running": [f"bigtrain.cli.api.{name}" for name in ("train", "load_run", "Run", "validate", "predict", "generate")],
    "Parts of your own": ["bigtrain.tasks.base.Objective", "bigtrain.tasks.base.Field", "bigtrain.config.bounds.Bound"],
    "Errors": [f"bigtrain.errors.{name}Error" for name in ("Bigtrain", "Config", "Data", "Checkpoint", "Preflight")],
}
API_HEAD = """\
# Python

`import bigtrain` offers the functions under *Running*, as `bigtrain.train` and so on; the package is typed (`py.typed`).
[Parts of your own](extending.md) has examples.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are written here, and the files of the checkout that pages link to."""
    made = {"index.md": f"{BARE}{(REPOSITORY / 'README.md').read_text()}", "commands.md": _commands(), "api.md": _api()}
    made |= {_place(path): path.read_text() for path in sorted(_linked())}
    for place, content in made.items():
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Let links lead to where the files are in the site."""
    source, here = _source(page.file.src_uri), posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match) -> str:
        target = _target(source, link[0])
        return posixpath.relpath(_place(target), here or ".") if target.exists() else link[0]

    return LINK.sub(moved, markdown)


def on_page_content(html: str, **_: object) -> str:
    """Leave out the roles of docstrings, which are Sphinx's."""
    return re.sub(r":(class|func|mod):(?=<code>)", "", html)


def _linked() -> set[Path]:
    """Return the files outside of docs/ that a page links to, or a page among these."""
    found: set[Path] = set()
    waiting = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    while waiting:
        targets = {target for target in _links(waiting.pop()) if not target.is_relative_to(REPOSITORY / "docs")}
        waiting += [target for target in targets - found if target.suffix == ".md"]
        found |= targets
    return found - {REPOSITORY / "README.md"}


def _links(page: Path) -> Iterator[Path]:
    for link in LINK.findall(page.read_text()):
        if (target := _target(page, link)).exists():
            yield target


def _target(page: Path, link: str) -> Path:
    target = (page.parent / link).resolve()
    return target / "README.md" if (target / "README.md").exists() else target


def _place(path: Path) -> str:
    """Return where a file of the checkout is in the site."""
    name = path.relative_to(REPOSITORY).as_posix()
    if name == "README.md":
        return "index.md"
    return (
        name.removeprefix("docs/")
        if name.startswith("docs/")
        else f"checkout/{name}{'' if path.suffix == '.md' else '.txt'}"
    )


def _source(place: str) -> Path:
    """Return the file of the checkout that a page of the site shows."""
    if place == "index.md":
        return REPOSITORY / "README.md"
    return REPOSITORY / (place.removeprefix("checkout/") if place.startswith("checkout/") else f"docs/{place}")


def _commands() -> str:
    def page(name: str) -> str:
        asked = [sys.executable, "-m", "bigtrain", name, "--help"]
        said = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout
        return f"## bigtrain {name.replace('_', '-')}\n\n```console\n{said.strip()}\n```\n"

    with ThreadPoolExecutor(4) as pool:
        return "\n".join(["# Commands\n\nWhat `bigtrain <command> --help` says.\n", *pool.map(page, COMMANDS)])


def _api() -> str:
    parts = (f"## {title}\n\n" + "\n\n".join(f"::: {name}" for name in names) for title, names in API.items())
    return "\n\n".join([API_HEAD, *parts])
