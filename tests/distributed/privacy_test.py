"""A private run: gradients of samples clipped as Opacus clips them, the same noise everywhere, and an account that holds."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from bigtrain.cli.hydra_cli import read_run
from bigtrain.config import EngineKind, PrivacyConfig
from bigtrain.distributed.collectives import init_process_group
from bigtrain.engine.build import build_engine
from bigtrain.engine.state import initialise
from bigtrain.errors import ConfigError
from bigtrain.models.construction import parameters_on_meta
from bigtrain.models.init import Given
from bigtrain.models.small import CNN
from bigtrain.processes import RankInfo
from bigtrain.run.privacy import Account
from bigtrain.testing.parity import Case, compare, configure, trace
from bigtrain.testing.ranks import run_ranks
from tests.distributed.launches import SMALL, events, fork, metrics
from tests.distributed.networks import batch_of, build
from tests.distributed.networks_test import share_of
from tests.distributed.ranks import small_config

PRIVATE = ["privacy.max_grad_norm=0.5", "bad_numbers.max_rollbacks=0", "engine=ddp"]
CLIP = 0.05
SAMPLES = 8


def private(config, **settings):
    config.privacy = PrivacyConfig(**{"max_grad_norm": 0.5, "noise_multiplier": 0.8, **settings})
    config.bad_numbers.max_rollbacks = 0
    return config


def traces(configs):
    return [trace(config) for config in configs]


def test_worlds_and_micro_batches_agree_and_every_part_has_an_effect():
    cases = [Case(EngineKind.ddp, world, micro) for world, micro in ((1, 4), (1, 1), (2, 2), (4, 1))]
    config = private(small_config())
    changes = {"max_grad_norm": 0.1, "noise_multiplier": 0.0}
    others = [private(small_config(), **{name: value}) for name, value in changes.items()]
    others.append(dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1)))
    reference, alone, *changed = run_ranks(
        traces, 1, [*(configure(config, c) for c in cases[:2]), *others], timeout_seconds=200
    )[0]
    found = [(cases[1], alone)]
    found += [
        (case, run_ranks(traces, case.world_size, [configure(config, case)], timeout_seconds=200)[0][0])
        for case in cases[2:]
    ]
    for case, trajectory in found:
        difference = compare(trajectory, reference)
        print(case, difference)
        assert max(difference.loss, difference.grad_norm) <= 1e-5, case
    for other in changed:
        difference = compare(other, reference)
        assert max(difference.loss, difference.grad_norm) > 1e-3, difference


def network_of():
    """Return a small convolutional network, whose layout of memory Opacus understands."""
    torch.manual_seed(0)
    return CNN(num_channels=3, image_size=8, channels=[8, 8], dense_dim=8, num_outputs=5, group_norm=True).build()


def on_meta():
    with parameters_on_meta():
        return network_of()


def gradients(noise_multiplier):
    """Return the gradient of a step by name."""
    network, (_, objective) = network_of(), build("cnn")
    config = private(small_config(), max_grad_norm=CLIP, noise_multiplier=noise_multiplier)
    config.train.global_batch_size = SAMPLES
    info, device = RankInfo.from_env(), torch.device("cpu")
    if not torch.distributed.is_initialized():
        init_process_group(info, device, timeout_seconds=60)
    engine = build_engine(config, on_meta, info=info, device=device, objective=objective)
    initialise(engine.state, {key: Given(p.detach().clone()) for key, p in network.named_parameters()}, num_threads=1)
    batch = batch_of("cnn", SAMPLES, 0)
    mine = share_of(batch, engine.mesh, objective).split(2)
    engine.forward_backward(mine, num_targets=1)
    engine.begin_update(5)
    return {name: p.grad.numpy() for name, p in engine.module.network.named_parameters()}


def gradients_of_opacus():
    """Return the gradient that Opacus steps by, without noise."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    network = network_of()
    batch, module = batch_of("cnn", SAMPLES, 0), GradSampleModule(network)
    optimizer = DPOptimizer(
        torch.optim.SGD(network.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=CLIP,
        expected_batch_size=SAMPLES,
    )
    losses = F.cross_entropy(module(batch["pixels"]), batch["label"], ignore_index=-100, reduction="none")
    losses.mean().backward()
    optimizer.pre_step()
    return {name: p.grad for name, p in network.named_parameters()}


def test_the_gradient_is_that_of_opacus_and_noise_is_the_same_at_every_world_size():
    pytest.importorskip("opacus")
    without, noisy = (
        {world: run_ranks(gradients, world, noise, timeout_seconds=100)[0] for world in (1, 2, 3)}
        for noise in (0.0, 1.5)
    )
    for found in (*without.values(), *noisy.values()):
        found.update({name: torch.from_numpy(gradient) for name, gradient in found.items()})
    expected = gradients_of_opacus()
    for world in (1, 2, 3):
        for name, gradient in expected.items():
            assert (without[world][name] - gradient).norm() <= 1e-5 * gradient.norm(), (world, name)
            noise = noisy[world][name] - without[world][name]
            assert torch.allclose(noise, noisy[1][name] - without[1][name], atol=1e-7), (world, name)
    noise = torch.cat([(noisy[1][name] - without[1][name]).flatten() for name in expected])
    assert noise.std() == pytest.approx(1.5 * CLIP / SAMPLES, rel=0.1)
    assert sum(g.square().sum() for g in expected.values()).sqrt() <= CLIP


def test_epsilon_is_that_of_the_library():
    accountants = pytest.importorskip("opacus.accountants")
    account = Account(PrivacyConfig(max_grad_norm=1.0, noise_multiplier=1.1, delta=1e-5), 64, 6400)
    theirs = accountants.RDPAccountant()
    for _ in range(300):
        theirs.step(noise_multiplier=1.1, sample_rate=0.01)
    assert account.epsilon(300) == theirs.get_epsilon(delta=1e-5)
    assert account.epsilon(300) < account.epsilon_any_order(300) == account.epsilon_any_order(201)
    assert (
        account.epsilon(account.steps_within(1.0, 10**4)) <= 1.0 < account.epsilon(account.steps_within(1.0, 10**4) + 1)
    )
    uneven = dataclasses.replace(account, num_samples=6401)
    assert uneven.epsilon_any_order(100) > account.epsilon_any_order(100), "a sample may be twice in a step"
    assert dataclasses.replace(account, privacy=PrivacyConfig(noise_multiplier=0.0)).metrics(3) == {}


def test_a_run_says_what_it_spends_and_is_refused_before_it_spends_more(tmp_path):
    pytest.importorskip("opacus")
    given = [*SMALL, *PRIVATE, "privacy.delta=1e-9"]

    def train(*more, code=0, world_size=1):
        done = fork("train.py", *given, *more, cwd=tmp_path, world_size=world_size)
        assert done.code == code and "Traceback" not in done.err, done.err
        return done

    train("run.name=whole")
    train("run.name=parts", "run.stop_after_steps=3", code=75, world_size=2)
    train("run.name=parts")
    whole, parts = (metrics(tmp_path / "runs" / name) for name in ("whole", "parts"))
    assert [step["loss"] for step in parts] == pytest.approx([step["loss"] for step in whole], rel=1e-5)
    spent = [step["train/epsilon"] for step in whole]
    assert spent == sorted(spent) == [step["train/epsilon"] for step in parts] and 0 < spent[0] < spent[-1]
    assert events(tmp_path / "runs/whole", "start")
    refused = train("run.name=more", f"privacy.max_epsilon={spent[4]}", code=2).err
    assert (
        "8 steps would spend" in refused
        and "5 steps fit" in refused
        and not (tmp_path / "runs/more/metrics.jsonl").exists()
    )
    train("run.name=less", f"privacy.max_epsilon={spent[4]}", "train.steps=5")
    assert (
        "was begun with privacy.noise_multiplier: 1.0"
        in train("run.name=less", "privacy.noise_multiplier=9", "train.steps=6", code=2).err
    )
    begun = train("run.name=begun", "checkpoint.resume=runs/whole", "checkpoint.load=weights", "train.steps=1")
    assert "is in no epsilon here" in begun.out + begun.err
    assert "privacy.delta=0.5: must be less than 1 /" in train("run.name=half", "privacy.delta=0.5", code=2).err


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("engine=fsdp", "engine=fsdp sums gradients as they come"),
        ("bad_numbers.max_rollbacks=3", "would have the same noise"),
        ("task=contrastive", "the loss of a sample depends on others"),
        ("data=stdlib data.on_the_fly=true", "use one prepared data set"),
        ("privacy.max_epsilon=-1", "must be more than 0"),
        ("privacy.max_grad_norm=null privacy.max_epsilon=1", "missing, and without it nothing is private"),
        ("data.allow_change=true", "of other samples there is no account"),
    ],
)
def test_what_cannot_be_private_is_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        read_run([*{arg.partition("=")[0]: arg for arg in [*SMALL, *PRIVATE, *settings.split()]}.values()])
