"""The chunked cross-entropy computes what the plain one computes, and forgets the logits."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bigtrain.models import loss as loss_module
from bigtrain.models.loss import sum_cross_entropy, sum_cross_entropy_of_logits
from bigtrain.models.sizes import CHUNK_LOGITS, FUSED_CHUNK_LOGITS, chunk_tokens, num_padding_rows

VOCAB_SIZE, WIDTH = 61, 12


def example(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(3, 7, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(VOCAB_SIZE, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets_BT = torch.randint(VOCAB_SIZE, (3, 7), generator=generator)
    targets_BT[0, :3] = -100
    targets_BT[2] = -100
    return hidden_BTD, weight_VD, targets_BT


def plain(hidden_BTD, weight_VD, targets_BT):
    return sum_cross_entropy_of_logits(F.linear(hidden_BTD, weight_VD), targets_BT)


def cut(monkeypatch, num_tokens, num_padding=0):
    """Let chunks have so many tokens, and the vocabulary so much padding as it has on a GPU."""
    monkeypatch.setattr(loss_module, "chunk_tokens", lambda *_args, **_kwargs: num_tokens)
    monkeypatch.setattr(loss_module, "num_padding_rows", lambda *_args: num_padding)


def loss_and_gradients(function, *, factor=1.0, dtype=torch.float32, autocast=False):
    hidden, weight, targets = example(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = function(hidden, weight, targets)
    (loss * factor).backward()
    assert (hidden.grad.dtype, weight.grad.dtype) == (dtype, dtype)
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("num_tokens", [1, 4, 21, 100])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({}, 1e-5), ({"factor": 0.25}, 1e-5), ({"dtype": torch.bfloat16}, 2e-2), ({"autocast": True}, 2e-2)],
    ids=["fp32", "scaled", "bf16", "autocast"],
)
def test_loss_and_gradients_are_those_of_the_plain_way(monkeypatch, num_tokens, options, tolerance):
    cut(monkeypatch, num_tokens)
    chunked, expected = (loss_and_gradients(f, **options) for f in (sum_cross_entropy, plain))
    for value, wanted in zip(chunked, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_tokens", [4, 100])
def test_padding_of_the_vocabulary_changes_nothing(monkeypatch, num_tokens):
    results = []
    for num_padding in (0, 67):
        cut(monkeypatch, num_tokens, num_padding)
        results.append(loss_and_gradients(sum_cross_entropy))
    for value, wanted in zip(*results, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)


def test_compiled_it_is_the_same():
    results = [
        loss_and_gradients(partial(sum_cross_entropy, compiled=compiled), dtype=torch.bfloat16)
        for compiled in (False, True)
    ]
    for value, wanted in zip(*results, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-2, atol=1e-2)


def test_gpus_multiply_multiples_of_128_and_chunks_are_powers_of_two():
    assert [(50257 + num_padding_rows(50257, "cuda")) % 128, num_padding_rows(50257, "cpu")] == [0, 0]
    assert num_padding_rows(50304, "cuda") == 0
    for fused, limit in ((False, CHUNK_LOGITS["cuda"]), (True, FUSED_CHUNK_LOGITS)):
        chunk = chunk_tokens(50304, "cuda", fused=fused)
        assert chunk.bit_count() == 1 and limit / 2 < chunk * 50304 <= limit
    assert chunk_tokens(2**30, "cpu", fused=False) == 1


def test_an_improbable_target_has_a_finite_loss_and_gradient():
    hidden = torch.tensor([[[1.0]]], requires_grad=True)
    loss = sum_cross_entropy(hidden, torch.tensor([[0.0], [500.0]]), torch.tensor([[0]]))
    loss.backward()
    assert (loss.item(), hidden.grad.item()) == (500.0, 500.0)


def test_a_second_backward_pass_is_refused_instead_of_wrong():
    hidden, weight, targets = example()
    loss = sum_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, targets = example()
    sum_cross_entropy(hidden, weight.detach(), targets).backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert not sum_cross_entropy(hidden, weight, targets).requires_grad


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


@pytest.mark.parametrize(("function", "is_whole"), [(sum_cross_entropy, False), (plain, True)])
def test_all_logits_never_exist_at_once(monkeypatch, function, is_whole):
    cut(monkeypatch, 4)
    hidden, weight, targets = example()
    with LargestTensor() as largest:
        function(hidden, weight, targets).backward()
    assert (largest.num_elements >= targets.numel() * VOCAB_SIZE) == is_whole
