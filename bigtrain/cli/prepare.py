"""Prepare a corpus ahead of the training: ``python launch/prepare.py data=text data.path='books/*.txt'``."""

import json
from functools import partial
from pathlib import Path

from bigtrain import log
from bigtrain.cli import hydra_cli
from bigtrain.cli.settings import group_options, setting_lines
from bigtrain.config import (
    WITHOUT_TEXT,
    DataConfig,
    DataSource,
    LongChats,
    ModelConfig,
    ModelKind,
    TrainConfig,
    component_data,
    is_live,
)
from bigtrain.config.check import ignored_settings
from bigtrain.errors import ConfigError, counted, some

HELP = """\
Tokenise a corpus once, so that no run has to wait for it. Training prepares what is missing by itself.

  python launch/prepare.py                                          the embedded corpus: Python's standard library
  python launch/prepare.py data=text data.path='books/*.txt'
  python launch/prepare.py data=datasets data.path=roneneldan/TinyStories data.tokenizer=gpt2
  python launch/prepare.py data=jsonl data.path=web.jsonl.zst data.filters.duplicates=near +model=gpt3_1b
  python launch/prepare.py data=jsonl data.path=chats.jsonl data.content=chat data.tokenizer=Qwen/Qwen3-0.6B

Use the same data settings as the training; all others are allowed and have no effect, but a +model is told how many
tokens there are per parameter. Killed and started again, it goes on where it was. The directory can be copied
to any store and be trained on from there: data=prepared data.path=s3://bucket/corpus

Sources, chosen with data=<option>: {sources}

Settings, with their defaults:
{settings}
"""

ENOUGH_TOKENS_PER_PARAMETER = 20
"""For the lowest loss at a given amount of compute (Hoffmann et al. 2022)."""


def run(config: TrainConfig) -> None:
    """Prepare what ``config.data`` names and say what it holds."""
    components = component_data(config.data)
    if not {data.source for data in components.values()} - set(WITHOUT_TEXT) | {DataSource.images}:
        raise ConfigError(f"data={config.data.source.name} is no text; there is nothing to prepare")
    if all(map(is_live, components.values())):
        raise ConfigError("data.on_the_fly=true tokenises while training; there is nothing to prepare: leave it out")
    from bigtrain.data.prepare.corpus import prepare_components

    log.setup(hydra_cli.rank())
    for warning in ignored_settings(config):
        if warning.startswith("data."):
            log.get_logger().warning(f"warning: {warning}")
    num_tokens, there_before = 0, set(Path(config.data.root).glob("*"))
    for name, directory in prepare_components(config.data, progress=True):
        if config.data.mixture:
            print(f"component   {name}")
        if components[name].source is DataSource.images:
            describe_images(directory)
        elif is_live(components[name]):
            print("tokenised while training")
        else:
            num_tokens += describe(directory, tells_bad_rows=directory in there_before)
            _refuse_long_chats(components[name], directory)
    if config.model.name and config.model.kind is ModelKind.native:
        print(f"enough?     {per_parameter(num_tokens, config.model)}")


def describe_images(directory: Path) -> None:
    from bigtrain.data.read.images import read_image_index

    index = read_image_index(directory)
    print(f"images      {directory}")
    print(f"classes     {len(index.label_names)}: {some(index.label_names, 12)}")
    print(f"train       {counted(index.num_train, 'image')}")
    print(f"validation  {counted(index.num_validation, 'image')}")


def _refuse_long_chats(data: DataConfig, directory: Path) -> None:
    """Raise what a training would, where data.long_chats=refuse."""
    from bigtrain.data.read.corpus import open_corpus
    from bigtrain.data.read.index import SPLITS
    from bigtrain.data.read.packing import build_packing

    if data.long_chats is not LongChats.refuse:
        return
    if data.sequence_length is None:
        log.get_logger().warning("data.long_chats=refuse: data.sequence_length says what is long; the training looks")
        return
    corpus = open_corpus(data, vocab_size=2**31, directory=directory)
    for name in SPLITS:
        build_packing(corpus.split(name), data.sequence_length, data.packing, data.document_mask, data.long_chats)


def describe(directory: Path, *, tells_bad_rows: bool = True) -> int:
    """Print what a corpus holds and what was left out of it; return the tokens to train on.

    Bad rows are named by who prepares it, too.
    """
    from bigtrain.data.prepare.corpus import REPORT_FILE
    from bigtrain.data.prepare.files import tell_left_out
    from bigtrain.data.read.index import read_index

    index = read_index(directory, check_sizes=False)
    print(f"corpus      {directory}")
    print(f"source      {index.source}")
    print(f"tokenizer   {index.tokenizer.name}, {index.tokenizer.vocab_size:,} tokens")
    for name, split in (("train", index.train), ("validation", index.validation)):
        print(
            f"{name:<11} {counted(split.num_documents, 'document')}, {split.num_text_bytes / 1e6:.1f} MB, "
            f"{split.num_tokens:,} tokens in {counted(len(split.shards), 'shard')}, "
            f"{split.unigram_nats_per_token:.4f} nats per token by frequency alone"
        )
    path = directory / REPORT_FILE
    if path.exists():
        report = json.loads(path.read_text(encoding="utf-8"))
        print(f"unique      {report['unique_share']:.2%} of the text that passed the filters")
        for reason, dropped in report["dropped"].items():
            examples = ", ".join(dropped["examples"])
            print(
                f"left out    {reason}: {counted(dropped['documents'], 'document')}, {dropped['text_bytes'] / 1e6:.1f} MB, "
                f"such as {examples}"
            )
        if "bad_rows" in report and tells_bad_rows:
            print(
                f"left out    {report['bad_rows']['count']:,} bad rows or files: {'; '.join(report['bad_rows']['examples'])}"
            )
        if "files_left_out" in report:
            print(f"not read    {tell_left_out(report['files_left_out'])}")
    return index.train.num_tokens


def per_parameter(num_tokens: int, model: ModelConfig) -> str:
    """Return a sentence about the number of tokens for each parameter of a model."""
    from bigtrain.models.sizes import model_sizes

    num_parameters = model_sizes(model).total
    return (
        f"{num_tokens / num_parameters:.2f} tokens per parameter of {model.name} ({num_parameters:,}); "
        f"about {ENOUGH_TOKENS_PER_PARAMETER} make the best of a training's compute"
    )


def help_page() -> str:
    settings = setting_lines(DataConfig, prefix="data.")
    return HELP.format(sources=", ".join(group_options("data")), settings=settings)


main = partial(hydra_cli.main, hydra_cli.read_data, run, help_page)
