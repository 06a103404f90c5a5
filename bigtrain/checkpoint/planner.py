"""Entries of the state as torch.distributed.checkpoint (DCP) reads and writes them: as chunks of whole tensors.

The result is an ordinary DCP checkpoint: any tool that reads DCP opens it, whichever engine wrote it.
"""

import io
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from bigtrain.engine.state import Box, Entry
from bigtrain.errors import CheckpointError


class EntrySavePlanner(SavePlanner):
    """Writes each rank's share of the entries."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = entries
        self._views: dict[tuple[str, torch.Size], torch.Tensor] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Nothing to do: the entries are the state."""

    def create_local_plan(self) -> SavePlan:
        """Return one write item per box that this rank writes."""
        return SavePlan([item for key, entry in self._entries.items() for item in self._write_items(key, entry)])

    def _write_items(self, key: str, entry: Entry) -> Iterator[WriteItem]:
        properties = TensorProperties(dtype=entry.dtype)
        for box in entry.own_boxes():
            chunk = _chunk(box)
            self._views[key, chunk.offsets] = box.view
            yield WriteItem(
                MetadataIndex(key, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, torch.Size(entry.shape)),
            )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Merge the ranks' plans; their boxes are disjoint by construction."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Return the memory of a box."""
        return self._views[write_item.index.fqn, write_item.index.offset]


class EntryLoadPlanner(LoadPlanner):
    """Reads whatever chunks overlap with the boxes of this rank, straight into the engine's memory."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = entries
        self._views: dict[tuple[str, torch.Size], torch.Tensor] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Compare the checkpoint's tensors with the entries.

        Raises:
            CheckpointError: listing every tensor that is missing or has another shape.
        """
        assert metadata is not None
        self._metadata = metadata
        problems = list(_differences(self._entries, metadata))
        if problems:
            raise CheckpointError("the checkpoint belongs to another model:\n  " + "\n  ".join(problems))

    def create_local_plan(self) -> LoadPlan:
        """Return one read item per overlap of a stored chunk with a box."""
        items: list[ReadItem] = []
        for key, entry in self._entries.items():
            self._views |= {(key, _chunk(box).offsets): box.view for box in entry.boxes}
            chunks = [_chunk(box) for box in entry.boxes]
            items += create_read_items_for_chunk_list(key, self._metadata.state_dict_metadata[key], chunks)
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse: our checkpoints hold tensors only, and anything else would have to be unpickled."""
        raise CheckpointError(f"{read_item.storage_index.fqn} is not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Return the part of a box that a read item fills."""
        view = self._views[read_item.dest_index.fqn, read_item.dest_index.offset]
        for dim, (offset, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, offset, size)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: the data was read into place."""


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), box.view.shape)


def _differences(entries: Mapping[str, Entry], metadata: Metadata) -> Iterator[str]:
    for key, entry in entries.items():
        stored = metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            yield f"{key}: not in the checkpoint, expected shape {entry.shape}"
        elif tuple(stored.size) != entry.shape:
            yield f"{key}: shape {tuple(stored.size)} in the checkpoint, expected {entry.shape}"
    for key in metadata.state_dict_metadata.keys() - entries.keys():
        if key.split(".")[0] in {k.split(".")[0] for k in entries}:
            yield f"{key}: in the checkpoint, but not expected"
