"""One backward pass gives generator and discriminator the gradients of two; noise and distances are what they are called."""

import numpy as np
import pytest
import torch
from scipy import linalg
from torch.nn import functional as F

from bigtrain.cli.hydra_cli import read_run
from bigtrain.errors import ConfigError
from bigtrain.models.small import GAN as Network
from bigtrain.run.generated import tiled
from bigtrain.tasks.gan import FOR_PICTURES, GAN, frechet_distance, moments, normal_noise

OURS = ["+model=gan_digits", "data=digits"]


def built():
    torch.manual_seed(0)
    return Network(channels=[8, 4], num_inputs=6).build()


def two_passes(network, pixels, noise):
    """Return the gradients by each parameter as Goodfellow et al. compute them: one network at a time."""
    fakes = network.generator(noise)
    fake, real = network.discriminator(fakes.detach()), network.discriminator(pixels)
    judge = torch.autograd.grad((F.softplus(fake) + F.softplus(-real)).sum(), [*network.discriminator.parameters()])
    maker = F.softplus(-network.discriminator(fakes)).sum()
    return [*torch.autograd.grad(maker, [*network.generator.parameters()]), *judge]


@pytest.mark.parametrize(("confidence", "tolerance"), [(0.0, 1e-6), (-30.0, 1e-5), (30.0, 1e-5)])
def test_one_backward_pass_is_two(confidence, tolerance):
    network, generator = built(), torch.Generator().manual_seed(1)
    network.discriminator[-1].bias.data.fill_(confidence)
    pixels, noise = torch.randn(5, 1, 8, 8, generator=generator), torch.randn(5, 6, generator=generator)
    labels = torch.tensor([0, 1, 2, -100, 3])
    sums = GAN()(network, pixels, labels, noise)
    sums[0].backward()
    kept = labels >= 0
    for found, expected in zip(network.parameters(), two_passes(network, pixels[kept], noise[kept]), strict=True):
        assert (found.grad - expected).norm() <= tolerance * expected.norm()
    assert float(sums[-1].detach()) == 4
    plain = torch.autograd.grad(F.softplus(network.discriminator(network(noise))).sum(), network.generator[0].weight)[0]
    assert (plain - network.generator[0].weight.grad).norm() > 0.9 * plain.norm(), (
        "without the factor it is another gradient"
    )


def test_noise_is_normal_and_a_function_of_the_place():
    noise = normal_noise(np.arange(4000), 8, seed=3)
    assert (
        abs(noise.mean()) < 0.02
        and abs(noise.std() - 1) < 0.02
        and np.abs(np.corrcoef(noise.T) - np.eye(8)).max() < 0.1
    )
    assert np.array_equal(normal_noise(np.array([7, 2]), 8, seed=3), noise[[7, 2]])
    for other in (normal_noise(np.arange(4000), 8, seed=4), normal_noise(np.arange(4000), 8, 3, FOR_PICTURES)):
        assert abs(np.corrcoef(noise.flatten(), other.flatten())[0, 1]) < 0.02


def test_the_distance_is_that_of_the_matrix_square_root():
    random = np.random.default_rng(0)
    one, other = random.normal(size=(300, 5)), random.normal(size=(200, 5)) @ random.normal(size=(5, 5)) + 1
    spreads = [np.cov(x.T, bias=True) for x in (one, other)]
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(
        sum(spreads) - 2 * linalg.sqrtm(spreads[0] @ spreads[1]).real
    )
    sums = [moments(torch.from_numpy(x)) for x in (one, other)]
    assert frechet_distance(*sums) == pytest.approx(expected, rel=1e-9)
    halves = moments(torch.from_numpy(one[:100])) + moments(torch.from_numpy(one[100:]))
    assert frechet_distance(halves, sums[1]) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(sums[0], sums[0]) == pytest.approx(0, abs=1e-9)


def test_pictures_are_tiles_with_lines_between_them():
    images = np.linspace(-1, 1, 64, dtype=np.float32)[:, None, None, None] * np.ones((64, 3, 4, 4), dtype=np.float32)
    picture = tiled(images)
    assert picture.shape == (40, 40, 3) and picture[0, 0, 0] == 0 and picture[38, 38, 2] == 255
    assert picture[0, 5, 0] == round((images[1, 0, 0, 0] + 1) * 127.5) and (picture[4] == 128).all()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([*OURS, "task=classification", "task.num_labels=10"], "model.name=gan makes images; it is for task=gan"),
        (["+model=gpt_nano", "data=digits", "task=gan"], "task=gan: needs a generator and a discriminator"),
        (["+model=cnn_digits", "data=digits", "task=gan"], "model.name=cnn predicts one label"),
        ([*OURS, "task=gan", "model.settings.num_inputs=3"], "num_inputs=3: is task.noise_dim=64"),
        ([*OURS, "task=gan", "model.settings.image_size=10"], "image_size=10: is not 4 times a whole number"),
        (["+model=gpt_nano", "validation.every_steps=1", "validation.frechet=x"], "validation.frechet: task=causal_lm"),
        (["+model=gan_digits", "task=gan"], "task=gan: data=stdlib has no records"),
    ],
)
def test_what_does_not_go_together_is_named(args, told):
    with pytest.raises(ConfigError, match=told):
        read_run(args)
