"""Masks are functions of the seed and the place in the run, and shares are what they should be."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from bigtrain.config import Head
from bigtrain.models.hf.build import HFCausalLM
from bigtrain.models.hf.heads import HFNetwork
from bigtrain.tasks.base import IGNORE_INDEX
from bigtrain.tasks.masked_lm import sums_of_tokens
from bigtrain.tasks.masking import Masking, number_words

N, T, V, MASK = 500, 64, 1000, 1000
TOKENS = np.random.default_rng(0).integers(0, V, (N, T))
WORDS = np.cumsum(np.random.default_rng(1).random((N, T)) < 0.6, axis=1)
POSITIONS = np.arange(N) + 7


def test_same_samples_are_masked_alike_in_any_cut_and_otherwise_elsewhere():
    masking = Masking(mask_id=MASK, vocab_size=V, seed=3)
    inputs, targets = masking(TOKENS, WORDS, POSITIONS)
    rows = np.random.default_rng(2).permutation(N)
    for part in np.array_split(rows, 7):
        found = masking(TOKENS[part], WORDS[part], POSITIONS[part])
        assert (found[0] == inputs[part]).all() and (found[1] == targets[part]).all()
    others = [
        masking(TOKENS, WORDS, POSITIONS + N),
        Masking(mask_id=MASK, vocab_size=V, seed=4)(TOKENS, WORDS, POSITIONS),
    ]
    for _, other in others:
        same = ((other != IGNORE_INDEX) == (targets != IGNORE_INDEX)).mean()
        assert same < 0.8  # by chance 0.85**2 + 0.15**2 = 0.745


def test_shares():
    masking = Masking(mask_id=MASK, vocab_size=V)
    inputs, targets = masking(TOKENS, np.tile(np.arange(T), (N, 1)), POSITIONS)
    is_target = targets != IGNORE_INDEX
    num = is_target.sum()

    def close(count, share, of):
        return abs(count - share * of) < 5 * np.sqrt(share * (1 - share) * of)

    assert close(num, 0.15, N * T)
    assert (targets[is_target] == TOKENS[is_target]).all() and (inputs[~is_target] == TOKENS[~is_target]).all()
    assert close((inputs[is_target] == MASK).sum(), 0.8, num)
    assert close((inputs[is_target] == TOKENS[is_target]).sum(), 0.1 + 0.1 / V, num)


def test_words_are_whole_and_forbidden_places_stay():
    words = np.where(np.arange(T) % 9 == 0, -1, WORDS)
    _, targets = Masking(mask_id=MASK, vocab_size=V)(TOKENS, words, POSITIONS)
    is_target = targets != IGNORE_INDEX
    assert not is_target[words < 0].any()
    for row in range(N):
        for word in np.unique(words[row][words[row] >= 0]):
            assert len(set(is_target[row][words[row] == word])) == 1


def test_every_sample_with_a_word_has_a_target():
    words = np.full((N, T), -1)
    words[: N // 2, 5] = 0
    _, targets = Masking(mask_id=MASK, vocab_size=V, share=0.0)(TOKENS, words, POSITIONS)
    assert (targets[: N // 2] != IGNORE_INDEX).sum(axis=1).tolist() == [1] * (N // 2)
    assert (targets[N // 2 :] == IGNORE_INDEX).all()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_or_nothing(share):
    masking = Masking(mask_id=MASK, vocab_size=V, share=1.0, masked_share=share, random_share=0.0)
    inputs, targets = masking(TOKENS, WORDS, POSITIONS)
    assert (targets == TOKENS).all() and (inputs == (MASK if share else TOKENS)).all()


def test_words_of_tokens():
    begins = np.array([True, False, True])
    assert number_words(np.array([[0, 1, 1, 2, 0, 1]]), begins).tolist() == [[1, 1, 1, 2, 3, 3]]


class Hidden(nn.Module):
    """A network that does not say what its last layer is."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *inputs):
        return self.network(*inputs)


@pytest.mark.parametrize("kind", ["bert", "t5", "mobilebert"])
def test_only_targets_are_multiplied_by_the_vocabulary(kind):
    torch.manual_seed(0)
    tokens = torch.randint(3, 90, (4, 16))
    targets = tokens.where(torch.rand(4, 16) < 0.3, IGNORE_INDEX)
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2, "vocab_size": 97}
        network = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, dropout_rate=0.0))
        network, inputs = HFNetwork(network, Head.seq2seq_lm), (tokens, torch.full((4,), 16), tokens)
    else:  # MobileBERT multiplies by its weights without a layer
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 97, "hidden_size": 32}
        sizes |= {"intermediate_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        sizes |= {"embedding_size": 16} if kind == "mobilebert" else {}
        config = transformers.AutoConfig.for_model(kind, **sizes)
        network, inputs = HFCausalLM(transformers.AutoModelForMaskedLM.from_config(config), Head.masked_lm), (tokens,)
    rows, found = [], []
    network.output_layer.register_forward_hook(lambda _, given, output: rows.append(output.shape[:-1].numel()))
    for called in (network, Hidden(network)):
        network.zero_grad()
        sums = sums_of_tokens(called, inputs, targets)
        sums[0].backward()
        found.append([sums, *(p.grad for p in network.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    for few, all_of_them in zip(*found, strict=True):
        torch.testing.assert_close(few, all_of_them, rtol=1e-5, atol=1e-6)
    assert rows == ([] if kind == "mobilebert" else [int((targets != IGNORE_INDEX).sum()), 64])
