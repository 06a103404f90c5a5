"""Prepare a corpus ahead of the training: ``python launch/prepare.py data=text data.path='books/*.txt'``."""

import hydra_cli

from bigtrain import log
from bigtrain.config import DataConfig, DataSource, TrainConfig
from bigtrain.errors import EXIT_FINISHED, ConfigError

HELP = """\
Tokenise a corpus once, so that no run has to wait for it. Training prepares what is missing by itself.

  python launch/prepare.py                                          the embedded corpus: Python's standard library
  python launch/prepare.py data=text data.path='books/*.txt'
  python launch/prepare.py data=datasets data.path=roneneldan/TinyStories data.tokenizer=gpt2

Use the same data settings as the training; all others are allowed and have no effect.

Sources, chosen with data=<option>: {sources}

Settings, with their defaults:
{settings}
"""


def run(config: TrainConfig) -> int:
    """Prepare the corpus of ``config.data`` and say what it holds."""
    if config.data.source is DataSource.synthetic:
        raise ConfigError("data=synthetic is made while training; there is nothing to prepare")
    from bigtrain.data.index import read_index
    from bigtrain.data.prepare import prepare

    log.setup(hydra_cli.rank())
    directory = prepare(config.data, progress=True)
    index = read_index(directory)
    print(f"corpus      {directory}")
    print(f"source      {index.source}")
    print(f"tokenizer   {index.tokenizer.name}, {index.tokenizer.vocab_size:,} tokens")
    for name, split in (("train", index.train), ("validation", index.validation)):
        print(
            f"{name:<11} {split.num_documents:,} documents, {split.num_text_bytes / 1e6:.1f} MB, "
            f"{split.num_tokens:,} tokens, {split.unigram_nats_per_token:.4f} nats per token by frequency alone"
        )
    return EXIT_FINISHED


def help_page() -> str:
    """Return the text of ``--help``."""
    settings = hydra_cli.setting_lines(DataConfig, prefix="data.")
    return HELP.format(sources=", ".join(hydra_cli.group_options("data")), settings=settings)


if __name__ == "__main__":
    hydra_cli.main(hydra_cli.read_data, run, help_page)
