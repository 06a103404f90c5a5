"""Which causal language models of transformers are trained as transformers computes them: every one, in small.

    python benchmarks/families.py --only llama,mamba
    python benchmarks/families.py --table docs/families.md           all of them; goes on where it was interrupted

A family is a ``model_type`` that ``AutoModelForCausalLM`` has, with a small configuration (``small_configs.py``) in
fp32 without dropout. It starts from a ``config.json`` alone and from a directory that ``save_pretrained`` wrote.
Compared are

- the logits of our model before the first step and those of transformers' own, with the same weights;
- the losses of 3 steps of the trainer on two ranks under every engine and those of a loop by hand: transformers'
  model, torch's AdamW, the same batches;
- the logits of an export, opened by transformers, and those of the checkpoint that it was made from.

What is refused is listed with its sentence.
"""

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Ranks are forked from a server that is not started in this directory, but has to find these modules.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])

import transformers
from family_checks import WORLD_SIZE, compare_export, compare_start, prepare, train
from small_configs import VARIANTS
from small_runs import call
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bigtrain.config import EngineKind
from bigtrain.testing.ranks import RankFailedError

ENGINES = (EngineKind.ddp, EngineKind.fsdp, EngineKind.zero1, EngineKind.zero3)
BUILT_ALIKE = (EngineKind.ddp, EngineKind.fsdp, EngineKind.zero1)
"""From a ``config.json`` alone only ``zero3`` is tried, which builds a model in pieces: the others fill one as from weights."""
STARTS = ("scratch", "pretrained")
TOLERANCE = 1e-5

Figures = dict[str, Any]
"""Of one family, as they are kept: ``class``, ``parameters``; differences by check; sentences under ``refused`` and
``failed``, by check."""


def examine(family: str, changes: dict[str, Any], engines: Iterable[EngineKind], starts: Iterable[str]) -> Figures:
    """Return what :func:`prepare`, :func:`compare_start`, :func:`train` and :func:`compare_export` find."""
    figures: Figures = {"refused": {}, "failed": {}}
    with tempfile.TemporaryDirectory(prefix=f"{family}-") as temporary:
        directory = Path(temporary)
        made = attempt(figures, directory, "build", prepare, 1, family, changes, directory)
        if made is None:
            return figures
        figures |= made
        exported = None
        for start in starts:
            compared = attempt(figures, directory, f"{start} logits", compare_start, 1, directory, start)
            if compared is None:
                continue
            figures[f"{start} logits"] = compared["logits"]
            for engine in engines:
                if start == "scratch" and engine in BUILT_ALIKE and EngineKind.zero3 in engines:
                    continue
                what = f"{start} {engine.name}"
                losses = attempt(figures, directory, what, train, WORLD_SIZE, directory, start, engine)
                if losses is not None:
                    figures[what] = relative_difference(losses, compared["losses"])
                    exported = directory / "runs" / f"{start}-{engine.name}"
        if exported:
            opened = attempt(figures, directory, "export", compare_export, 1, directory, exported)
            figures |= {"export": opened["logits"]} if opened else {}
    return figures


def relative_difference(losses: list[float], expected: list[float]) -> float:
    """Return the largest relative difference; infinity for a NaN or another number of steps."""
    if len(losses) != len(expected):
        return math.inf
    differences = [abs(loss - other) / abs(other) for loss, other in zip(losses, expected, strict=True)]
    return math.inf if any(map(math.isnan, differences)) else max(differences)


def attempt(
    figures: Figures, directory: Path, what: str, function: Callable[..., Any], world_size: int, *args: Any
) -> Any:
    """Return what rank 0 returns; None, with the reason in ``figures``, if it is refused or fails."""
    try:
        value, refusal = call(function, world_size, *args)
    except RankFailedError as error:
        figures["failed"][what] = last_words(str(error)).replace(str(directory), "")
        return None
    if refusal:
        figures["refused"][what] = refusal.replace(str(directory), "")
    return value


