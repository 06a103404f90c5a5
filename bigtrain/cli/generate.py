"""Generate text with a trained model: ``python launch/generate.py checkpoint=runs/gpt_nano prompt="def main("``."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from bigtrain.cli import hydra_cli
from bigtrain.config.bounds import Bound
from bigtrain.config.convert import LocalPath, MaybeEmpty, to_dict
from bigtrain.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class GenerateConfig:
    checkpoint: LocalPath
    """Directory of the run, or of one of its checkpoints."""
    prompt: MaybeEmpty = ""
    """Text to continue, by default none; taken as it is, without quoting for Hydra."""
    prompts: LocalPath | None = None
    """In place of it, a file with a prompt a line."""
    chat: bool = False
    """Let the chat template write the prompt as a user's message, and ask for an answer."""
    num_samples: Annotated[int, Bound(ge=1, le=10_000)] = 5
    """Number of texts."""
    max_new_tokens: Annotated[int, Bound(ge=1, le=10**6)] = 50
    """Longest continuation, in tokens."""
    temperature: Annotated[float, Bound(ge=0)] = 0.8
    """Below 1 likelier tokens, above 1 more variety; 0 always takes the likeliest."""
    top_k: Annotated[int | None, Bound(ge=1)] = 50
    """Draw from so many of the likeliest tokens; null = from all."""
    top_p: Annotated[float | None, Bound(gt=0, le=1)] = 0.95
    """Draw from the likeliest tokens that together have this probability; null = from all."""
    seed: Annotated[int, Bound(ge=0, le=2**63 - 1)] = 0
    """The same seed gives the same texts."""
    tp: Annotated[int, Bound(ge=1, le=1024)] = 1
    """Under torchrun, ranks that share every matrix (``parallel.tp``); without, each has shards of all."""


HELP = """\
Continue a prompt with a trained model.

  python launch/generate.py checkpoint=runs/gpt_nano prompt="def main("
  python launch/generate.py checkpoint=runs/gpt_nano prompt="Once upon a time, " num_samples=1 max_new_tokens=200
  torchrun --nproc-per-node=8 launch/generate.py checkpoint=runs/llama3_70b prompts=prompts.txt tp=8
  python launch/generate.py checkpoint=runs/my_chats prompt="What is a list?" chat=true temperature=0 num_samples=1
"""


def run(config: GenerateConfig) -> None:
    from bigtrain.run.sampling import read_prompts, sample_run

    if config.prompt and config.prompts:
        raise ConfigError(f"prompt and prompts={config.prompts}: leave one of them out")
    prompts = read_prompts(config.prompts, "prompts") if config.prompts else [_whole(config.prompt)]
    settings = to_dict(config) | {"prompts": prompts}
    del settings["prompt"]
    total, shown = len(prompts) * config.num_samples, (-1, "")

    def say(number: int, text: str) -> None:
        nonlocal shown
        if number != shown[0]:
            prompt = "" if config.chat else prompts[number // config.num_samples]
            print(end="\n" if number else "")
            print(f"--- {number + 1} of {total} ---\n{prompt}", end="", flush=True)
            shown = number, ""
        print(text[len(shown[1]) :], end="", flush=True)
        shown = number, text

    sample_run(Path(settings.pop("checkpoint")), say=say, **settings)
    if hydra_cli.rank() == 0:
        print()


def _whole(prompt: str) -> str:
    """Return the prompt of a command line, whose bytes that are not valid UTF-8 are lone surrogates."""
    from bigtrain.data.prepare.records import decode
    from bigtrain.log import get_logger

    text, is_repaired = decode(prompt.encode("utf-8", "surrogateescape"), "utf-8")
    if is_repaired:
        get_logger().warning("prompt: it is not valid UTF-8; each bad sequence is taken as U+FFFD")
    return text


main = partial(hydra_cli.command, GenerateConfig, run, HELP)
