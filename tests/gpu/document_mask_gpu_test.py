"""FlexAttention, which GPUs use under a document mask, computes what the masked attention of CPUs computes."""

import pytest
import torch

from bigtrain.config import ModelConfig, Positions
from bigtrain.models import build_model
from bigtrain.models.document_mask import attend, build_document_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none"),
]
LENGTHS = [[300, 84, 128], [512], [1, 511]]


def positions() -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS]).cuda()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.bfloat16, 3e-2)])
def test_flex_attention_computes_the_same_with_its_gradients(dtype: torch.dtype, tolerance: float):
    results = []
    for flex in (False, True):
        generator = torch.Generator("cuda").manual_seed(0)
        q, k, v = torch.randn(3, 3, 4, 512, 64, device="cuda", dtype=dtype, generator=generator).unbind()
        leaves = [q, k[:, :2].clone(), v[:, :2].clone()]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        output = attend(*leaves, build_document_mask(positions(), flex=flex), dropout=0.0, gqa=True)
        output.square().sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    for exact, found in zip(*results, strict=True):
        torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)


def test_a_model_trains_with_it_on_a_gpu_as_on_a_cpu():
    shape = {"vocab_size": 97, "num_layers": 2, "hidden_dim": 128, "num_heads": 2, "max_positions": 512}
    model = build_model(ModelConfig(**shape, positions=Positions.rope))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05, generator=generator)
    tokens, targets = torch.randint(97, (2, 3, 512), generator=generator)
    expected = model(tokens, targets, positions().cpu())
    model.cuda()
    loss = model(tokens.cuda(), targets.cuda(), positions())
    loss.backward()
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-3, atol=0)
