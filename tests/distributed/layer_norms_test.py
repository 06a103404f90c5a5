"""Norms per layer are those of the whole tensors, whoever holds which part of them."""

from typing import Any

import pytest
import torch

from bigtrain.config import OptimizerKind, TrainConfig
from bigtrain.data.order.cursor import Cursor
from bigtrain.run import trainer
from bigtrain.run.data import open_data
from bigtrain.tasks.base import canonical_name
from bigtrain.telemetry.layer_norms import LayerNorms, layer_of
from bigtrain.testing.parity import whole_parameters
from bigtrain.testing.ranks import run_ranks
from tests.distributed.ranks import small_config, start_engine, with_engine

LR = 1e-2
NUM_STEPS = 3
Norms = list[dict[str, float]]


def train(config: TrainConfig, look: Any) -> None:
    """Train some steps; ``look(engine)`` returns what is called before and after each update."""
    torch.manual_seed(0)
    engine = start_engine(config)
    before, after = look(engine)
    stream = open_data(config)["train"]
    with trainer.train_loader(stream, config, engine, start=Cursor()) as loader:
        for step in range(1, NUM_STEPS + 1):
            trainer.train_step(engine, next(loader), LR, before_update=lambda step=step: before(step))
            after(step)


def measured(config: TrainConfig) -> Norms:
    """Return the norms of every step as a run records them."""
    found: list[LayerNorms] = []

    def look(engine: Any) -> Any:
        norms = LayerNorms(engine, every_steps=1)
        found.append(norms)
        return norms.before_update, norms.after_update

    train(config, look)
    return [{k: v for k, v in r.items() if k != "step"} for r in found[0].merge([{"step": s} for s in (1, 2, 3)])]


def expected(config: TrainConfig) -> Norms:
    """Return the norms of whole gradients, whole weights, and of the differences of whole weights."""
    records: Norms = []

    def look(engine: Any) -> Any:
        old: dict[str, Any] = {}

        def squares(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
            sums: dict[str, float] = {}
            for name, tensor in tensors.items():
                sums[layer_of(name)] = sums.get(layer_of(name), 0.0) + tensor.double().square().sum().item()
            return {layer: total**0.5 for layer, total in sums.items()}

        def weights() -> dict[str, torch.Tensor]:
            return {
                name: torch.from_numpy(array.copy()).double() for name, array in whole_parameters(engine.state).items()
            }

        def before(step: int) -> None:
            old["gradient"] = squares({canonical_name(name): p.grad for name, p in engine.module.named_parameters()})
            old["weights"] = weights()

        def after(step: int) -> None:
            new = weights()
            norm, update = squares(new), squares({name: new[name] - old["weights"][name] for name in new})
            records.append({f"optim/grad_norm/{layer}": value for layer, value in old["gradient"].items()})
            records[-1] |= {f"optim/param_norm/{layer}": value for layer, value in norm.items()}
            records[-1] |= {f"optim/update_ratio/{layer}": update[layer] / norm[layer] for layer in norm}

        return before, after

    train(config, look)
    return records


RULES = ("adamw", "sgd", "muon")


def configured(engine: str, rule: str = "adamw", **fields: Any) -> TrainConfig:
    config = with_engine(small_config(), engine, **fields)
    config.optimizer.kind = OptimizerKind[rule]
    return config


def expected_under(configs: list[TrainConfig]) -> list[Norms]:
    return [expected(config) for config in configs]


@pytest.fixture(scope="module")
def references() -> dict[str, Norms]:
    """The norms under each update rule."""
    found = run_ranks(expected_under, 1, [configured("ddp", rule) for rule in RULES])[0]
    return dict(zip(RULES, found, strict=True))


def assert_equal(found: Norms, reference: Norms, tolerance: float = 1e-5) -> None:
    assert len(found) == NUM_STEPS
    for record, wanted in zip(found, reference, strict=True):
        assert record.keys() == wanted.keys()
        assert record == {key: pytest.approx(value, rel=tolerance) for key, value in wanted.items()}


def measured_under(configs: list[TrainConfig]) -> list[Norms]:
    return [measured(config) for config in configs]


WORLDS = {
    "native": (
        2,
        [("ddp", {}), ("fsdp", {}), ("fsdp", {"offload": "cpu"}), ("ddp", {"rule": "sgd"}), ("fsdp", {"rule": "sgd"})],
    ),
    "hsdp": (4, [("hsdp", {"dp_shard": 2})]),
    "deepspeed": (
        2,
        [
            ("zero1", {}),
            ("zero2", {}),
            ("zero2", {"offload": "cpu"}),
            ("zero3", {}),
            ("zero3", {"offload": "cpu"}),
            ("zero1", {"rule": "sgd"}),
            ("zero1", {"rule": "muon"}),
        ],
    ),
}


@pytest.mark.parametrize("world", WORLDS)
def test_norms_are_equal_under_every_sharding_and_update_rule(references: dict[str, Norms], world: str):
    world_size, engines = WORLDS[world]
    ranks = run_ranks(measured_under, world_size, [configured(engine, **fields) for engine, fields in engines])
    assert all(rank == ranks[0] for rank in ranks)
    for norms, (_, fields) in zip(ranks[0], engines, strict=True):
        assert_equal(norms, references[fields.get("rule", "adamw")])


def without_reduction(config: TrainConfig) -> Norms:
    from bigtrain.telemetry import layer_norms

    layer_norms.all_reduce_sum = lambda tensor: tensor
    return measured(config)


def test_a_missing_reduction_is_noticed(references: dict[str, Norms]):
    found = run_ranks(without_reduction, 2, with_engine(small_config(), "fsdp"))[0]
    with pytest.raises(AssertionError):
        assert_equal(found, references["adamw"])


def test_layers_are_blocks_and_what_is_around_them():
    assert layer_of("blocks.11.attention.qkv.weight") == "blocks.11"
    assert layer_of("embed_tokens.weight") == "embed_tokens"
    assert layer_of("causal_lm.model.layers.3.mlp.experts.7.up.weight") == "causal_lm.model.layers.3"
    assert layer_of("weight") == "weight"
