"""Text from a trained run, in one process."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bigtrain.checkpoint.store import step_of
from bigtrain.config import ModelKind, TaskKind
from bigtrain.config.tasks import OF_NEXT_TOKENS
from bigtrain.data.read.index import read_index
from bigtrain.data.read.tokenizer import load_tokenizer
from bigtrain.engine.state import MODEL, whole_entry
from bigtrain.engine.wrap import materialise
from bigtrain.errors import ConfigError
from bigtrain.log import get_logger
from bigtrain.models import build_model
from bigtrain.models.adapters import plain_name
from bigtrain.models.generation import generate
from bigtrain.models.own import Uncached
from bigtrain.run.directory import MODEL_DIRECTORY, find_whole, read_config
from bigtrain.run.frozen import load_state
from bigtrain.telemetry.files import SAMPLES_FILE, JsonLines

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def sample_run(
    path: Path,
    *,
    prompt: str,
    num_samples: int = 1,
    max_new_tokens: int = 50,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = 0.95,
    seed: int = 0,
) -> list[str]:
    """Return continuations of ``prompt`` by a run or one of its checkpoints, and keep them in its ``samples.jsonl``.

    The settings are those of :class:`bigtrain.cli.generate.GenerateConfig`. CheckpointError: no whole checkpoint.
    DataError: the run was trained without a tokenizer. ConfigError: a prompt or a setting that the model cannot serve.
    """
    run, checkpoint = find_whole(path)
    config = read_config(run)
    if config.task.kind in set(TaskKind.__members__) - set(OF_NEXT_TOKENS):
        raise ConfigError(f"{run}: task={config.task.kind} writes no text; only a causal language model does")
    tokenizer = load_tokenizer(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        model = build_model(config.model)
    materialise(model, device)
    load_state(checkpoint, {MODEL + plain_name(name): whole_entry(p) for name, p in model.named_parameters()})
    if config.model.kind is ModelKind.own:
        model = Uncached(model, config.model)
    model.eval()
    adds_special = read_index(run, check_sizes=False).tokenizer.adds_special
    ids = prompt_ids(tokenizer, prompt, adds_special=adds_special)
    ends = end_ids(run, is_pretrained=config.model.pretrained)
    generator = torch.Generator().manual_seed(seed)
    texts, is_full = [], False
    for _ in range(num_samples):
        new_ids = generate(
            model,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            eos_id=ends,
        )
        texts.append(continuation(tokenizer, ids, new_ids))
        is_full |= len(new_ids) < max_new_tokens and len(ids) + len(new_ids) == model.max_positions
    if is_full:
        get_logger().warning(
            f"a text ends where the model does: it takes {model.max_positions} tokens in all, and the prompt has {len(ids)}"
        )
    _keep(run, step_of(checkpoint), prompt, texts)
    return texts


def prompt_ids(tokenizer: "Tokenizer", prompt: str, *, adds_special: bool) -> list[int]:
    """Return the ids of the prompt, with BOS where the tokenizer writes it, but without a closing special token."""
    encoding = tokenizer.encode(prompt, add_special_tokens=adds_special)
    ids, written = encoding.ids, encoding.special_tokens_mask
    while ids and written[len(ids) - 1] and 0 in written:
        ids = ids[:-1]
    return ids


def continuation(tokenizer: "Tokenizer", ids: list[int], new_ids: list[int]) -> str:
    """Return the text of ``new_ids``, decoded after ``ids``: some tokenizers drop the space of a first word."""
    prompt, whole = tokenizer.decode(ids), tokenizer.decode([*ids, *new_ids])
    return whole.removeprefix(prompt) if whole.startswith(prompt) else tokenizer.decode(new_ids)


def end_ids(run: Path, *, is_pretrained: bool) -> set[int]:
    """Return the tokens that end a text: the tokenizer's, and those of a pretrained model's own settings."""
    record = read_index(run, check_sizes=False).tokenizer
    ids = {record.eos_id}
    for name in ("config.json", "generation_config.json") if is_pretrained and record.published else ():
        path = run / MODEL_DIRECTORY / name
        own = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        ids |= {own} if isinstance(own, int) else set(own or ())
    return ids


def _keep(run: Path, step: int, prompt: str, texts: list[str]) -> None:
    try:
        samples = JsonLines(run / SAMPLES_FILE)
    except OSError as error:
        get_logger().warning(f"the texts are not kept: {error}")
        return
    for text in texts:
        samples.write({"step": step, "prompt": prompt, "text": text})
    samples.close()
