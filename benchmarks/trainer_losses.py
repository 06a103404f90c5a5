"""What ``same_as_trainer.py`` compares, each function called on ranks of its own by ``small_runs.call``."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from small_runs import Recorded, batches, run_config, run_losses, trainer_arguments, write_models
from step import forget_lone_rank
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from bigtrain.config import (
    AdapterConfig,
    Content,
    DataConfig,
    DataSource,
    EngineKind,
    Packing,
    PreferenceLoss,
    TaskConfig,
    TaskKind,
    TrainConfig,
    TrainingConfig,
)
from bigtrain.models.adapters import is_of_adapter
from bigtrain.run.frozen import starting_values
from bigtrain.tasks.base import IGNORE_INDEX

STEPS, WORLD_SIZE, BATCH, TOKENS = 20, 2, 8, 48
NUM_DOCUMENTS = 200
ADAPTERS, PREFERENCES = "adapters", ("dpo", "ipo", "orpo", "kto", "kto in micro-batches")
PACKED, SFT = "packed", ("sft", "packed sft")
CHAT_TEMPLATE = """\
<s>{% for message in messages %}{% if message.role == 'assistant' %}<|assistant|>\
{% generation %}{{ message.content }}<|end|>{% endgeneration %}\
{% else %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endif %}{% endfor %}"""
SPECIAL_TOKENS = ["<s>", "<|user|>", "<|assistant|>", "<|end|>"]


def prepare(family: str, what: str, directory: Path) -> None:
    """Write ``pretrained/``, and ``text.jsonl`` or, with a tokenizer beside the model, ``chats.jsonl``; say of adapters."""
    write_models(family, {}, directory)
    with_chats, is_packed = what in ("chats", *SFT), what.startswith(PACKED)
    if is_packed:
        (directory / PACKED).touch()
    if what in ("adapters", *PREFERENCES):
        (directory / ADAPTERS).touch()
    if what in PREFERENCES:
        (write_rated if what.startswith("kto") else write_pairs)(directory, what)
        return
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshr", k=draw.randint(2, 7))) for _ in range(50)]
    texts = (" ".join(draw.choices(words, k=draw.randint(5, 40))) for _ in range(NUM_DOCUMENTS))
    rows = [{"text": text} for text in texts]
    if with_chats:
        tokenizer = write_tokenizer(directory / "pretrained", words)
        rows = []
        while len(rows) < NUM_DOCUMENTS:
            messages = [
                {
                    "role": role,
                    "content": " ".join(draw.choices(words, k=draw.randint(*((1, 3) if is_packed else (3, 12))))),
                }
                for role in ("user", "assistant")
            ]
            if is_packed or TOKENS // 2 < len(tokenizer.apply_chat_template(messages, return_dict=False)) < TOKENS - 1:
                rows.append({"messages": messages})  # unless they are packed, one fits into a sample, two do not
    path = directory / ("chats.jsonl" if with_chats else "text.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_pairs(directory: Path, loss: str) -> None:
    """Write pairs of answers, and the name of the loss that compares them."""
    rows = write_answers(directory, loss, "chosen", "rejected")
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_rated(directory: Path, loss: str) -> None:
    """Write answers, two of three of which are good, and the name of the loss that judges them."""
    rows = [row | {"label": n % 3 > 0} for n, row in enumerate(write_answers(directory, loss, "completion"))]
    (directory / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_answers(directory: Path, loss: str, *names: str) -> list[dict[str, Any]]:
    """Write a tokenizer and the name of a loss; return prompts with answers of several lengths."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshr", k=draw.randint(2, 7))) for _ in range(50)]
    write_tokenizer(directory / "pretrained", words)
    (directory / "loss").write_text(loss)

    def messages(role: str) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(draw.choices(words, k=draw.randint(2, 6)))}]

    roles = {"prompt": "user"} | dict.fromkeys(names, "assistant")
    return [{name: messages(role) for name, role in roles.items()} for _ in range(NUM_DOCUMENTS)]