def last_words(text: str) -> str:
    """Return the exception of a traceback, in short, with the place that raised it."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)] or lines
    places = [line.strip() for line in lines if line.lstrip().startswith("File ")]
    place = places[-1].split("site-packages/")[-1].replace('"', "").removeprefix("File ") if places else ""
    place = re.sub(r"^/.*/(?=(benchmarks|bigtrain)/)", "", place)
    return f"{errors[-1][:200]}{f' ({place})' if place else ''}"


def verdict(figures: Figures) -> str:
    """Return ``equal``, ``refused``, ``differs``, ``fails`` or, where transformers itself cannot, ``not built``."""
    if "build" in figures["failed"]:
        return "not built"
    if figures["failed"]:
        return "fails"
    differences = [value for value in figures.values() if isinstance(value, float)]
    if any(value > TOLERANCE for value in differences):
        return "differs"
    return "refused" if figures["refused"] else "equal"


# The table


def table(results: dict[str, Figures]) -> str:
    """Return the page of docs: what is equal, what is refused, what is neither."""
    verdicts = {name: verdict(figures) for name, figures in results.items()}
    counts = [f"{list(verdicts.values()).count(word)} {word}" for word in ("equal", "refused", "differs", "fails")]
    not_built = [name for name, word in verdicts.items() if word == "not built"]
    columns = ["family", "from config", "from weights", *(engine.name for engine in ENGINES), "export"]
    measured = [[name, *cells(figures)] for name, figures in results.items() if name not in not_built]
    refused = [[name, sentence(f["refused"])] for name, f in results.items() if f["refused"]]
    failed = [[name, sentence(results[name]["failed"])] for name, word in verdicts.items() if word == "fails"]
    parts = [INTRODUCTION.format(version=transformers.__version__, counts=", ".join(counts)), rows(columns, measured)]
    parts += ["## Refused", rows(["family", "what is said"], refused)]
    parts += ["## Fails", rows(["family", "how"], failed)] if failed else []
    reasons = [[name, sentence(results[name]["failed"])] for name in not_built]
    parts += ["## Not tried", NOT_TRIED, rows(["family", "why"], reasons)]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """\
# Families of transformers

Each `model_type` that `AutoModelForCausalLM` of transformers {version} has, as a small model in fp32:
{counts}. Written by `benchmarks/families.py`.

The figures are the largest relative differences from transformers itself: of the logits before the first step, started
from a `config.json` and from weights; of the losses of three steps on two ranks under each engine, against a loop by
hand over transformers' model; of the logits of an export, opened by transformers."""
NOT_TRIED = """\
These do not train in transformers from a small configuration and token ids alone, or need packages that are not
here."""


def rows(header: list[str], lines: list[list[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join([row(*header), row(*["---"] * len(header)), *(row(*line) for line in lines)])


def row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |"


def cells(figures: Figures) -> list[str]:
    """Return the figures of a family, or a word, by column."""

    def cell(*checks: str) -> str:
        for word in ("failed", "refused"):
            if any(check in figures[word] for check in checks):
                return word
        found = [figures[check] for check in checks if check in figures]
        return "-" if not found else f"{max(found):.0e}" if max(found) else "0"

    starts = [cell(f"{start} logits") for start in STARTS]
    return [*starts, *(cell(*(f"{start} {e.name}" for start in STARTS)) for e in ENGINES), cell("export")]


def sentence(by_check: dict[str, str]) -> str:
    """Return the first of several sentences."""
    return next(iter(by_check.values()))


def main() -> int:
    """Examine the families that are asked for; return 0 if all are equal, refused or not built."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="families, with commas; default: all")
    parser.add_argument("--engines", default=",".join(engine.name for engine in ENGINES))
    parser.add_argument("--starts", default=",".join(STARTS))
    parser.add_argument("--json", type=Path, help="keeps the figures; what is in it already is not computed again")
    parser.add_argument("--table", type=Path, help="writes the table there")
    args = parser.parse_args()
    engines, starts = [EngineKind[name] for name in args.engines.split(",")], args.starts.split(",")
    results = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    known = {family: (family, {}) for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} | VARIANTS
    wanted = args.only.split(",") if args.only else list(known)
    for number, name in enumerate(wanted, start=1):
        if name in results:
            continue
        begin = time.monotonic()
        results[name] = figures = examine(*known[name], engines, starts)
        differences = [value for value in figures.values() if isinstance(value, float)]
        worst = f"{max(differences):.0e}" if differences else "-"
        problems = "".join(
            f"\n    {check}: {text}" for word in ("refused", "failed") for check, text in figures[word].items()
        )
        print(
            f"[{number}/{len(wanted)}] {name}: {verdict(figures)} {worst} ({time.monotonic() - begin:.0f} s){problems}",
            flush=True,
        )
        if args.json:
            partial = args.json.with_suffix(".tmp")
            partial.write_text(json.dumps(results, indent=1) + "\n")
            partial.replace(args.json)
    if args.table:
        args.table.write_text(table({name: results[name] for name in known if name in results}))
    return int(any(verdict(results[name]) in ("differs", "fails") for name in wanted))


if __name__ == "__main__":
    sys.exit(main())
