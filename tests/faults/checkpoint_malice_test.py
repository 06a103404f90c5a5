"""A checkpoint from somebody else: wrong numbers at worst, never code, other people's files, or a crash."""

import ast
import copy
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtrain.checkpoint.loader import load_checkpoint, verify_checkpoint
from bigtrain.checkpoint.manifest import MANIFEST_FILE, RUN_STATE_FILE, read_manifest
from bigtrain.checkpoint.store import checkpoint_path, read_run_state
from bigtrain.config import Verify
from bigtrain.errors import CheckpointError
from bigtrain.testing.ranks import run_ranks
from tests.faults import saves
from tests.unit.layering_test import FORBIDDEN_IMPORTS, REPOSITORY

SHARD = "rank-00000.safetensors"
FILES = (SHARD, RUN_STATE_FILE, MANIFEST_FILE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    run_ranks(saves.save_all, 2, directory, (1,))
    return checkpoint_path(directory, 1)


@pytest.fixture
def path(saved: Path, tmp_path: Path) -> Path:
    return saves.copy_run(saved, tmp_path / saved.name)


def use(path: Path, verify: Verify) -> str | None:
    """Do everything that is done with a checkpoint; return what was refused."""
    try:
        if problems := verify_checkpoint(path, verify):
            return problems[0]
        read_run_state(path)
        load_checkpoint(path, saves.make_state(None, whole=True))
    except CheckpointError as error:
        return str(error)
    return None


# Code


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("verify", Verify)
@pytest.mark.parametrize("forged", [False, True], ids=["replaced", "with the right hash"])
@pytest.mark.parametrize("name", FILES)
def test_a_pickle_does_not_run(name: str, forged: bool, verify: Verify, path: Path, tmp_path: Path):
    marker = tmp_path / "marker"
    bomb = pickle.dumps(Bomb(marker))
    if not forged:
        (path / name).write_bytes(bomb)
    elif name == MANIFEST_FILE:
        saves.write_manifest(path, bomb)
    else:
        saves.forge_file(path, name, bomb)
    assert name in use(path, verify)
    assert not marker.exists()


def test_a_pickle_in_place_of_the_numbers_is_numbers(path: Path, tmp_path: Path):
    marker = tmp_path / "marker"
    bomb = pickle.dumps(Bomb(marker))
    size = (path / SHARD).stat().st_size
    saves.forge_file(path, SHARD, bomb + bytes(size - len(bomb)))
    assert use(path, Verify.full) is None
    assert not marker.exists()
    pickle.loads(bomb)  # the negative control: it is a bomb
    assert marker.exists()


def picklers(source: str) -> list[str]:
    """Return what in ``source`` unpickles: modules, torch.load, collectives and readers that do it inside."""
    names = {"load", "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"}
    names |= {"send_object_list", "recv_object_list", "FileSystemReader", "weights_only"}
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=aliases):
                found += [alias.name for alias in aliases if alias.name.split(".")[0] in FORBIDDEN_IMPORTS]
            case ast.ImportFrom(module=module, names=aliases):
                found += [module] if (module or "").split(".")[0] in FORBIDDEN_IMPORTS else []
                found += [alias.name for alias in aliases if alias.name in names]
            case ast.Attribute(value=value, attr=attr) if attr in names:
                found += [f"{ast.unparse(value)}.{attr}"]
    return found


def test_nothing_here_can_unpickle():
    sources = {p.name: p.read_text() for p in (REPOSITORY / "bigtrain/checkpoint").glob("*.py")}
    assert len(sources) > 5
    assert {name: found for name, source in sources.items() if (found := picklers(source))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(f, weights_only=True)",
        "from torch import load",
        "dist.all_gather_object(x, y)",
        "from torch.distributed.checkpoint import FileSystemReader",
    ],
)
def test_what_can_unpickle_would_be_found(source: str):
    assert picklers(source)


# Manifests that lie, with the right hash


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/b", "./x", "..", ".", "", "a\\b", "x\0y", MANIFEST_FILE, f"../step-00000001/{SHARD}"],
)
def test_a_name_that_is_no_plain_file_name_is_refused(name: str, path: Path):
    def change(values: dict[str, Any]) -> None:
        values["files"][0]["name"] = name
        for tensor in values["tensors"]:
            for chunk in tensor["chunks"]:
                if chunk["file"] == SHARD:
                    chunk["file"] = name

    saves.forge_manifest(path, change)
    for verify in Verify:
        assert f"{name!r} is not the plain name of a file" in use(path, verify)


def chunk_of(values: dict[str, Any], key: str, number: int) -> dict[str, Any]:
    return next(tensor for tensor in values["tensors"] if tensor["key"] == key)["chunks"][number]


def tensor_of(values: dict[str, Any], key: str) -> dict[str, Any]:
    return next(tensor for tensor in values["tensors"] if tensor["key"] == key)


