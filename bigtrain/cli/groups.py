"""The config groups of ``configs/``."""

import textwrap
from pathlib import Path

import yaml

_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = next(place for place in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if place.is_dir())


def groups(config_name: str = "train") -> dict[str, str | None]:
    """Return the config groups of ``configs/<config_name>.yaml``, with the option in its defaults list or None."""
    found: dict[str, str | None] = dict.fromkeys(("adapter", "experiment", "model", "recipe"))
    for entry in yaml.safe_load((CONFIGS / f"{config_name}.yaml").read_text())["defaults"]:
        if isinstance(entry, dict):
            found.update(entry)
        elif entry == "train":
            found |= groups()
    return dict(sorted(found.items()))


def group_options(group: str) -> list[str]:
    """Return the names that ``group=<name>`` accepts."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def group_lines() -> str:
    """Return one line per config group with its options; defaults are marked with a star."""
    lines = []
    for group, default in groups().items():
        options = [name + "*" * (name == default) for name in group_options(group)]
        text = f"  {group if default else '+' + group:<12} {'  '.join(options)}"
        lines.append(textwrap.fill(text, width=110, subsequent_indent=" " * 15, break_on_hyphens=False))
    return "\n".join(lines)
