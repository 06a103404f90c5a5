"""The documents of a source, one part after the other."""

from collections.abc import Iterator

from bigtrain.config import DataConfig
from bigtrain.data.prepare.records import Document
from bigtrain.data.prepare.sources import read_part, source_parts


def iterate_documents(config: DataConfig) -> Iterator[Document]:
    """Yield every document of the source, in an order fixed by names and positions."""
    for part in source_parts(config):
        yield from read_part(config, part)