def write_tokenizer(directory: Path, words: list[str]) -> Any:
    """Write and return a small byte-level tokenizer with a chat template that marks what the model says."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(words)], trained)
    wrapper = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )
    wrapper.save_pretrained(directory)
    return wrapper


def our_losses(directory: Path, engine: EngineKind) -> list[float]:
    """Return the losses of a run."""
    return run_losses(configuration(directory, engine, world_size=WORLD_SIZE))


def trainer_losses(directory: Path) -> list[float]:
    """Train the same samples with transformers' Trainer; return the losses."""
    config = configuration(directory, EngineKind.ddp, world_size=1)
    samples = list_samples(config)
    forget_lone_rank()

    class Recording(Recorded, transformers.Trainer):
        pass

    arguments = transformers.TrainingArguments(**trainer_arguments(config, directory, 2))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "pretrained", dtype=torch.float32)
    if config.model.adapter:
        model = with_same_adapters(model, config)
    trainer = Recording(model=model, args=arguments, train_dataset=samples)
    trainer.train()
    return trainer.step_losses()


def with_same_adapters(model: torch.nn.Module, config: TrainConfig) -> torch.nn.Module:
    """Return peft's model with the adapters of a run, and the values that they begin with."""
    from peft import LoraConfig, get_peft_model

    adapter, values = config.model.adapter, starting_values(config.model, config.train.seed)
    layers = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, layers)
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trained) == sum(map(is_of_adapter, values)), "the same layers"
    for name, parameter in trained.items():
        values[f"causal_lm.{name.removeprefix('base_model.model.')}"].fill(0, parameter.data.view(-1))
    return wrapped


def list_samples(config: TrainConfig) -> list[dict[str, Tensor]]:
    """Return the samples of the run in their order, as Trainer wants them: with labels that it shifts by itself."""
    of_template = rendered_chats(config) if config.data.content is Content.chat else None
    samples = []
    for batch in batches(config):
        for tokens_T, targets_T in zip(batch["tokens"], batch["targets"], strict=True):
            # The last target is the input of no position; a causal model's logits do not change with it.
            ids = torch.cat([tokens_T, targets_T[-1:].clamp(min=0)])
            labels = torch.cat([torch.tensor([IGNORE_INDEX]), targets_T])
            if (
                of_template
            ):  # our loader says which chat it is; behind the token that opens a document all is the template's
                chat, counts = of_template[tuple(tokens_T[1 : TOKENS // 2].tolist())]
                ids[1 : len(chat) + 1] = chat
                labels = torch.full_like(ids, IGNORE_INDEX)
                labels[1 : len(chat) + 1] = torch.where(counts > 0, chat, IGNORE_INDEX)
            samples.append({"input_ids": ids, "labels": labels})
    return samples


def rendered_chats(config: TrainConfig) -> dict[tuple[int, ...], tuple[Tensor, Tensor]]:
    """Return ids and mask of every chat as transformers renders it, by their beginning."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.data.tokenizer)
    chats = {}
    for line in Path(config.data.path).read_text().splitlines():
        done = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, counts = torch.tensor(done["input_ids"]), torch.tensor(done["assistant_masks"])
        chats[tuple(ids[: TOKENS // 2 - 1].tolist())] = (ids, counts)
    return chats


def configuration(directory: Path, engine: EngineKind, *, world_size: int) -> TrainConfig:
    """Return the checked configuration of a run.

    Raises:
        ConfigError: listing every problem.
    """
    data = DataConfig(source=DataSource.jsonl, sequence_length=TOKENS, root=str(directory / "data"))
    if (directory / "chats.jsonl").exists():
        data.path, data.tokenizer = str(directory / "chats.jsonl"), str(directory / "pretrained")
        data.content, data.packing = Content.chat, Packing.best_fit
        data.document_mask = (directory / PACKED).exists()
    elif (directory / "pairs.jsonl").exists():
        data.path, data.tokenizer = str(directory / "pairs.jsonl"), str(directory / "pretrained")
        data.content, data.packing = Content.preference, Packing.preferences
    elif (directory / "rated.jsonl").exists():
        data.path, data.tokenizer = str(directory / "rated.jsonl"), str(directory / "pretrained")
        data.content, data.packing = Content.rated, Packing.preferences
    else:
        data.path, data.tokenizer = str(directory / "text.jsonl"), "bytes"
    train, task = TrainingConfig(steps=STEPS, global_batch_size=BATCH), TaskConfig()
    if (directory / "loss").exists():
        loss = (directory / "loss").read_text().partition(" ")[0]
        task = TaskConfig(kind=TaskKind.preference.name, loss=PreferenceLoss[loss])
    adapter = AdapterConfig(rank=4, alpha=8) if (directory / ADAPTERS).exists() else None
    config = run_config(directory, "pretrained", engine, data, train, world_size=world_size, task=task, adapter=adapter)
    config.optimizer.lr = 1e-2 if adapter else config.optimizer.lr
    return config