W, B, STEP = "model.weight", "model.bias", "optim.state.weight.step"
LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    f"{W}: lies in bytes 10000000 to": lambda v: chunk_of(v, W, 0).update(start_byte=10_000_000),
    f"{W}: lies in '../x', which is not listed": lambda v: chunk_of(v, W, 0).update(file="../x"),
    f"{W}: Chunk(offsets=[0, 0], sizes=[32, 48], ": lambda v: chunk_of(v, W, 0).update(start_byte=-4),
    f"{W}: Chunk(offsets=[-1, 0], ": lambda v: chunk_of(v, W, 0).update(offsets=[-1, 0]),
    f"{W}: Chunk(offsets=[0, 0], sizes=[-32, 48], ": lambda v: chunk_of(v, W, 0).update(sizes=[-32, 48]),
    f"{W}: Chunk(offsets=[0, 0], sizes=[-32, -48], ": lambda v: chunk_of(v, W, 0).update(sizes=[-32, -48]),
    f"{W}: Chunk(offsets=[40, 0], ": lambda v: chunk_of(v, W, 1).update(offsets=[40, 0]),
    f"{W}: its boxes do not cover its 3072 elements once (they have 1536)": lambda v: tensor_of(v, W)["chunks"].pop(),
    f"{W}: its boxes do not cover its 3072 elements once (they have 3072)": (
        lambda v: chunk_of(v, W, 1).update(offsets=[31, 0])
    ),
    f"{B}: its boxes do not cover its 48 elements once (they have 72)": (
        lambda v: tensor_of(v, B)["chunks"].append(copy.deepcopy(chunk_of(v, B, 0)))
    ),
    f"{STEP}: its boxes do not cover its 1 elements once (they have 2)": (
        lambda v: tensor_of(v, STEP)["chunks"].append(copy.deepcopy(chunk_of(v, STEP, 0)))
    ),
    f"{B} and {W} overlap in {SHARD}": lambda v: chunk_of(v, W, 0).update(start_byte=chunk_of(v, B, 0)["start_byte"]),
    f"{B}: no tensor of type 'F31'": lambda v: tensor_of(v, B).update(dtype="F31"),
    f"{B}: no tensor of type 'F32' and shape [-48]": lambda v: tensor_of(v, B).update(shape=[-48]),
    "lists a tensor twice": lambda v: v["tensors"].append(copy.deepcopy(tensor_of(v, B))),
    "expected every file once": lambda v: v["files"].append(copy.deepcopy(v["files"][0])),
    f"expected every file once and {RUN_STATE_FILE}": lambda v: v["files"].pop(),
    "format 2, this version reads format 1": lambda v: v.update(format=2),
    "damaged: num_bytes: expected int, got -1.5": lambda v: v["files"][0].update(num_bytes=-1.5),
    f"{SHARD}: 12632 bytes, expected 1": lambda v: v["files"][0].update(num_bytes=10**30),
}


@pytest.mark.parametrize("message", LIES)
def test_a_manifest_that_cannot_be_true_is_refused(message: str, path: Path):
    saves.forge_manifest(path, LIES[message])
    assert message in use(path, Verify.full)


def test_a_box_that_is_only_as_large_as_claimed_is_not_read_beyond_the_file(path: Path):
    def change(values: dict[str, Any]) -> None:
        values["files"][0]["num_bytes"] = 10**31
        chunk_of(values, W, 0)["start_byte"] = 10**30

    saves.forge_manifest(path, change)
    assert f"{SHARD}: damaged: " in use(path, Verify.off)


STRANGE = [None, True, -1, 1.5, 10**30, "x", "", [], [[]], {}, {"x": 1}]


def changed(values: Any, place: tuple[Any, ...], new: Any) -> bytes:
    values = copy.deepcopy(values)
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    return json.dumps(values).encode()


@pytest.mark.parametrize("name", [MANIFEST_FILE, RUN_STATE_FILE])
def test_whatever_stands_anywhere_in_a_document_is_accepted_or_refused(name: str, saved: Path, path: Path):
    document = (saved / name).read_bytes()
    values = json.loads(document.partition(b"\n")[2] if name == MANIFEST_FILE else document)
    refused, accepted = 0, set()
    for place in saves.leaves(values):
        for new in STRANGE:
            forged = changed(values, place, new)
            if forged == json.dumps(values).encode():
                continue
            if name == MANIFEST_FILE:
                saves.write_manifest(path, forged)
            else:
                shutil.copy(saved / MANIFEST_FILE, path)
                saves.forge_file(path, name, forged)
            if use(path, Verify.full) is None:
                accepted.add(place)
            else:
                refused += 1
    assert refused > 50
    # What a reader takes as it comes; format 1 and true are equal.
    free = {
        "format",
        "rollbacks",
        "tokens",
        "samples",
        "data_fingerprint",
        "config",
        "versions",
        "world_size",
        "validation_loss",
        "origin",
    }
    assert {place[0] for place in accepted} <= free


@pytest.mark.parametrize("text", [b"[" * 100_000, b"null", b"[]", b"{}", b"1", b'"x"', b"\xff\xfe", b"", b"{" * 9])
def test_documents_of_another_shape_are_refused(text: bytes, path: Path):
    saves.write_manifest(path, text)
    assert MANIFEST_FILE in use(path, Verify.full)
    with pytest.raises(CheckpointError):
        read_manifest(path)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"null", b"[]", b"{}", b"1", b"\xff\xfe", b""])
def test_run_states_of_another_shape_are_refused(text: bytes, path: Path):
    saves.forge_file(path, RUN_STATE_FILE, text)
    assert RUN_STATE_FILE in use(path, Verify.full)


def test_without_a_lie_nothing_is_refused(path: Path):
    saves.forge_manifest(path, lambda values: None)
    saves.forge_run_state(path, lambda values: None)
    assert [use(path, verify) for verify in Verify] == [None, None, None]
