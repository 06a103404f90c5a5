"""First pass over the documents: counts, duplicates, validation documents, and the sample for a BPE."""

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from bigtrain.config import DataConfig, Duplicates, FilterConfig
from bigtrain.data.prepare.files import Part
from bigtrain.data.prepare.records import Document, Labels, label_record
from bigtrain.data.prepare.sources import read_part
from bigtrain.data.read.dropped import Dropped, tell_bad_rows
from bigtrain.data.read.index import LabelRecord
from bigtrain.errors import DataError, counted

_VISIBLE = re.compile(r"\S+")
_LETTERS_DIGITS_AND_SPACE = re.compile(r"[^\W_]+|\s+")
_WORD = re.compile(r"\w+")
_SHINGLE_WORDS = 5
_NUM_PERMUTATIONS = 128
_RECALL = 0.95
_BPE_SAMPLE_CHARACTERS = 10_000_000
_PIECE_CHARACTERS = 1 << 16
_QUIET_LINE_END = re.compile(r"(?<=\S)\n(?=\S)")


def rejection(text: str, filters: FilterConfig) -> str | None:
    """Return the name of the first filter that rejects ``text``, or None."""
    if len(text) < filters.min_characters:
        return "min_characters"
    if filters.max_characters is not None and len(text) > filters.max_characters:
        return "max_characters"
    if filters.max_repeated_line_share < 1 and repeated_line_share(text) > filters.max_repeated_line_share:
        return "max_repeated_line_share"
    if filters.max_symbol_share < 1 and symbol_share(text) > filters.max_symbol_share:
        return "max_symbol_share"
    return None


