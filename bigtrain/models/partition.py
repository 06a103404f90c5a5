"""How the matrices of a model are cut among the ranks that share them: integers, which need no process group.

Column-parallel: ``qkv`` by heads, ``gate`` and ``up`` by inner channels, the vocabulary by tokens, all of them rows of the
weight, with their biases. Row-parallel: the columns of ``out`` and ``down``. All else is whole on every rank.
"""

from dataclasses import dataclass

import torch
from torch import nn

from bigtrain.config.layout import share, stage_blocks
from bigtrain.models.exchange import Context, Exchange, ExpertExchange
from bigtrain.models.moe import MixtureOfExperts, Router
from bigtrain.models.transformer import Attention, FeedForward, RowLinear, Transformer, Vocabulary


@dataclass(frozen=True, slots=True)
class Cut:
    """What a rank holds of a parameter: some indices of one dimension."""

    dim: int
    size: int  # of the whole parameter in that dimension
    runs: tuple[range, ...]  # indices of the whole, which lie here one run after the other

    @property
    def length(self) -> int:
        """Indices that this rank holds."""
        return sum(map(len, self.runs))

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the whole parameter, from that of a rank's part."""
        return (*shape[: self.dim], self.size, *shape[self.dim + 1 :])


def cuts(model: Transformer, size: int, rank: int) -> dict[str, Cut]:
    """Return what rank ``rank`` of ``size`` holds of each parameter of a whole model that is cut."""
    found: dict[str, Cut] = {}
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            heads, first, runs = (module.num_heads, module.num_kv_heads, module.num_kv_heads), 0, []
            for number in heads:
                own = share(number, size, rank)
                runs.append(range(first + own.start * module.head_dim, first + own.stop * module.head_dim))
                first += number * module.head_dim
            found |= dict.fromkeys((f"{name}.qkv.weight", f"{name}.qkv.bias"), Cut(0, first, tuple(runs)))
            found[f"{name}.out.weight"] = Cut(1, module.out.in_features, (runs[0],))
        elif isinstance(module, FeedForward):
            inner = module.down.in_features
            rows = Cut(0, inner, (share(inner, size, rank),))
            found |= {f"{name}.{layer}.{p}": rows for layer in ("gate", "up") for p in ("weight", "bias")}
            found[f"{name}.down.weight"] = Cut(1, inner, rows.runs)
        elif isinstance(module, Vocabulary):
            found[f"{name}.weight"] = Cut(0, module.vocab_size, (share(module.vocab_size, size, rank),))
    return {name: found[name] for name, _ in model.named_parameters() if name in found}


def cut(model: Transformer, exchange: Exchange) -> None:
    """Cut a model on the meta device down to what a rank holds, in place, and give its modules the exchange."""
    model.cuts = cuts(model, exchange.size, exchange.rank)
    for name, part in model.cuts.items():
        owner, _, attribute = name.rpartition(".")
        whole = model.get_parameter(name)
        shape = (*whole.shape[: part.dim], part.length, *whole.shape[part.dim + 1 :])
        parameter = nn.Parameter(torch.empty(shape, device=whole.device), whole.requires_grad)
        setattr(model.get_submodule(owner), attribute, parameter)
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            module.num_heads = len(share(module.num_heads, exchange.size, exchange.rank))
            module.num_kv_heads = len(share(module.num_kv_heads, exchange.size, exchange.rank))
        if isinstance(module, Vocabulary):
            module.first_row = model.cuts[f"{name}.weight"].runs[0].start
        if isinstance(module, Attention | FeedForward | RowLinear | Vocabulary | Router | Transformer):
            module.exchange = exchange


def take_stage(model: Transformer, number: int, num_stages: int) -> None:
    """Leave of a model what a stage of a pipeline holds, in place; names stay those of the whole.

    Tied embeddings are held by the first stage and the last.
    """
    is_last, is_tied = number == num_stages - 1, model.output is None
    blocks = nn.ModuleList()
    for place in stage_blocks(len(model.blocks), number, num_stages):
        blocks.add_module(str(place), model.blocks[place])
    model.blocks = blocks
    if number > 0:
        model.embed_positions = None
        if not (is_last and is_tied):
            model.embed_tokens = None
    if not is_last:
        model.final_norm = model.output = None


def share_experts(model: Transformer, exchange: ExpertExchange) -> None:
    """Leave of a model on the meta device the experts of a rank, in place, and give its mixtures the exchange."""
    for name, module in model.named_modules():
        if not isinstance(module, MixtureOfExperts):
            continue
        module.exchange = exchange
        for layer, whole in list(module.experts.named_parameters()):
            own = share(len(whole), exchange.size, exchange.rank)
            parameter = nn.Parameter(torch.empty_like(whole[own.start : own.stop]), whole.requires_grad)
            setattr(module.experts, layer, parameter)
            model.cuts[f"{name}.experts.{layer}"] = Cut(0, len(whole), (own,))


def share_sequences(model: Transformer, context: Context) -> None:
    """Let a model, whose parameters stay as they are, compute some of the tokens of each sequence."""
    for module in model.modules():
        if isinstance(module, Attention | Transformer):
            module.context = context


def cuts_of(module: nn.Module) -> dict[str, Cut]:
    """Return how the parameters of the network in a wrapped module are cut, by name; none if they are whole."""
    return next((found for inner in module.modules() if (found := getattr(inner, "cuts", None)) is not None), {})
