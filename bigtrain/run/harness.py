"""Tasks of EleutherAI's lm-evaluation-harness, answered by a run's network on all ranks.

Scores are those that ``lm_eval --model hf`` gives to the run's export.
"""

import contextlib
import functools
import io
import itertools
import logging
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from bigtrain.config import TrainConfig
from bigtrain.config.tasks import OF_NEXT_TOKENS
from bigtrain.data.read.index import read_index
from bigtrain.distributed.collectives import broadcast_json
from bigtrain.engine.base import Engine
from bigtrain.errors import ConfigError, first_line
from bigtrain.run.batched import continued, logits_of, shared_out
from bigtrain.run.evaluation import load_engine, opened
from bigtrain.run.export import write_tokenizer
from bigtrain.tasks.base import TaskModel

DEFAULT_MAX_LENGTH = 2048  # of a model without a limit
DEFAULT_NEW_TOKENS = 256  # of an answer whose task says nothing

Scored = tuple[list[int], list[int]]  # ids of a context, and of what is scored behind it


class RunLM(TemplateLM):
    """A run's network as the harness asks it: every rank gets all requests, computes a share, and knows all answers."""

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, *, max_length: int, batch_size: int) -> None:
        super().__init__()
        self.engine, self.tokenizer, self.max_length, self.batch_size = engine, tokenizer, max_length, batch_size

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return "run"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        has_begin = string.startswith(str(self.tokenizer.decode([self.prefix_token_id])))
        special = add_special_tokens if add_special_tokens is not None else not has_begin
        return self.tokenizer.encode(string, add_special_tokens=special)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        is_begun = not add_generation_prompt
        text = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=is_begun
        )
        return str(text)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, scored) for _, context, scored in requests]
        found = self._shared_out(pairs, self._score, length=lambda pair: len(pair[0]) + len(pair[1]))
        return [(nats, is_greedy) for nats, is_greedy in found]

    def _score(self, pairs: list[Scored]) -> list[tuple[float, bool]]:
        """Return the log-probability of each second part behind its first, and whether it is the likeliest one."""
        rows = [(context + scored)[-(self.max_length + 1) :] for context, scored in pairs]
        found = []
        for row, (_, scored), logits_TV in zip(
            rows, pairs, logits_of(self.engine, [r[:-1] for r in rows]), strict=True
        ):
            targets_T = torch.tensor(row[-len(scored) :], device=logits_TV.device)
            logprobs_TV = logits_TV[-len(targets_T) :].float().log_softmax(dim=-1)
            nats = logprobs_TV.gather(-1, targets_T[:, None]).sum()
            found.append((float(nats), bool((logprobs_TV.argmax(dim=-1) == targets_T).all())))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = [
            (place, make_disjoint_window(window))
            for place, request in enumerate(requests)
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
        ]
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens([(None, *window) for _, window in windows])
        for (place, _), (nats, _) in zip(windows, scored, strict=True):
            totals[place] += nats
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        answers: dict[int, str] = {}
        by_settings = sorted(range(len(requests)), key=lambda place: str(requests[place].args[1]))
        for _, places in itertools.groupby(by_settings, key=lambda place: str(requests[place].args[1])):
            same = list(places)
            settings = normalize_gen_kwargs(requests[same[0]].args[1], DEFAULT_NEW_TOKENS)
            texts = self._write([requests[place].args[0] for place in same], settings)
            answers |= dict(zip(same, texts, strict=True))
        return [answers[place] for place in range(len(requests))]

    def _write(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        """Return what follows each context, up to the first of the texts that end it."""
        ends = handle_stop_sequences(settings["until"], eos=self.tokenizer.decode([self.eot_token_id]))
        max_new_tokens = settings["max_gen_toks"]
        if max_new_tokens >= self.max_length:
            told = f"a task writes up to {max_new_tokens} tokens (max_gen_toks), and the model takes {self.max_length} in all"
            raise ConfigError(told)
        sampling = {key: settings[key] for key in ("temperature", "top_k", "top_p") if key in settings}

        def is_end(prompt: list[int], ids: list[int]) -> bool:
            text = self.tokenizer.decode(ids)
            return ids[-1] == self.eot_token_id or any(end and end in text for end in ends)

        def write(rows: list[list[int]]) -> list[str]:
            found = continued(self.engine, rows, max_new_tokens=max_new_tokens, is_end=is_end, **sampling)
            texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
            return [postprocess_generated_text(text, ends, None) for text in texts]

        rows = [self.tok_encode(context)[-(self.max_length - max_new_tokens) :] for context in contexts]
        return self._shared_out(rows, write, length=len)

    def _shared_out(self, rows: Sequence[Any], answer: Any, *, length: Any) -> list[Any]:
        return shared_out(self.engine, rows, answer, length=length, batch_size=self.batch_size)


def load_tasks(names: Sequence[str], directory: str | None) -> dict[str, Any]:
    """Return tasks of the harness, or of a directory, with their data; ConfigError if one is unknown, or cannot be had."""
    manager = open_tasks(tuple(names), directory)
    try:
        return manager.load(list(names))
    except Exception as error:  # of any library that fetches or reads data
        told = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"lm-evaluation-harness cannot open {', '.join(names)}: {told}") from error


