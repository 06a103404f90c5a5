"""Verifying a checkpoint and reading it into the boxes of any engine."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from bigtrain.checkpoint.manifest import TensorRecord, read_manifest
from bigtrain.checkpoint.shard import ShardReader
from bigtrain.checkpoint.store import find_problems
from bigtrain.config import Verify
from bigtrain.distributed.collectives import broadcast_json, gather_json
from bigtrain.engine.state import MODEL, OPTIMIZER, Box, Entry
from bigtrain.errors import CheckpointError, UnreadableError, of_all_ranks, some

MOST_DIFFERENCES = 5  # differences named in a message


def verify_checkpoint(path: Path, verify: Verify) -> list[str]:
    """Return how a checkpoint differs from its manifest, alike on all ranks, which share the work (UnreadableError)."""
    if not dist.is_initialized():
        return find_problems(path, verify)
    found: tuple[list[str], str | None] = [], None
    try:
        found = find_problems(path, verify, share=slice(dist.get_rank(), None, dist.get_world_size())), None
    except UnreadableError as error:
        found = [], str(error)
    all_found = broadcast_json(gather_json(found))
    if unreadable := next((reason for _, reason in all_found if reason), None):
        raise of_all_ranks(UnreadableError(unreadable))
    return list(dict.fromkeys(problem for problems, _ in all_found for problem in problems))


def load_checkpoint(path: Path, entries: Mapping[str, Entry], *, some_only: bool = False) -> None:
    """Fill the boxes of ``entries`` from a checkpoint, which may hold more with ``some_only``.

    No collectives, no buffers. Overlaps of stored boxes with boxes of this rank are copied from the mapped file into
    the engine's memory. CheckpointError: tensors are missing or have other shapes, or the manifest is damaged.
    """
    stored = {tensor.key: tensor for tensor in read_manifest(path).tensors}
    if problems := list(_differences(entries, stored, some_only)):
        found = some(problems, MOST_DIFFERENCES, "\n  ")
        raise CheckpointError(f"{path} belongs to another model or optimizer:\n  {found}")
    reader = ShardReader(path)
    with torch.no_grad():
        for key, entry in entries.items():
            for box in entry.boxes:
                _fill(box, stored[key], reader, path)


def _fill(box: Box, tensor: TensorRecord, reader: ShardReader, path: Path) -> None:
    missing = box.view.numel()
    for chunk in tensor.chunks:
        pairs = list(zip(box.offsets, box.view.shape, chunk.offsets, chunk.sizes, strict=True))
        common = [(max(o, other), min(o + n, other + m)) for o, n, other, m in pairs]  # begin and end in each dimension
        if any(begin >= end for begin, end in common):
            continue
        inside, source = (
            tuple(slice(begin - o, end - o) for (begin, end), o in zip(common, offsets, strict=True))
            for offsets in (box.offsets, chunk.offsets)
        )
        target = box.view[inside]
        target.copy_(reader.read(tensor.dtype, chunk)[source])
        missing -= target.numel()
    if missing:
        raise CheckpointError(f"{path}: {missing} elements of {tensor.key} are not in any file")


def _differences(entries: Mapping[str, Entry], stored: Mapping[str, TensorRecord], some_only: bool) -> Iterator[str]:
    """Yield how the stored tensors differ from the wanted ones; an unwanted half (optimizer) is no difference."""
    for key, entry in entries.items():
        if key not in stored:
            yield f"{key}: not in the checkpoint, expected shape {entry.shape}"
        elif tuple(stored[key].shape) != entry.shape:
            yield f"{key}: shape {tuple(stored[key].shape)} in the checkpoint, expected {entry.shape}"
    halves = {key.split(".")[0] for key in entries}
    trained = {key.rpartition(".")[0] for key in entries}
    for key in () if some_only else stored.keys() - entries.keys():
        parameter = key.rpartition(".")[0]
        is_frozen = parameter not in trained and parameter.replace(OPTIMIZER, MODEL, 1) in entries  # since then
        if key.split(".")[0] in halves and not is_frozen:
            yield f"{key}: in the checkpoint, but not expected"
