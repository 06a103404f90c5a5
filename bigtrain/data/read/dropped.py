"""Documents that are left out, counted and named."""

from dataclasses import dataclass, field

_NUM_EXAMPLES = 3
SKIPS = "or leave such out: data.on_bad_row=skip"
"""What to advise besides, where a row or an image cannot be used."""


@dataclass(kw_only=True, slots=True)
class Dropped:
    """Documents left out for one reason."""

    documents: int = 0  # how many
    text_bytes: int = 0  # their size as UTF-8
    examples: list[str] = field(default_factory=list)  # ids of the first of them

    def add(self, document_id: str, text_bytes: int) -> None:
        self.documents += 1
        self.text_bytes += text_bytes
        if len(self.examples) < _NUM_EXAMPLES:
            self.examples.append(document_id)

    def merge(self, other: "Dropped") -> None:
        self.documents += other.documents
        self.text_bytes += other.text_bytes
        self.examples = (self.examples + other.examples)[:_NUM_EXAMPLES]


def tell_bad_rows(bad: Dropped) -> str:
    """Return what ``data.on_bad_row=skip`` has left out as one line."""
    more = "; ..." * (bad.documents > len(bad.examples))
    return f"data.on_bad_row=skip: {bad.documents} bad rows or files left out: {'; '.join(bad.examples)}{more}"
