"""The step on a GPU: the host never waits in it, the fast loss is the plain one, fp8 trains."""

import dataclasses
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bigtrain.config import ActivationCheckpointing, EngineKind, Positions, Precision, TrainConfig
from bigtrain.data.order.cursor import Cursor
from bigtrain.models.loss import sum_cross_entropy, sum_cross_entropy_of_logits
from bigtrain.run.data import open_data, train_loader
from bigtrain.run.step import train_step
from bigtrain.testing.parity import Case, compare, compute
from bigtrain.testing.ranks import run_ranks
from tests.distributed.parity_test import gate_config
from tests.distributed.ranks import start_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none"),
]
WARM_UP_STEPS = 4


def configured(engine: str, **fields) -> TrainConfig:
    config = gate_config("bf16", kind=EngineKind[engine], **fields)
    config.train.micro_batch_size = 2
    return config


def steps_without_waiting(config: TrainConfig, waits: bool) -> None:
    """Train some steps, the last ones in a mode in which torch raises where the host waits for the device."""
    engine = start_engine(config)
    with train_loader(open_data(config)["train"], config, engine, start=Cursor()) as loader:
        for batch in loader:
            if batch.step == WARM_UP_STEPS:  # compilation, DDP's buckets, FSDP's first pass
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            loss, _ = train_step(engine, batch, 1e-3)
            if batch.step == WARM_UP_STEPS + 2:
                break
        if waits:
            loss.item()
    torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(loss.item())


@pytest.mark.parametrize(
    ("engine", "fields"),
    [
        ("ddp", {}),
        ("fsdp", {"compile": True}),
        ("fsdp", {"compile": True, "activation_checkpointing": ActivationCheckpointing.selective}),
    ],
    ids=str,
)
def test_the_host_never_waits_within_a_step(engine: str, fields: dict):
    run_ranks(steps_without_waiting, 1, configured(engine, **fields), False, timeout_seconds=280)


def test_a_wait_would_be_noticed():
    with pytest.raises(Exception, match="synchroniz"):
        run_ranks(steps_without_waiting, 1, configured("ddp"), True, timeout_seconds=280)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_the_loss_with_a_padded_vocabulary_is_the_plain_one(dtype: torch.dtype, tolerance: float, compiled: bool):
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"device": "cuda", "generator": generator}
    hidden, weight = torch.randn(2, 300, 64, **options).to(dtype), torch.randn(50257, 64, **options).to(dtype)
    targets = torch.randint(50257, (2, 300), **options)
    targets[0, :7] = -100
    results = []
    plain = lambda h, w, t: sum_cross_entropy_of_logits(F.linear(h, w), t)  # noqa: E731
    for function in (plain, partial(sum_cross_entropy, compiled=compiled)):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        loss = function(*leaves, targets)
        loss.backward()
        results.append([loss, *(leaf.grad for leaf in leaves)])
    for value, wanted in zip(*results, strict=True):
        torch.testing.assert_close(value, wanted, rtol=tolerance, atol=tolerance)


def test_compiled_documents_and_checkpoints_compute_what_eager_ones_do():
    config = gate_config()
    config.data.document_mask, config.model.positions = True, Positions.rope
    case = Case(EngineKind.fsdp, 1, 4)
    reference = compute(config, case)
    for kind in ActivationCheckpointing:
        engine = dataclasses.replace(config.engine, compile=True, activation_checkpointing=kind)
        difference = compare(compute(dataclasses.replace(config, engine=engine), case), reference)
        print(kind, difference)
        assert difference.loss <= 1e-4


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_fp8_trains_like_bf16(engine: str):
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with fp8")
    losses = []
    for precision in (Precision.bf16, Precision.fp8):
        config = gate_config(precision.name, compile=True)
        config.model.hidden_dim, config.model.num_heads = 4096, 32
        config.model.head_dim, config.model.ffn_dim, config.model.num_layers = 128, 8192, 2
        config.data.sequence_length = 256
        losses.append(compute(config, Case(EngineKind[engine], 1, 8), num_steps=5).losses)
    for bf16, fp8 in zip(*losses, strict=True):
        assert fp8 == pytest.approx(bf16, rel=2e-2)
    assert losses[0] != losses[1]
