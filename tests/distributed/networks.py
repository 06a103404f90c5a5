"""Networks and objectives of other tasks, each in about ten lines: what an engine is given is not a language model only."""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bigtrain.data.read.batch import Batch
from bigtrain.tasks.base import IGNORE_INDEX, Field


class Classification:
    """One label a sample; counts the correct ones."""

    sums, counts_by_shape = {"correct": ()}, False

    def __init__(self, **fields):
        self.fields = fields | {"label": Field(torch.int64, (), ignored=IGNORE_INDEX)}

    def count(self, samples):
        return (samples["label"] != IGNORE_INDEX).astype(np.int64)

    def __call__(self, network, *tensors):
        *inputs, labels = tensors
        return summed(network(*inputs), labels)

    def metrics(self, loss, sums):
        return {"correct": float(sums["correct"])}


class TokenTargets(Classification):
    """A label at each of some places: masked tokens, or the tokens of a translation."""

    def __init__(self, *inputs):
        ids = Field(torch.int64, ("T",))
        self.fields = dict.fromkeys(inputs, ids) | {"targets": Field(torch.int64, ("T",), ignored=IGNORE_INDEX)}

    def count(self, samples):
        return (samples["targets"] != IGNORE_INDEX).sum(axis=1)


def summed(logits, targets):
    logits, targets = logits.flatten(0, -2).float(), targets.flatten()
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return torch.stack([loss, (logits.argmax(-1) == targets).sum().detach()])


class Answer(nn.Module):
    """A model of transformers that answers with its logits."""

    def __init__(self, model, *names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors):
        return self.model(**dict(zip(self.names, tensors, strict=True))).logits


class Recurrent(nn.Module):
    """An LSTM that predicts the next token."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.weights = nn.ParameterList(
            [torch.randn(64, 16) / 4, torch.randn(64, 16) / 4, torch.zeros(64), torch.zeros(64)]
        )

    def forward(self, tokens_BT):
        state = tuple(torch.zeros(1, len(tokens_BT), 16) for _ in range(2))
        x_BTD, _, _ = torch.lstm(self.embed(tokens_BT), state, list(self.weights), True, 1, 0.0, False, False, True)
        return self.head(x_BTD)


class Convolutional(nn.Module):
    """Two convolutions, whose gradients are in the order of channels last."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU()
        )
        self.head = nn.Linear(8, 5)

    def forward(self, pixels_BCHW):
        return self.head(self.body(pixels_BCHW.to(memory_format=torch.channels_last)).mean((2, 3)))


class Thin(nn.Module):
    """Two classes by way of one number: tensors with fewer rows than there are ranks, and one without a dimension."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(27, 1), nn.Linear(1, 2)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, pixels_BCHW):
        return self.head(self.body(pixels_BCHW.flatten(1)).tanh() / self.temperature)


def bert():
    from transformers import BertConfig, BertForMaskedLM

    sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=16)
    return language_model(BertForMaskedLM(config))


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=5)
    config = ViTConfig(**sizes, image_size=8, patch_size=4, hidden_dropout_prob=0.0)
    pixels = Classification(pixels=Field(torch.float32, (3, "H", "W")))
    return Answer(ViTForImageClassification(config), "pixel_values"), pixels, dict(pixels=(3, 8, 8), label=())


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0)
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    return (
        Answer(model, "input_ids", "decoder_input_ids"),
        TokenTargets("source", "tokens"),
        dict(source=6, tokens=8, targets=8),
    )


def moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
    return language_model(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts)))


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return language_model(
        MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2))
    )


def language_model(model):
    return Answer(model, "input_ids"), TokenTargets("tokens"), dict(tokens=8, targets=8)


def lstm():
    return Recurrent(), TokenTargets("tokens"), dict(tokens=8, targets=8)


def cnn():
    return Convolutional(), Classification(pixels=Field(torch.float32, (3, "H", "W"))), dict(pixels=(3, 8, 8), label=())


def thin():
    pixels = Classification(pixels=Field(torch.float32, (3, "H", "W")))
    return Thin(), pixels, dict(pixels=(3, 3, 3), label=())


NETWORKS = {"thin": thin, "bert": bert, "vit": vit, "t5": t5, "moe": moe, "mamba": mamba, "lstm": lstm, "cnn": cnn}


def build(name):
    """Return a network with its initial weights, and its objective; the same on every rank."""
    torch.manual_seed(0)
    network, objective, _ = NETWORKS[name]()
    return network, objective


def batch_of(name, num_samples, step):
    """Return a global batch, of which every third target counts for nothing."""
    generator = torch.Generator().manual_seed(step)
    *_, shapes = copy.deepcopy(NETWORKS[name]())
    batch = Batch()
    for field, shape in shapes.items():
        size = (num_samples, *(shape if isinstance(shape, tuple) else (shape,)))
        if field == "pixels":
            batch[field] = torch.randn(size, generator=generator)
        else:
            batch[field] = torch.randint(
                (2 if name == "thin" else 5) if field == "label" else 32, size, generator=generator
            )
        if field in ("label", "targets"):
            batch[field].view(-1)[::3] = IGNORE_INDEX
    return batch
