import pytest
import torch

from bigtrain.config import Activation, ModelConfig, Norm, Positions
from bigtrain.errors import ConfigError
from bigtrain.models import build_model, initial_values
from bigtrain.models.generation import generate, sample, sampling_probabilities
from tests.modules import initialise

GPT = ModelConfig(vocab_size=50, num_layers=2, hidden_dim=32, num_heads=4, max_positions=24, init_std=0.3)
LLAMA = ModelConfig(
    vocab_size=50,
    num_layers=2,
    hidden_dim=32,
    num_heads=4,
    num_kv_heads=2,
    max_positions=24,
    positions=Positions.rope,
    norm=Norm.rmsnorm,
    activation=Activation.swiglu,
    bias=False,
    init_std=0.3,
)
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(params=[GPT, LLAMA], ids=["gpt", "llama"])
def model(request):
    model = build_model(request.param)
    initialise(model, initial_values(model, request.param, seed=0))
    return model.eval()


@pytest.mark.parametrize("cuts", [[5, 1, 1, 1], [1] * 8, [2, 3, 3], [8]])
def test_cache_gives_the_logits_of_the_whole_sequence(model, cuts):
    tokens_BT = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(capacity_tokens=8)
    with torch.no_grad():
        whole = model(tokens_BT)
        parts = torch.cat([model(part, cache=cache) for part in tokens_BT.split(cuts, dim=1)], dim=1)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert cache[0].length == 8


def test_greedy_takes_the_likeliest_token_each_time(model):
    ids = list(PROMPT)
    for _ in range(10):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert generate(model, PROMPT, max_new_tokens=10, temperature=0) == ids[len(PROMPT) :]


def test_same_generator_same_text(model):
    def text(seed):
        return generate(model, PROMPT, max_new_tokens=12, generator=torch.Generator().manual_seed(seed))

    assert text(0) == text(0)
    assert len({tuple(text(seed)) for seed in range(5)}) == 5


def test_ends_at_the_end_token_which_is_left_out(model):
    full = generate(model, PROMPT, max_new_tokens=10, temperature=0)
    stop = full.index(full[4])
    assert generate(model, PROMPT, max_new_tokens=10, temperature=0, eos_id=full[4]) == full[:stop]
    several = [-1, *full[4:6]]
    first = min(full.index(token) for token in several[1:])
    assert generate(model, PROMPT, max_new_tokens=10, temperature=0, eos_id=several) == full[:first]


def test_ends_where_the_positions_end(model):
    assert len(generate(model, PROMPT, max_new_tokens=100, temperature=0)) == 24 - len(PROMPT)
    assert len(generate(model, [7] * 23, max_new_tokens=100)) == 1


def test_training_mode_is_kept(model):
    model.train()
    generate(model, PROMPT, max_new_tokens=2)
    assert model.training


LOGITS = torch.tensor([0.5, 0.1, 0.25, 0.15]).log()


def test_temperature_divides_the_logits():
    probs = sampling_probabilities(LOGITS, temperature=0.5)
    expected = torch.tensor([0.5, 0.1, 0.25, 0.15]) ** 2
    torch.testing.assert_close(probs, expected / expected.sum())
    torch.testing.assert_close(sampling_probabilities(LOGITS, temperature=1e-30), torch.tensor([1.0, 0, 0, 0]))


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 100])
def test_top_k_keeps_the_k_likeliest(top_k):
    probs = sampling_probabilities(LOGITS, top_k=top_k)
    kept = [0, 2, 3, 1][:top_k]
    expected = torch.zeros(4)
    expected[kept] = LOGITS.exp()[kept] / LOGITS.exp()[kept].sum()
    torch.testing.assert_close(probs, expected)


def test_top_k_keeps_k_tokens_of_equal_probability():
    assert (sampling_probabilities(torch.zeros(10), top_k=3) > 0).sum() == 3


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, [0]), (0.49, [0]), (0.51, [0, 2]), (0.8, [0, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    assert sampling_probabilities(LOGITS, top_p=top_p).nonzero().flatten().tolist() == kept


def test_top_p_counts_what_top_k_left():
    # Of 0.5 and 0.25 alone the first has two thirds.
    assert sampling_probabilities(LOGITS, top_k=2, top_p=0.6).nonzero().flatten().tolist() == [0]


def test_filters_agree_with_transformers():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 3
    scores = TemperatureLogitsWarper(0.7)(None, logits[None])
    scores = TopPLogitsWarper(0.9)(None, TopKLogitsWarper(50)(None, scores))
    ours = sampling_probabilities(logits, temperature=0.7, top_k=50, top_p=0.9)
    torch.testing.assert_close(ours, scores.softmax(-1)[0])


def test_samples_follow_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([sample(LOGITS, generator=generator) for _ in range(4000)]), minlength=4)
    torch.testing.assert_close(counts / 4000, LOGITS.exp(), rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_k=0), "top_k=0"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=1.5), "top_p=1.5"),
    ],
)
def test_senseless_options_are_refused(model, options, named):
    with pytest.raises(ConfigError, match=named):
        generate(model, PROMPT, **{"max_new_tokens": 5} | options)


def test_all_senseless_options_are_named_at_once(model):
    with pytest.raises(ConfigError, match=r"(?s)temperature=-1.*top_k=0.*top_p=2"):
        generate(model, PROMPT, max_new_tokens=5, temperature=-1, top_k=0, top_p=2)


@pytest.mark.parametrize("prompt", [[], [50], [-1], [1] * 24])
def test_unusable_prompts_are_refused(model, prompt):
    with pytest.raises(ConfigError, match="prompt has"):
        generate(model, prompt, max_new_tokens=5)
