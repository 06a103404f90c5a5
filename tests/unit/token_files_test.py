"""Ids that other programs have written are read as they are, where they lie, and damage is told in a sentence."""

import struct
from pathlib import Path

import numpy as np
import pytest

from bigtrain.config import DataConfig, DataSource, TrainConfig
from bigtrain.config.check import check, resolve
from bigtrain.data.prepare.corpus import prepare
from bigtrain.data.read.corpus import Corpus
from bigtrain.errors import DataError, ShardError

TEXTS = ["one", "another text", "", "the third, which is the longest of all", "five"]
EOS = 256
DOCUMENTS = [[*text.encode(), EOS] for text in TEXTS if text]
IDS = np.array([i for document in DOCUMENTS for i in document])
ENDS = np.cumsum([len(document) for document in DOCUMENTS])


def write_megatron(path: Path, dtype: str, code: int) -> None:
    """As ``IndexedDatasetBuilder`` writes it; the first document has two sequences."""
    lengths = [2, len(DOCUMENTS[0]) - 2, *map(len, DOCUMENTS[1:])]
    pointers = np.cumsum([0, *lengths])[:-1] * np.dtype(dtype).itemsize
    documents = [0, *range(2, len(lengths) + 1)]
    with open(path.with_suffix(".idx"), "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents)))
        file.write(np.array(lengths, "<i4").tobytes() + np.array(pointers, "<i8").tobytes())
        file.write(np.array(documents, "<i8").tobytes())
    IDS.astype(dtype).tofile(path)


def write_llm_c(path: Path) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(IDS)
    path.write_bytes(header.tobytes() + IDS.astype("<u2").tobytes())


def write_rows(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"input_ids": DOCUMENTS, "id": [*range(len(DOCUMENTS))]}), path)


def write_datatrove(path: Path) -> None:
    IDS.astype("<u2").tofile(path)
    ENDS.astype("<u8").tofile(f"{path}.index")


FORMATS = {
    "nanogpt.bin": lambda path: IDS.astype("<u2").tofile(path),
    "megatron.bin": lambda path: write_megatron(path, "<u2", 8),
    "megatron_wide.bin": lambda path: write_megatron(path, "<i4", 4),
    "llm_c.bin": write_llm_c,
    "trove.ds": write_datatrove,
    "row.npy": lambda path: np.save(path, IDS),
    "rows.parquet": write_rows,
}
LINKED = ("nanogpt.bin", "megatron.bin", "megatron_wide.bin", "trove.ds")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a corpus of bytes, whose tokenizer the ids are of."""
    root = tmp_path_factory.mktemp("bytes")
    (root / "text.txt").write_text("text")
    data = DataConfig(
        source=DataSource.text,
        path=str(root / "text.txt"),
        root=str(root / "data"),
        tokenizer="bytes",
        validation_fraction=0.0,
    )
    return str(prepare(data, progress=False))


def opened(path: Path | str, tokenizer: str, root: Path) -> tuple[Path, Corpus]:
    data = DataConfig(source=DataSource.tokens, path=str(path), root=str(root), tokenizer=tokenizer)
    directory = prepare(data, progress=False)
    return directory, Corpus.open(directory, vocab_size=384)


@pytest.mark.parametrize("name", FORMATS)
def test_ids_and_documents_are_those_of_the_file(name: str, tokenizer: str, tmp_path: Path):
    FORMATS[name](tmp_path / name)
    directory, corpus = opened(tmp_path / name, tokenizer, tmp_path / "data")
    split = corpus.split("train")
    assert split.read(0).tolist() == IDS.tolist()
    assert split.documents(0).tolist() == [0, *ENDS.tolist()]
    assert (directory / "train-00000.bin").is_symlink() == (name in LINKED)
    assert corpus.index.train.unigram_nats_per_token > 2


def test_a_directory_has_files_for_validation_and_what_lies_beside_is_no_data(tokenizer: str, tmp_path: Path, caplog):
    for name in ("a_train_0.bin", "a_val_0.bin"):
        (tmp_path / "ids").mkdir(exist_ok=True)
        write_megatron(tmp_path / "ids" / name, "<u2", 8)
    (tmp_path / "ids" / "notes.md").write_text("not ids")
    _, corpus = opened(tmp_path / "ids", tokenizer, tmp_path / "data")
    assert corpus.index.train.num_tokens == corpus.index.validation.num_tokens == len(IDS)
    assert "notes.md" in caplog.text and ".idx" not in caplog.text


def test_a_file_that_changes_afterwards_is_noticed(tokenizer: str, tmp_path: Path):
    FORMATS["nanogpt.bin"](tmp_path / "x.bin")
    directory, _ = opened(tmp_path / "x.bin", tokenizer, tmp_path / "data")
    (tmp_path / "x.bin").unlink()
    with pytest.raises(ShardError, match="missing"):
        Corpus.open(directory, vocab_size=384)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"x.bin": np.array([5, 300, 7], "<u2").tobytes()}, "holds the id 300, but the tokenizer .* has 257 ids"),
        ({"x.jsonl": b"abcd"}, "no file of ids by its name"),
        ({"x.bin": b"abc"}, "3 bytes are no whole number of ids of 2 bytes"),
        ({"x.ds": b"abcd", "x.ds.index": np.array([3], "<u8").tobytes()}, "are not the ids that x.ds.index counts"),
        ({"x.bin": b"abcd", "x.idx": b"something else"}, "is no index of Megatron-LM"),
        ({"x.npy": b"abcd"}, "x.npy: cannot be read"),
    ],
)
def test_damage_is_told_in_a_sentence(content: dict[str, bytes], sentence: str, tokenizer: str, tmp_path: Path):
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=sentence):
        opened(tmp_path / next(iter(content)), tokenizer, tmp_path / "data")


def test_the_tokenizer_has_to_be_named():
    data = DataConfig(source=DataSource.tokens, path="x.bin")
    problems = check(resolve(TrainConfig(data=data)), world_size=1, local_world_size=1)
    assert any("data.tokenizer=bpe: ids mean something" in problem for problem in problems)
