"""Text from a trained run, and from one in training, on all ranks."""

from collections.abc import Callable, Sequence
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
from bigtrain.models.generation import LanguageModel, check_prompt, check_sampling, generate
from bigtrain.models.moe import balances
from bigtrain.models.own import Uncached
from bigtrain.processes import RankInfo
from bigtrain.run.batched import continued, shared_out
from bigtrain.run.directory import MODEL_DIRECTORY, find_whole, read_config
from bigtrain.run.evaluation import load_engine, opened
from bigtrain.run.frozen import load_state
from bigtrain.telemetry.files import SAMPLES_FILE, JsonLines

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def sample_run(
    path: Path,
    prompts: Sequence[str],
    *,
    chat: bool = False,
    num_samples: int = 1,
    max_new_tokens: int,
    seed: int = 0,
    tp: int = 1,
    say: Callable[[int, str], object] = lambda number, text: None,
    **sampling: Any,
) -> list[str]:
    """Return continuations of each prompt by a run or one of its checkpoints, and keep them in its ``samples.jsonl``.

    The settings are those of :class:`bigtrain.cli.generate.GenerateConfig`. The ranks of a world hold the weights in
    shards, of matrices that ``tp`` of them share; the texts are those of one process. ``say`` is called with the number
    of a text from 0 and the text: as it grows in one process, else when it is whole. CheckpointError: no whole
    checkpoint. DataError: the run was trained without a tokenizer. ConfigError: a prompt or a setting that the model
    cannot serve.
    """
    check_sampling(max_new_tokens=max_new_tokens, **sampling)
    run, checkpoint = find_whole(path)
    config = read_config(run)
    if config.task.kind in set(TaskKind.__members__) - set(OF_NEXT_TOKENS):
        raise ConfigError(f"{run}: task={config.task.kind} writes no text; only a causal language model does")
    tokenizer = load_tokenizer(run)
    adds_special = read_index(run, check_sizes=False).tokenizer.adds_special
    rows = []
    for prompt in prompts:
        if chat:
            ids = tokenizer.encode(asked(run, config, prompt), add_special_tokens=False).ids
        else:
            ids = prompt_ids(tokenizer, prompt, adds_special=adds_special)
        rows += [ids] * num_samples
    generators = [torch.Generator().manual_seed((seed + number % num_samples) % 2**63) for number in range(len(rows))]
    sampling |= {"max_new_tokens": max_new_tokens}
    ends = end_ids(run, is_pretrained=config.model.pretrained)
    info = RankInfo.from_env()
    if info.world_size == 1:
        found, max_positions = _write_alone(config, checkpoint, tokenizer, rows, generators, ends, say, sampling)
    else:
        found, max_positions = _write_on_all_ranks(path, rows, generators, ends, tp, sampling)
    texts = [continuation(tokenizer, ids, new_ids) for ids, new_ids in zip(rows, found, strict=True)]
    if info.rank != 0:
        return texts
    for number, text in enumerate(texts) if info.world_size > 1 else ():
        say(number, text)
    for ids, new_ids in zip(rows, found, strict=True):
        if len(new_ids) < max_new_tokens and len(ids) + len(new_ids) == max_positions:
            get_logger().warning(
                f"a text ends where the model does: it takes {max_positions} tokens in all, and the prompt has {len(ids)}"
            )
            break
    for number, prompt in enumerate(prompts):
        _keep(run, step_of(checkpoint), prompt, texts[number * num_samples :][:num_samples])
    return texts


def _write_alone(
    config: TrainConfig,
    checkpoint: Path,
    tokenizer: "Tokenizer",
    rows: list[list[int]],
    generators: list[torch.Generator],
    ends: set[int],
    say: Callable[[int, str], object],
    sampling: dict[str, Any],
) -> tuple[list[list[int]], int | None]:
    """Return what one process writes after each row, with a cache, and the positions that the model has."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        network = build_model(config.model)
    materialise(network, device)
    weights = {plain_name(name): p for name, p in network.named_parameters()} | balances(network)
    load_state(checkpoint, {MODEL + name: whole_entry(tensor) for name, tensor in weights.items()})
    model = network if isinstance(network, LanguageModel) else Uncached(network, config.model)
    found: list[list[int]] = []

    def heard(token: int) -> None:
        found[-1].append(token)
        text = continuation(tokenizer, rows[len(found) - 1], found[-1])
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the first bytes of a character
            say(len(found) - 1, text)

    for number, (ids, generator) in enumerate(zip(rows, generators, strict=True)):
        found.append([])
        generate(model, ids, generator=generator, eos_id=ends, heard=heard, **sampling)
        say(number, continuation(tokenizer, ids, found[-1]))
    return found, model.max_positions


def _write_on_all_ranks(
    path: Path,
    rows: list[list[int]],
    generators: list[torch.Generator],
    ends: set[int],
    tp: int,
    sampling: dict[str, Any],
) -> tuple[list[list[int]], int | None]:
    """Return what this world's ranks write after each row, and the positions that the model has."""
    with opened(path, tp=tp) as (config, _):
        most = config.model.max_positions
        for ids in rows:
            check_prompt(ids, config.model.vocab_size, most)
        engine, _ = load_engine(path, config)

        def is_end(ids: list[int], new_ids: list[int]) -> bool:
            return new_ids[-1] in ends or len(ids) + len(new_ids) == most

        def write(numbers: list[int]) -> list[list[int]]:
            chosen, drawn = [rows[number] for number in numbers], [generators[number] for number in numbers]
            return continued(engine, chosen, is_end=is_end, generators=drawn, **sampling)

        size = config.train.micro_batch_size
        found = shared_out(engine, range(len(rows)), write, length=lambda number: len(rows[number]), batch_size=size)
    return [ids[:-1] if ids and ids[-1] in ends else ids for ids in found], most


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


def read_prompts(file: str, setting: str = "validation.prompts") -> list[str]:
    """Return the lines of a file of prompts. ConfigError: it cannot be read, or has none."""
    try:
        prompts = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}={file} cannot be read: {error}") from error
    if not prompts:
        raise ConfigError(f"{setting}={file}: no line has text; write a prompt a line")
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
        return continued(engine, rows, max_new_tokens=limit, is_end=lambda prompt, ids: ids[-1] in ends)

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
