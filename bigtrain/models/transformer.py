"""The native decoder Transformer: GPT-2/GPT-3 and Llama from one description.

GPT (Radford et al. 2019, Brown et al. 2020): learned positions, LayerNorm before each sub-layer, GELU with the tanh
approximation, biases, tied embeddings. Llama (Touvron et al. 2023, Grattafiori et al. 2024): rotary positions, RMSNorm,
SwiGLU, grouped-query attention, no biases. Parameters are uninitialised (see ``init.py``); there are no buffers, so the
model can be built on the meta device.

Shape suffixes: B batch, T tokens, S tokens attended to, D hidden width, H query heads, G key/value heads, K head width,
V vocabulary, X heads of any kind.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.config import Activation, ModelConfig, Norm, Positions
from bigtrain.models.document_mask import attend, build_document_mask
from bigtrain.models.exchange import ALONE, WHOLE
from bigtrain.models.loss import Place, sum_cross_entropy
from bigtrain.models.moe import MixtureOfExperts
from bigtrain.models.rope import rope_table, rotate
from bigtrain.tasks.base import IGNORE_INDEX

if TYPE_CHECKING:
    from bigtrain.models.partition import Cut


class Linear(nn.Linear):
    """``nn.Linear`` without torch's initialisation."""

    fused_rows: tuple[int, ...] = ()  # rows of each matrix, where several are stacked for a single product

    def reset_parameters(self) -> None: ...


class RowLinear(Linear):
    """A linear layer whose inputs, the columns of its weight, ranks may share."""

    exchange = ALONE

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the sum of what the ranks' columns give, and once, after that, the bias."""
        if self.exchange.size == 1:
            return super().forward(x_BTD)
        y_BTD = self.exchange.collect(F.linear(x_BTD, self.weight))
        return y_BTD if self.bias is None else y_BTD + self.bias


class Embedding(nn.Embedding):
    """``nn.Embedding`` without torch's initialisation."""

    def reset_parameters(self) -> None: ...


