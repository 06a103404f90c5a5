"""Probes of what a model of transformers really computes, whatever its configuration and class say.

A dry run takes a model with parameters on the meta device: what depends on them is computed as shapes only, everything
else (positions, masks, tables) for real. A model of any size runs in a fraction of a second and without memory, and an
index beyond a table of positions is still found.

Shape suffixes: B batch, T tokens, V vocabulary.
"""

import bisect
import contextlib
import copy
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bigtrain.config import ModelConfig, ModelKind
from bigtrain.errors import ConfigError, first_line
from bigtrain.models.hf.build import HFCausalLM, build_hf_model, read_hf_config
from bigtrain.models.hf.heads import HFNetwork

_MOST_ELEMENTS = 2**28  # that are computed for real
SHORT = 8  # tokens of a dry run that is not about the length of samples
_LENGTHS = re.compile(r"position|seq|ctx|context")  # in names of what may be a largest length
_DIRECTIONS = re.compile(r"decoder$|causal|bidirectional|attn_type")
LONG_ENOUGH = 32  # tokens of a sample in which a model that looks ahead is seen to do so


class HiddenBackwardError(Exception):
    """Parameters get their gradients within a backward pass of the model's own; the message names its function."""


class _DryRun(TorchDispatchMode):
    """Computes on the meta device what depends on meta tensors, and for real what does not, unless it is large."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[Tensor] = set()  # parameters that take part

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        tensors = list(_tensors((args, kwargs)))
        self.used.update(tensor for tensor in tensors if isinstance(tensor, nn.Parameter))
        if not any(tensor.is_meta for tensor in tensors) and _num_elements(args) <= _MOST_ELEMENTS:
            on_cpu = functools.partial(
                tree_map, lambda leaf: torch.device("cpu") if leaf == torch.device("meta") else leaf
            )
            with contextlib.suppress(NotImplementedError):  # written for another device than the CPU
                return func(*on_cpu(args), **on_cpu(kwargs))
        if name == "aten::_local_scalar_dense":  # the host asks for a number that is not known
            return torch.ones((), dtype=tensors[0].dtype).item()
        if name == "aten::_grouped_mm":  # experts; its meta kernel insists on bf16
            return args[0].new_empty(*args[0].shape[:-1], args[1].shape[-1])
        if name.endswith("_") and not tensors[0].is_meta:  # a real buffer keeps its values
            return tensors[0]
        _check_indices(name, args)
        return func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs))


def _num_elements(args: Sequence[Any]) -> int:
    """Return how many numbers a function of a size, or an elementwise one of tensors, makes: masks grow as squares."""
    sizes = [arg.shape if isinstance(arg, Tensor) else arg for arg in args[:2]]
    sizes = [size for size in sizes if isinstance(size, list | tuple) and all(type(n) is int for n in size)]
    with contextlib.suppress(RuntimeError, ValueError):  # neither
        return math.prod(torch.broadcast_shapes(*sizes))
    return 0


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _on_meta(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("meta")
    if isinstance(leaf, Tensor) and not leaf.is_meta:
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
    return leaf


def _check_indices(name: str, args: tuple[Any, ...]) -> None:
    """Compare real indices with the size of what they select from, which meta kernels do not."""
    pairs: list[tuple[Any, int]] = []
    if name == "aten::embedding":
        pairs = [(args[1], 0)]
    elif name in ("aten::index_select", "aten::gather"):
        pairs = [(args[2], args[1])]
    elif name == "aten::index":
        pairs = [(index, dim) for dim, index in enumerate(args[1])]
    for index, dim in pairs:
        if index is None or index.is_meta or index.dtype == torch.bool or not index.numel():
            continue
        if index.max() >= args[0].shape[dim] or index.min() < -args[0].shape[dim]:
            raise IndexError(f"index {int(index.max())} of {args[0].shape[dim]}")


def _dry_run(model: HFNetwork, length: int, run: _DryRun | None = None) -> Tensor:
    """Return the logits of one sample on the meta device."""
    tensors = model.example(length)
    with run or _DryRun(), torch.enable_grad():
        return next(_tensors(model.train()(*tensors)))


def unreached_parameters(model: HFNetwork, length: int | None = None) -> list[str]:
    """Return the parameters without a path to the loss; ``length`` is that of the samples, if they have one.

    NotImplementedError: control flow depends on numbers. HiddenBackwardError: the graph does not tell, because a
    function of the model calls ``backward`` by itself (reversible layers, re-entrant checkpoints).
    """
    for tokens in (SHORT, length or SHORT):  # some have positions for samples of one length only
        run, copied = _DryRun(), copy.deepcopy(model)  # some keep tables for the longest sample that they have seen
        try:
            logits_BTV = _dry_run(copied, tokens, run)
            break
        except Exception as error:
            problem = error
    else:
        raise NotImplementedError(first_line(problem)) from problem
    reached, nodes, seen = set(), [logits_BTV.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            reached.add(getattr(node, "variable", None))
            nodes += [following for following, _ in node.next_functions]
    unreached = {name: p for name, p in copied.named_parameters() if p.requires_grad and p not in reached}
    own = {node.name() for node in seen if isinstance(node, torch.autograd.function.BackwardCFunction)}
    if own and not run.used.isdisjoint(unreached.values()):
        raise HiddenBackwardError(", ".join(sorted(own)))
    return list(unreached)


def outermost(model: nn.Module, names: list[str]) -> list[str]:
    """Return names of parameters in short: modules of which all are among them, numbers as ``*``."""

    def found(module: nn.Module, prefix: str) -> Iterator[str]:
        of_module = {f"{prefix}{name}" for name, _ in module.named_parameters()}
        if of_module and of_module <= wanted:
            yield prefix.removesuffix(".")
        elif of_module & wanted:
            yield from (prefix + name for name, _ in module.named_parameters(recurse=False) if prefix + name in wanted)
            for name, child in module.named_children():
                yield from found(child, f"{prefix}{name}.")

    wanted = set(names)
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in found(model, "")))


def require_positions(config: ModelConfig, length: int | None) -> None:
    """Raise a ConfigError if a model of transformers has no positions for samples of ``length`` tokens, if they have any."""
    if length is None or config.kind is not ModelKind.hf:
        return
    settings = read_hf_config(config.name).get_text_config().to_dict().items()
    # Some position tables have a few rows that are no positions.
    limits = (value for key, value in settings if _LENGTHS.search(key) and type(value) is int)
    if not any(SHORT <= value < length + SHORT for value in limits):
        return
    with torch.device("meta"):
        model = build_hf_model(config)
    if (longest := longest_sample(model, length)) < length:
        raise ConfigError(
            f"data.sequence_length={length} is longer than the {longest} positions that model.name={config.name} has; "
            f"use data.sequence_length<={longest}, or a model with more"
        )


def direction_settings(model: nn.Module) -> str:
    """Return what the configuration of an HFCausalLM, wrapped or not, says about its direction."""
    causal_lm = next(module.causal_lm for module in model.modules() if isinstance(module, HFCausalLM))
    settings = causal_lm.config.get_text_config().to_dict().items()
    found = [f"{key}={json.dumps(value)}" for key, value in settings if _DIRECTIONS.search(key)]
    return ", ".join(found) or "no setting of its direction"


def longest_sample(model: HFNetwork, length: int) -> int:
    """Return ``length``, or the most tokens for which a model of transformers on the meta device has positions if fewer."""

    def fits(tokens: int) -> bool:
        try:
            _dry_run(copy.deepcopy(model), tokens)
        except Exception:  # an index, a broadcast, a check of the model's own
            return False
        return True

    if fits(length) or not fits(short := min(SHORT, length)):  # fails for another reason
        return length
    return short + bisect.bisect_left(range(short + 1, length), True, key=lambda tokens: not fits(tokens))


@torch.no_grad()
def leak(
    logits_of: Callable[[Tensor], Tensor], vocab_size: int, length: int, device: torch.device, *, from_later: bool
) -> float:
    """Return how much the logits of one half of a sample change with the tokens of the other, relative to that one's.

    ``logits_of`` turns ``(B, T)`` tokens into ``(B, T, V)`` logits, without dropout; the later half changes, or the
    earlier.
    """
    halves = slice(length // 2), slice(length // 2, None)
    changed, other = halves[::-1] if from_later else halves
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(vocab_size, (1, length), generator=generator).repeat(2, 1)
    # Each of the two samples repeats one token there, so that averages move as far.
    tokens_BT[:, changed] = torch.randperm(vocab_size, generator=generator)[:2, None]
    with torch.compiler.set_stance("force_eager"):  # compiled code is for training's sample length
        logits_BTV = logits_of(tokens_BT.to(device)).float()
    change_T = (logits_BTV[1] - logits_BTV[0]).pow(2).mean(-1).sqrt()
    return (change_T[other].max() / change_T[changed].max()).item()


def two_documents(length: int, device: torch.device) -> Tensor:
    """Return the positions ``(2, T)`` of samples whose halves are documents of their own."""
    first = length // 2
    return torch.cat([torch.arange(first), torch.arange(length - first)]).repeat(2, 1).to(device)
