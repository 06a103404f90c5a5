"""Whether the labels of a corpus are those that a task predicts."""

from typing import TYPE_CHECKING

from bigtrain.data.read.index import LabelKind, LabelRecord
from bigtrain.errors import DataError, some

if TYPE_CHECKING:
    from bigtrain.tasks.base import Objective

_TOLD = {
    LabelKind.one: "one label per document (data.content=labelled)",
    LabelKind.several: "any number of labels per document (data.content=labelled)",
    LabelKind.numbers: "numbers per document (data.content=numbers)",
    LabelKind.per_token: "a label per word (data.content=tagged)",
}
_MOST_NAMES = 20


def require_labels(labels: LabelRecord | None, objective: "Objective | None", *, where: str) -> None:
    """Refuse a corpus whose labels are not those that an objective needs, or another number of them.

    None is a corpus without labels, or a run of which no objective is known. ``where`` names the corpus in messages.
    """
    wanted = None if objective is None else _wanted(objective)
    if wanted is None:
        return
    kind, size = wanted
    if labels is None or labels.kind is not kind:
        found = _TOLD[labels.kind] if labels else "no labels"
        raise DataError(f"{where}: the documents have {found}; the task needs {_TOLD[kind]}")
    if kind is LabelKind.one and labels.size == 1:
        raise DataError(f"{where}: all documents have the label {labels.names[0]}; there is nothing to tell apart")
    if labels.size != size:
        what, setting = ("numbers", "num_values") if kind is LabelKind.numbers else ("labels", "num_labels")
        names = f" ({some(labels.names, _MOST_NAMES)})" if labels.names else ""
        raise DataError(
            f"{where}: the documents have {labels.size} {what}{names}, not {size}; set task.{setting}={labels.size}"
        )


def _wanted(objective: "Objective") -> tuple[LabelKind, int] | None:
    """Return which labels, and how many of them, an objective on documents reads."""
    fields = objective.fields
    if "lengths" not in fields:
        return None
    if "values" in fields:
        (size,) = fields["values"].shape
        return LabelKind.numbers, int(size)
    if "labels" not in fields:
        return None
    labels = fields["labels"]
    if labels.shape == ("T",):
        return LabelKind.per_token, int(labels.below or 0)
    if labels.shape:
        return LabelKind.several, int(labels.shape[0])
    return LabelKind.one, int(labels.below or 0)