def repeated_line_share(text: str) -> float:
    """Return the share of characters in lines, stripped and not blank, that repeat earlier ones."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    num_characters = sum(map(len, lines))
    return 1 - sum(map(len, set(lines))) / num_characters if num_characters else 0.0


def symbol_share(text: str) -> float:
    """Return the share of visible characters that are neither letters nor digits."""
    num_visible = sum(match.end() - match.start() for match in _VISIBLE.finditer(text))
    return len(_LETTERS_DIGITS_AND_SPACE.sub("", text)) / num_visible if num_visible else 0.0


def content_hash(text: str) -> tuple[int, int]:
    """Return a 128-bit hash as two 64-bit integers."""
    value = xxhash.xxh3_128_intdigest(text.encode())
    return value >> 64, value & (1 << 64) - 1


def minhash(text: str) -> Any:
    """Return the MinHash signature (Broder 1997) of the text's five-word shingles."""
    import rensa

    words = _WORD.findall(text.lower())
    last = max(len(words) - _SHINGLE_WORDS, 0)
    signature = rensa.RMinHash(num_perm=_NUM_PERMUTATIONS, seed=1)
    signature.update([" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(last + 1)])
    return signature


def exact_duplicates(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which rows of ``hashes``, uint64 ``(N, 2)``, equal an earlier one, bool ``(N,)``."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: of equal ones the earliest comes first
    ordered = hashes[order]
    is_duplicate = np.zeros(len(hashes), dtype=np.bool_)
    is_duplicate[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    return is_duplicate


def near_duplicates(signatures: Iterator[Any], similarity: float) -> Iterator[bool]:
    """Yield for each signature whether an earlier one that was kept is at least so similar.

    LSH finds the candidates, with as many bands as catch 95 % of the pairs of just this similarity; signatures decide.
    """
    import rensa

    # The chance to find a pair with ``bands`` bands of ``rows`` rows is 1 - (1 - similarity ** rows) ** bands.
    rows = {bands: _NUM_PERMUTATIONS // bands for bands in (8, 16, 32, 64)}
    enough = (bands for bands in rows if 1 - (1 - similarity ** rows[bands]) ** bands >= _RECALL)
    num_bands = next(enough, _NUM_PERMUTATIONS)
    index = rensa.RMinHashLSH(threshold=similarity, num_perm=_NUM_PERMUTATIONS, num_bands=num_bands)
    kept: dict[int, Any] = {}
    for number, signature in enumerate(signatures):
        is_duplicate = any(signature.jaccard(kept[other]) >= similarity for other in index.query(signature))
        if not is_duplicate:
            kept[number] = signature
            index.insert(number, signature)
        yield is_duplicate


class Piece(NamedTuple):
    """A piece of a document that the BPE is trained on."""

    part: int  # part of the source
    document: int  # number among the candidates of the part
    number: int  # number among the pieces of the document


@dataclass(slots=True)
class Tally:
    """Documents that were left out or repaired."""

    empty: Dropped = field(default_factory=Dropped)  # without text
    dropped: dict[str, Dropped] = field(default_factory=dict)  # by filters and as duplicates, by reason
    bad: Dropped = field(default_factory=Dropped)  # by ``data.on_bad_row=skip``
    empty_answers: Dropped = field(default_factory=Dropped)  # conversations with one that counts; they are kept
    num_repaired: int = 0  # with text that was not valid UTF-8
    forms: Counter[str] = field(default_factory=Counter)  # conversations by the form in which they were found

    def add(self, other: "Tally") -> None:
        self.empty.merge(other.empty)
        self.bad.merge(other.bad)
        self.empty_answers.merge(other.empty_answers)
        self.num_repaired += other.num_repaired
        self.forms.update(other.forms)
        for reason, dropped in other.dropped.items():
            self.dropped.setdefault(reason, Dropped()).merge(dropped)


@dataclass(slots=True)
class PartSurvey(Tally):
    """What one part holds; sequences have an entry for each candidate: not empty, past the filters."""

    sizes: NDArray[np.int64] | None = None  # in bytes of UTF-8
    hashes: NDArray[np.uint64] | None = None  # :func:`content_hash`, ``(N, 2)``
    places: NDArray[np.uint64] | None = None  # :func:`split_place`
    labels: Counter[str] = field(default_factory=Counter)  # documents, or words, by label
    has_lists: bool = False  # whether a document may have several labels
    num_values: set[int] = field(default_factory=set)  # how many numbers documents have
    ids: list[str] = field(default_factory=list)  # if duplicates are looked for
    signatures: list[Any] = field(default_factory=list)  # MinHash, if near duplicates are looked for
    pieces: list[list[tuple[int, int]]] = field(default_factory=list)  # (hash, characters) of each, for a BPE

    def add_labels(self, labels: Labels | None) -> None:
        if labels is not None:
            self.labels.update(labels.names)
            self.has_lists |= labels.is_list
            self.num_values.add(len(labels.numbers))


@dataclass(slots=True)
class Survey(Tally):
    """What the first pass found."""

    num_documents: int = 0  # documents that are kept
    num_text_bytes: int = 0  # their size as UTF-8
    unique_share: float = 1.0  # in bytes, of documents past the filters that do not equal an earlier one
    validation_bound: int = 0  # documents with a lower :func:`split_place` are for validation
    labels: LabelRecord | None = None
    bpe_sample: list[Piece] = field(default_factory=list)  # up to 10 M characters of training text, for a BPE
    kept: list[NDArray[np.bool_]] = field(default_factory=list)  # of each part: which of its candidates are kept


def split_place(document: Document) -> int:
    """Return where a document lies among all, by which its split is decided: equal texts are never on both sides."""
    return content_hash(document.group or document.text)[0]


def candidates(config: DataConfig, part: Part, tally: Tally) -> Iterator[Document]:
    """Yield the documents of a part that have text and pass the filters; ``tally`` counts the others."""
    for document in read_part(config, part, tally.bad):
        tally.num_repaired += document.is_repaired
        tally.forms.update([document.form] if document.form else [])
        if document.has_empty_answer:
            tally.empty_answers.add(document.id, 0)
        if not document.text:
            tally.empty.add(document.id, 0)
        elif reason := rejection(document.text, config.filters):
            tally.dropped.setdefault(reason, Dropped()).add(document.id, len(document.text.encode()))
        else:
            yield document


def kept_documents(config: DataConfig, part: Part, kept: NDArray[np.bool_]) -> Iterator[Document]:
    """Yield the documents of a part that are kept, by :attr:`Survey.kept`; DataError if it has changed since."""
    number = -1
    for number, document in enumerate(candidates(config, part, Tally())):
        if number < len(kept) and kept[number]:
            yield document
    if number + 1 != len(kept):
        raise DataError(f"data={config.source.name}: the source changed while it was being prepared; try again")


def survey_part(config: DataConfig, part: Part) -> PartSurvey:
    found = PartSurvey()
    sizes, hashes, places = [], [], []
    duplicates = config.filters.duplicates
    for document in candidates(config, part, found):
        if config.tokenizer == "bpe":
            texts = enumerate(cut(document.text))
            found.pieces.append([(content_hash(f"{document.id} {number}")[0], len(text)) for number, text in texts])
        sizes.append(len(document.text.encode()))
        hashes.append(content_hash(document.text))
        places.append(split_place(document) if document.group else hashes[-1][0])
        found.add_labels(document.labels)
        if duplicates is not Duplicates.keep:
            found.ids.append(document.id)
        if duplicates is Duplicates.near:
            found.signatures.append(minhash(document.text))
    found.sizes = np.array(sizes, dtype=np.int64)
    found.places = np.array(places, dtype=np.uint64)
    found.hashes = np.array(hashes, dtype=np.uint64).reshape(-1, 2)
    return found


def combine(config: DataConfig, found: Iterable[PartSurvey], advance: Callable[[int], None]) -> Survey:
    """Merge the surveys of all parts, in order; DataError if fewer than two documents are kept."""
    survey, parts = Survey(), []
    for part in found:
        survey.add(part)
        parts.append(part)
        advance(int(part.sizes.sum()))
    sizes = np.concatenate([np.empty(0, np.int64), *(part.sizes for part in parts)])
    hashes = np.concatenate([np.empty((0, 2), np.uint64), *(part.hashes for part in parts)])
    is_exact = exact_duplicates(hashes)
    is_dropped = _duplicates(config, parts, is_exact, sizes, survey.dropped)
    survey.unique_share = float(sizes[~is_exact].sum() / max(sizes.sum(), 1))
    survey.num_documents = int((~is_dropped).sum())
    survey.num_text_bytes = int(sizes[~is_dropped].sum())
    survey.kept = np.split(~is_dropped, np.cumsum([len(part.sizes) for part in parts])[:-1])
    places = np.concatenate([np.empty(0, np.uint64), *(part.places for part in parts)])
    places = np.unique(places[~is_dropped])
    if len(places) < (2 if config.validation_fraction else 1):
        raise DataError(_too_few(config, survey, len(places)))
    if config.validation_fraction:
        # A small corpus could leave a split empty: the lowest hash goes to validation, the highest to training.
        bound = max(int(config.validation_fraction * 2**64), int(places[0]) + 1)
        survey.validation_bound = min(bound, int(places[-1]))
    survey.bpe_sample = _choose_sample(parts, survey)
    survey.labels = _combine_labels(config, parts)
    return survey


def _combine_labels(config: DataConfig, parts: list[PartSurvey]) -> LabelRecord | None:
    if not config.content.has_labels:
        return None
    try:
        return label_record(
            config.content,
            sum((part.labels for part in parts), Counter()),
            has_lists=any(part.has_lists for part in parts),
            num_values=set.union(*(part.num_values for part in parts)),
        )
    except ValueError as error:
        raise DataError(f"data={config.source.name} data.path={config.path}: {error}") from error


def sample_texts(config: DataConfig, part: Part, kept: NDArray[np.bool_], wanted: list[Piece]) -> list[str]:
    """Return the ``wanted`` pieces, which are all of this part."""
    numbers = iter(np.flatnonzero(kept).tolist())
    texts: dict[tuple[int, int], str] = {}
    for number, document in zip(numbers, kept_documents(config, part, kept), strict=True):
        chosen = {piece.number for piece in wanted if piece.document == number}
        if chosen:
            texts |= {(number, i): text for i, text in enumerate(cut(document.text)) if i in chosen}
    return [texts[piece.document, piece.number] for piece in wanted]


def _choose_sample(parts: list[PartSurvey], survey: Survey) -> list[Piece]:
    """Return the pieces of training documents with the lowest hashes, as many as fit."""
    heap: list[tuple[int, Piece, int]] = []  # the highest hash on top: (-hash, piece, characters)
    num_characters = 0
    for part_number, part in enumerate(parts):
        for document, pieces in enumerate(part.pieces):
            if not survey.kept[part_number][document]:
                continue
            for number, (piece_hash, length) in enumerate(pieces):
                heapq.heappush(heap, (-piece_hash, Piece(part_number, document, number), length))
                num_characters += length
            while num_characters > _BPE_SAMPLE_CHARACTERS and len(heap) > 1:
                num_characters -= heapq.heappop(heap)[2]
    return [
        piece
        for _, piece, _ in sorted(heap, reverse=True)
        if int(parts[piece.part].places[piece.document]) >= survey.validation_bound
    ]


def _too_few(config: DataConfig, survey: Survey, num_different: int) -> str:
    reasons = ", ".join(f"{reason} {dropped.documents}" for reason, dropped in survey.dropped.items())
    left_out = f" (left out by data.filters: {reasons})" if reasons else ""
    left_out += f" ({tell_bad_rows(survey.bad)})" if survey.bad.documents else ""
    equal = ", equal ones counted once" if num_different < survey.num_documents else ""
    where = f"data={config.source.name} data.path={config.path}"
    if config.content.has_answers and not num_different and not left_out:
        return f"{where}: no target that counts: nothing is answered (by the assistant, without weight 0)"
    what, advice = "an answer that counts", "use more of them"
    if not config.content.has_answers:
        what, advice = "text", "cut the text into several files or jsonl lines"
    return (
        f"{where}: {counted(num_different, 'document')} with {what}{left_out}{equal}, but "
        f"training and validation need at least one each; {advice}"
    )


def _duplicates(
    config: DataConfig,
    parts: list[PartSurvey],
    is_exact: NDArray[np.bool_],
    sizes: NDArray[np.int64],
    dropped: dict[str, Dropped],
) -> NDArray[np.bool_]:
    """Return which candidates are duplicates, and count them in ``dropped``."""
    policy = config.filters.duplicates
    if policy is Duplicates.keep:
        return np.zeros(len(sizes), dtype=np.bool_)
    ids = [document_id for part in parts for document_id in part.ids]
    is_dropped = is_exact.copy()
    if policy is Duplicates.near:
        signatures = [signature for part in parts for signature in part.signatures]
        unique = np.flatnonzero(~is_exact)
        flags = near_duplicates((signatures[i] for i in unique), config.filters.near_similarity)
        is_dropped[unique] = np.fromiter(flags, dtype=np.bool_, count=len(unique))
    for i in np.flatnonzero(is_dropped):
        reason = "exact_duplicate" if is_exact[i] else "near_duplicate"
        dropped.setdefault(reason, Dropped()).add(ids[i], int(sizes[i]))
    return is_dropped


def cut(text: str) -> Iterator[str]:
    """Cut a long text into pieces of 64 k to 128 k characters that are tokenised separately, which bounds the memory.

    A cut falls after a line end between two visible characters where there is one: byte-level tokenizers start a new
    word there anyway, so the ids are those of the whole.
    """
    start = 0
    while len(text) - start > 2 * _PIECE_CHARACTERS:
        line_end = _QUIET_LINE_END.search(text, start + _PIECE_CHARACTERS, start + 2 * _PIECE_CHARACTERS)
        end = line_end.end() if line_end else start + 2 * _PIECE_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]