class Vocabulary(nn.Module):
    """Token embedding and output projection in one module.

    Both go through ``forward``: tied embeddings are then one parameter of one module, which survives ``to_empty`` and
    sharding, and engines that gather parameters around a module's forward (ZeRO-3) see both uses.
    """

    compiles_loss = False  # whether the loss, but for its matmuls, is compiled
    exchange = ALONE
    first_row = 0  # of the whole vocabulary, that this rank holds

    def __init__(self, vocab_size: int, hidden_dim: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_dim))

    def forward(self, x: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Return vectors for tokens ``(B, T)``; for hidden states ``(B, T, D)`` logits or, with targets, their loss."""
        if self.exchange.size > 1:
            return self._share(x, targets_BT)
        if not x.is_floating_point():
            return F.embedding(x, self.weight)
        if targets_BT is None:
            return F.linear(x, self.weight)
        return sum_cross_entropy(x, self.weight, targets_BT, compiled=self.compiles_loss)

    def _share(self, x: Tensor, targets_BT: Tensor | None) -> Tensor:
        """Do the same with this rank's rows of the weight and, of vectors, its part of the tokens."""
        if not x.is_floating_point():
            rows_BT = x - self.first_row
            is_here_BT = (rows_BT >= 0) & (rows_BT < len(self.weight))
            vectors_BTD = F.embedding(rows_BT.where(is_here_BT, 0), self.weight)
            return self.exchange.collect(vectors_BTD * is_here_BT[..., None])
        x = self.exchange.spread(x)
        if targets_BT is not None:
            place = Place(self.exchange, self.first_row, self.vocab_size)
            return sum_cross_entropy(x, self.weight, targets_BT, place=place)
        logits_BTR = F.linear(x, self.weight)
        logits_BTV = logits_BTR.new_zeros(*logits_BTR.shape[:-1], self.vocab_size)
        logits_BTV[..., self.first_row : self.first_row + len(self.weight)] = logits_BTR
        return self.exchange.total(logits_BTV)


class LayerCache:
    """Keys and values of one layer, in buffers that are allocated, like the first keys, at the first append."""

    def __init__(self, capacity_tokens: int):
        self.capacity_tokens = capacity_tokens
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens and return views of all keys and values so far, ``(B, G, S, K)``."""
        batch, heads, num_new, width = k_BGTK.shape
        if self._keys is None:
            self._keys = k_BGTK.new_empty(batch, heads, self.capacity_tokens, width)
            self._values = v_BGTK.new_empty(batch, heads, self.capacity_tokens, width)
        end = self.length + num_new
        assert end <= self.capacity_tokens, f"cache of {self.capacity_tokens} tokens cannot take {end}"
        self._keys[:, :, self.length : end] = k_BGTK
        self._values[:, :, self.length : end] = v_BGTK
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads; ``qkv`` holds the rows of q, then k, then v."""

    exchange = ALONE
    context = WHOLE

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.head_dim = config.head_dim or config.hidden_dim // config.num_heads
        self.dropout = config.dropout
        width = self.num_heads * self.head_dim
        self.qkv = Linear(config.hidden_dim, width + 2 * self.num_kv_heads * self.head_dim, bias=config.bias)
        self.qkv.fused_rows = (width, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.head_dim)
        self.out = RowLinear(width, config.hidden_dim, bias=config.bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(
        self, x_BTD: Tensor, rope: Tensor | None = None, cache: LayerCache | None = None, mask: Any = None
    ) -> Tensor:
        """Return the attention output ``(B, T, D)``; with a cache the new tokens follow the stored ones."""
        qkv_BTXK = self.qkv(self.exchange.spread(x_BTD)).unflatten(-1, (-1, self.head_dim))
        q_BTHK, k_BTGK, v_BTGK = qkv_BTXK.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        if self.q_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        if rope is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, rope), rotate(k_BTGK, rope)
        q_BTHK, k_BSGK, v_BSGK = self.context.to_attention(q_BTHK, k_BTGK, v_BTGK)
        q_BHTK, k_BGSK, v_BGSK = (t.transpose(1, 2) for t in (q_BTHK, k_BSGK, v_BSGK))
        dropout, gqa = self.dropout if self.training else 0.0, self.num_kv_heads != self.num_heads
        if cache is not None:
            mask = _mask_after_cached(q_BHTK, cache.length)
            k_BGSK, v_BGSK = cache.append(k_BGSK, v_BGSK)
        y_BHTK = attend(q_BHTK, k_BGSK, v_BGSK, mask, dropout=dropout, gqa=gqa)
        y_BTD = self.out(self.context.from_attention(y_BHTK.transpose(1, 2)).flatten(2))
        return F.dropout(y_BTD, self.dropout, self.training)


class FeedForward(nn.Module):
    """Position-wise network: ``down(gelu(up(x)))`` or ``down(silu(gate(x)) * up(x))``."""

    exchange = ALONE

    def __init__(self, config: ModelConfig, ffn_dim: int | None = None):
        super().__init__()
        ffn_dim = ffn_dim or config.ffn_dim or 4 * config.hidden_dim
        gated = config.activation is Activation.swiglu
        self.gate = Linear(config.hidden_dim, ffn_dim, bias=config.bias) if gated else None
        self.up = Linear(config.hidden_dim, ffn_dim, bias=config.bias)
        self.down = RowLinear(ffn_dim, config.hidden_dim, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = self.exchange.spread(x_BTD)
        up = self.up(x_BTD)
        inner = F.gelu(up, approximate="tanh") if self.gate is None else F.silu(self.gate(x_BTD)) * up
        return F.dropout(self.down(inner), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, or a mixture of experts, each added to the residual stream."""

    def __init__(self, config: ModelConfig, *, is_mixture: bool = False):
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = Attention(config)
        self.feed_forward_norm = build_norm(config)
        self.feed_forward = build_mixture(config) if is_mixture else FeedForward(config)

    def forward(
        self,
        x_BTD: Tensor,
        rope: Tensor | None = None,
        cache: LayerCache | None = None,
        mask: Any = None,
        num_targets_B: Tensor | None = None,
    ) -> Tensor:
        """Return the residual stream ``(B, T, D)`` after this block; ``rope`` is ``(T, K)`` or ``(B, T, K)``.

        A mixture is told the number of targets of each sequence in training.
        """
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope, cache, mask)
        normed = self.feed_forward_norm(x_BTD)
        if num_targets_B is not None and isinstance(self.feed_forward, MixtureOfExperts):
            return x_BTD + self.feed_forward(normed, num_targets_B)
        return x_BTD + self.feed_forward(normed)


class Transformer(nn.Module):
    """Decoder-only language model; engines shard, checkpoint and compile its ``blocks`` one by one."""

    exchange = ALONE
    context = WHOLE

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.cuts: dict[str, Cut] = {}  # what this rank holds of parameters that ranks share
        self.vocab_size = config.vocab_size
        self.max_positions = config.max_positions
        learned = config.positions is Positions.learned
        self.embed_tokens = Vocabulary(config.vocab_size, config.hidden_dim)
        self.embed_positions = Embedding(config.max_positions, config.hidden_dim) if learned else None
        num_dense = config.moe.dense_layers if config.moe else config.num_layers
        self.blocks = nn.ModuleList(Block(config, is_mixture=i >= num_dense) for i in range(config.num_layers))
        self.final_norm = build_norm(config)
        self.output = None if config.tie_embeddings else Vocabulary(config.vocab_size, config.hidden_dim)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        *,
        cache: list[LayerCache] | None = None,
        hidden_BTD: Tensor | None = None,
    ) -> Tensor:
        """Return logits ``(B, T, V)``, or the cross-entropy summed over targets in nats, an fp32 scalar.

        A stage of a pipeline is given ``hidden_BTD``, what the one before it returns in place of these.

        Of ranks that share sequences, each is given whole ones and returns the loss of its own targets.
        Targets of -100 do not count. Attention stays within documents, in each of which positions count from 0; by
        default a row is one. ``cache``, for generation, is of the tokens before; the new ones are appended.
        """
        start = 0 if cache is None else cache[0].length
        end = start + tokens_BT.shape[1]
        assert end <= self.max_positions, f"{end} tokens are more than max_positions={self.max_positions}"
        assert positions_BT is None or cache is None, "generation continues one document"
        mask = self._mask(tokens_BT, positions_BT)
        positions = torch.arange(start, end, device=tokens_BT.device) if positions_BT is None else positions_BT
        tokens_BT, positions = self.context.own(tokens_BT), self.context.own(positions)
        rope = None if self.config.positions is Positions.learned else rope_table(self.config, positions)
        x_BTD = self._embed(tokens_BT, positions) if hidden_BTD is None else hidden_BTD
        more = () if self.config.moe is None or targets_BT is None else ((targets_BT != IGNORE_INDEX).sum(1),)
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, rope, None if cache is None else cache[i], mask, *more)
        if self.final_norm is None:
            return x_BTD
        output = self.embed_tokens if self.output is None else self.output
        if targets_BT is None:
            return self.context.whole(output(self.final_norm(x_BTD)))
        return output(self.final_norm(x_BTD), self.context.own(targets_BT))

    def _embed(self, tokens_BT: Tensor, positions: Tensor) -> Tensor:
        x_BTD = self.embed_tokens(tokens_BT)
        if self.embed_positions is not None:
            x_BTD = x_BTD + self.embed_positions(self.exchange.own(positions))
        return F.dropout(x_BTD, self.config.dropout, self.training)

    def _mask(self, tokens_BT: Tensor, positions_BT: Tensor | None) -> Any:
        """Return the mask of this rank's queries; None where the causal one of whole sequences will do."""
        rows = self.context.mask_rows(tokens_BT.shape[1], tokens_BT.device)
        if positions_BT is None and rows is None:
            return None
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        flex = tokens_BT.is_cuda and not self.config.dropout
        return build_document_mask(positions_BT, flex=flex, rows=rows)

    def new_cache(self, capacity_tokens: int) -> list[LayerCache]:
        return [LayerCache(capacity_tokens) for _ in self.blocks]


def build_mixture(config: ModelConfig) -> MixtureOfExperts:
    moe = config.moe
    assert moe is not None
    shared = FeedForward(config, moe.num_shared_experts * moe.expert_dim) if moe.num_shared_experts else None
    return MixtureOfExperts(config.hidden_dim, moe, config.dropout, shared)


def build_norm(config: ModelConfig) -> nn.Module:
    """Return a normalisation layer; torch computes its statistics in fp32 whatever the input's dtype."""
    if config.norm is Norm.rmsnorm:
        return nn.RMSNorm(config.hidden_dim, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_dim, eps=config.norm_eps, bias=config.bias)


def _mask_after_cached(q_BHTK: Tensor, num_cached: int) -> Tensor | None:
    """Return the causal mask of tokens after cached ones; None if there are none: attention is causal by itself."""
    if num_cached == 0:
        return None
    num_new = q_BHTK.shape[2]
    ones_TS = torch.ones(num_new, num_cached + num_new, dtype=torch.bool, device=q_BHTK.device)
    return ones_TS.tril(diagonal=num_cached)
