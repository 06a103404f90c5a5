"""Verifying a checkpoint and reading it into the boxes of any engine."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from bigtrain.checkpoint.manifest import Manifest, TensorRecord, read_manifest
from bigtrain.checkpoint.shard import ShardReader
from bigtrain.checkpoint.store import find_problems
from bigtrain.config import Verify
from bigtrain.distributed.collectives import broadcast_json, gather_json
from bigtrain.engine.state import MODEL, OPTIMIZER, Box, Entry
from bigtrain.errors import CheckpointError, UnreadableError, of_all_ranks, some

MOST_DIFFERENCES = 5  # differences named in a message


def verify_checkpoint(path: Path, verify: Verify) -> list[str]:
    """Verify the files of a checkpoint against its manifest, each rank a share; manifest and run state always.

    Returns:
        The problems, the same list on every rank; empty if the checkpoint is whole.

    Raises:
        UnreadableError: some rank cannot read it; on every rank.
    """
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
    """Fill the boxes of ``entries`` from a checkpoint, without collectives or buffers.

    Overlaps of stored boxes with boxes of this rank are copied from the mapped file into the engine's memory.

    Args:
        some_only: whether the checkpoint may hold more than ``entries``.

    Raises:
        CheckpointError: tensors are missing or have other shapes, or the manifest is damaged.
    """
    manifest = read_manifest(path)
    tensors = {tensor.key: tensor for tensor in manifest.tensors}
    if problems := list(_differences(entries, manifest, some_only)):
        found = some(problems, MOST_DIFFERENCES, "\n  ")
        raise CheckpointError(f"{path} belongs to another model or optimizer:\n  {found}")
    reader = ShardReader(path)
    with torch.no_grad():
        for key, entry in entries.items():
            for box in entry.boxes:
                _fill(box, tensors[key], reader, path)


def _fill(box: Box, tensor: TensorRecord, reader: ShardReader, path: Path) -> None:
    missing = box.view.numel()
    for chunk in tensor.chunks:
        overlap = _overlap(box.offsets, box.view.shape, chunk.offsets, chunk.sizes)
        if overlap is None:
            continue
        target = _narrow(box.view, overlap, box.offsets)
        target.copy_(_narrow(reader.read(tensor.dtype, chunk), overlap, chunk.offsets))
        missing -= target.numel()
    if missing:
        raise CheckpointError(f"{path}: {missing} elements of {tensor.key} are not in any file")


Ranges = list[tuple[int, int]]


def _overlap(
    offsets: Sequence[int], sizes: Sequence[int], other_offsets: Sequence[int], other_sizes: Sequence[int]
) -> Ranges | None:
    """Return the common (begin, end) of two boxes in each dimension, or None if they are disjoint."""
    ranges = []
    for begin, size, other_begin, other_size in zip(offsets, sizes, other_offsets, other_sizes, strict=True):
        common = (max(begin, other_begin), min(begin + size, other_begin + other_size))
        if common[0] >= common[1]:
            return None
        ranges.append(common)
    return ranges


def _narrow(tensor: torch.Tensor, ranges: Ranges, offsets: Sequence[int]) -> torch.Tensor:
    for dim, ((begin, end), offset) in enumerate(zip(ranges, offsets, strict=True)):
        tensor = tensor.narrow(dim, begin - offset, end - begin)
    return tensor


def _differences(entries: Mapping[str, Entry], manifest: Manifest, some_only: bool) -> Iterator[str]:
    """Yield how the stored tensors differ from the wanted ones; an unwanted half (optimizer) is no difference."""
    stored = {tensor.key: tensor for tensor in manifest.tensors}
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