@functools.cache
def open_tasks(names: tuple[str, ...], directory: str | None) -> TaskManager:
    """Return what knows the harness' tasks and those of a directory, after a look at ``names``.

    ConfigError: an unknown task, or one in the directory that would import code.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    where = Path(directory) if directory else None
    if where and not where.is_dir():
        raise ConfigError(f"validation.lm_eval_tasks={directory}: no such directory")
    # A file that another one includes may have any name, but lies in the directory.
    files = [file for file in sorted(where.rglob("*")) if file.suffix in ("", ".yaml", ".yml")] if where else []
    for file in filter(Path.is_file, files):
        text = file.read_text(encoding="utf-8")
        if "!function" in text:
            raise ConfigError(f"{file}: !function would run code that a file names; write the task without it")
        if re.search(r"""^include:.*(\.\.|[\s'"\[]/)""", text, re.MULTILINE):
            raise ConfigError(f"{file}: include names a file outside {where}, which may run code; copy it there")
    manager = TaskManager(include_path=directory, include_defaults=False) if where else None
    if manager is None or not set(names) <= set(manager.all_tasks):  # all of the harness' own take seconds to list
        manager = TaskManager(include_path=directory)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        own = f" nor has {where} one" if where else "; own tasks are in a directory, validation.lm_eval_tasks=DIR"
        raise ConfigError(f"lm-evaluation-harness has no task {unknown[0]}{own}")
    return manager


def scores(engine: Engine, config: TrainConfig, run: Path, **asked: Any) -> dict[str, float]:
    """Return the scores of tasks as ``lm_eval/<task>/<metric>``; all ranks call this. ConfigError: an unknown task.

    ``config`` is the run's; ``asked`` is as :func:`score_directory` has it.
    """
    with tempfile.TemporaryDirectory() as place:
        write_tokenizer(run, Path(place), read_index(run, check_sizes=False).tokenizer, config)
        tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.model_max_length = VERY_LARGE_INTEGER  # what is too long is cut here
    network = next(module.network for module in engine.module.modules() if isinstance(module, TaskModel))
    longest = getattr(network, "max_positions", None) or DEFAULT_MAX_LENGTH
    return _ask(RunLM(engine, tokenizer, max_length=longest, batch_size=config.train.micro_batch_size), **asked)


def score_directory(path: Path, **asked: Any) -> dict[str, float]:
    """Return the scores of a run, one of its checkpoints, or an export, as :func:`scores` does; all ranks call this.

    ``asked`` are ``tasks``, names of the harness; ``directory`` with tasks of one's own; ``limit``, documents of each
    task; ``num_fewshot``, examples before each question. CheckpointError: no whole checkpoint. ConfigError: an unknown
    task, or a run that continues no text.
    """
    if (path / "config.json").is_file():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return _ask(HFLM(pretrained=str(path), device=device, trust_remote_code=False), **asked)
    with opened(path) as (config, run):
        if config.task.kind not in OF_NEXT_TOKENS:
            raise ConfigError(f"{run}: task={config.task.kind} continues no text; only a causal language model does")
        engine, _ = load_engine(path, config)
        return scores(engine, config, run, **asked)


def _ask(
    lm: LM,
    *,
    tasks: Sequence[str],
    directory: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, float]:
    loaded = load_tasks(tasks, directory)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        task.set_config("num_fewshot", own or 0 if num_fewshot is None or own == 0 else num_fewshot)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    with contextlib.redirect_stderr(io.StringIO()):  # bars of the harness on every rank
        found = evaluate(lm, loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    metrics = named(found["results"])
    return broadcast_json(metrics) if dist.is_initialized() else metrics


def named(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the harness' results as metrics: ``{"arc": {"acc,none": 0.5}}`` as ``{"lm_eval/arc/acc": 0.5}``."""
    metrics = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, answers = key.partition(",")
            if answers and not metric.endswith("_stderr") and isinstance(value, int | float):
                name = metric if answers == "none" else f"{metric}/{answers}"
                metrics[f"lm_eval/{task}/{name}"] = float(value)
    return metrics
