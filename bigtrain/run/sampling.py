"""Text from a trained run, in one process, and from one in training, on all ranks."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bigtrain.checkpoint.store import step_of
from bigtrain.config import TaskKind, TrainConfig, component_data
from bigtrain.config.tasks import OF_NEXT_TOKENS
from bigtrain.data.prepare.chat import find_chat
from bigtrain.data.read.index import read_index
from bigtrain.data.read.tokenizer import is_ours, load_tokenizer
from bigtrain.engine.base import Engine
from bigtrain.engine.state import MODEL, whole_entry
from bigtrain.engine.wrap import materialise
from bigtrain.errors import ConfigError
from bigtrain.files import read_json
from bigtrain.log import get_logger
from bigtrain.models import build_model
from bigtrain.models.adapters import plain_name
from bigtrain.models.generation import LanguageModel, generate
from bigtrain.models.moe import balances
from bigtrain.models.own import Uncached
from bigtrain.run.batched import continued, shared_out
from bigtrain.run.directory import MODEL_DIRECTORY, find_whole, read_config
from bigtrain.run.frozen import load_state
from bigtrain.telemetry.files import SAMPLES_FILE, JsonLines

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def sample_run(
    path: Path,
    *,
    prompt: str,
    chat: bool = False,
    num_samples: int = 1,
    max_new_tokens: int,
    seed: int = 0,
    **sampling: Any,
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
        network = build_model(config.model)
    materialise(network, device)
    weights = {plain_name(name): p for name, p in network.named_parameters()} | balances(network)
    load_state(checkpoint, {MODEL + name: whole_entry(tensor) for name, tensor in weights.items()})
    model = network if isinstance(network, LanguageModel) else Uncached(network, config.model)
    model.eval()
    adds_special = read_index(run, check_sizes=False).tokenizer.adds_special
    if chat:
        ids = tokenizer.encode(asked(run, config, prompt), add_special_tokens=False).ids
    else:
        ids = prompt_ids(tokenizer, prompt, adds_special=adds_special)
    ends = end_ids(run, is_pretrained=config.model.pretrained)
    generator = torch.Generator().manual_seed(seed)
    texts, is_full = [], False
    for _ in range(num_samples):
        new_ids = generate(model, ids, max_new_tokens=max_new_tokens, generator=generator, eos_id=ends, **sampling)
        texts.append(continuation(tokenizer, ids, new_ids))
        is_full |= len(new_ids) < max_new_tokens and len(ids) + len(new_ids) == model.max_positions
    if is_full:
        get_logger().warning(
            f"a text ends where the model does: it takes {model.max_positions} tokens in all, and the prompt has {len(ids)}"
        )
    _keep(run, step_of(checkpoint), prompt, texts)
    return texts


def asked(run: Path, config: TrainConfig, prompt: str) -> str:
    """Return what the run's chat template writes to ask for an answer to ``prompt``. DataError: it has none."""
    template = config.data.chat_template if is_ours(str(run)) else None  # others are kept with the tokenizer
    text, _ = find_chat(str(run), template).render([{"role": "user", "content": prompt}], {}, asks=True)
    return text


def require_texts(config: TrainConfig, tokenizer: Path | None) -> None:
    """Raise a ConfigError if validations cannot continue prompts, or answer tasks, that the settings name."""
    settings = config.validation
    if (settings.prompts or settings.lm_eval) and tokenizer is None:
        name = "prompts" if settings.prompts else "lm_eval"
        raise ConfigError(f"validation.{name}: data.source={config.data.source.name} has no tokenizer; leave it out")
    if settings.prompts:
        read_prompts(settings.prompts)
        if any(part.content.is_chat for part in component_data(config.data).values()):
            get_logger().warning(
                "validation.prompts are continued as they stand; a model of chats answers what its chat template writes"
            )
    if settings.lm_eval:
        from bigtrain.run.harness import load_tasks

        load_tasks(settings.lm_eval, settings.lm_eval_tasks)


def read_prompts(file: str) -> list[str]:
    """Return the lines of ``validation.prompts``. ConfigError: it cannot be read, or has none."""
    try:
        prompts = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"validation.prompts={file} cannot be read: {error}") from error
    if not prompts:
        raise ConfigError(f"validation.prompts={file}: no line has text; write a prompt a line")
    return prompts


def continue_prompts(engine: Engine, config: TrainConfig, run: Path, *, step: int) -> None:
    """Keep the likeliest continuations of ``validation.prompts`` in the run's samples; all ranks call this."""
    if not config.validation.prompts:
        return
    prompts, tokenizer = read_prompts(config.validation.prompts), load_tokenizer(run)
    adds_special = read_index(run, check_sizes=False).tokenizer.adds_special
    ends = end_ids(run, is_pretrained=config.model.pretrained)

    def write(rows: list[list[int]]) -> list[list[int]]:
        limit = config.validation.prompt_tokens
        return continued(engine, rows, max_new_tokens=limit, is_end=lambda ids: ids[-1] in ends)

    rows = [prompt_ids(tokenizer, prompt, adds_special=adds_special) for prompt in prompts]
    found = shared_out(engine, rows, write, length=len, batch_size=config.train.micro_batch_size)
    if engine.mesh.rank == 0:
        for prompt, ids, new_ids in zip(prompts, rows, found, strict=True):
            written = new_ids[:-1] if new_ids and new_ids[-1] in ends else new_ids
            _keep(run, step, prompt, [continuation(tokenizer, ids, written)])


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
        own = read_json(run / MODEL_DIRECTORY / name).get("eos_token_id")
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
