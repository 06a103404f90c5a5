import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from bigtrain.config import Activation, ModelConfig, Norm, Positions, RopeScalingConfig
from bigtrain.data.read.batch import Batch
from bigtrain.models import build_model, initial_values
from bigtrain.models.loss import sum_cross_entropy
from bigtrain.models.rope import rope_table, rotate
from bigtrain.tasks.base import TaskModel, sums_of
from bigtrain.tasks.causal_lm import CausalLM
from tests.modules import initialise


def gpt(**changes):
    return ModelConfig(
        **dict(vocab_size=101, num_layers=2, hidden_dim=32, num_heads=4, max_positions=24, init_std=0.3) | changes
    )


def llama(**changes):
    defaults = dict(
        num_kv_heads=2,
        ffn_dim=56,
        positions=Positions.rope,
        rope_theta=500.0,
        norm=Norm.rmsnorm,
        activation=Activation.swiglu,
        bias=False,
        tie_embeddings=False,
    )
    return gpt(**defaults | changes)


FAMILIES = {
    "gpt": gpt(),
    "gpt untied": gpt(tie_embeddings=False),
    "llama": llama(),
    "llama tied": llama(tie_embeddings=True),
    "llama wide heads": llama(head_dim=16),
    "llama scaled": llama(rope_scaling=RopeScalingConfig(factor=8.0, original_max_positions=12)),
    "gpt with gqa": gpt(num_kv_heads=1, bias=False),
}


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def config(request):
    return request.param


def ready(config, seed=0):
    model = build_model(config)
    initialise(model, initial_values(model, config, seed))
    return model


def tokens_BT(config, batch=3, length=20, seed=0):
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def shuffled_vectors(model):
    """Give norms and biases values that matter, so that a wrong mapping of them shows."""
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(1)), alpha=0.2)


def gpt2_weights(model, config):
    """The native model's weights under GPT-2's names; its Conv1D keeps matrices transposed."""
    names = {
        "embed_tokens": "transformer.wte",
        "embed_positions": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "output": "lm_head",
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
    }
    weights = {}
    for name, value in model.state_dict().items():
        path, kind = name.rsplit(".", 1)
        prefix, inner = "", path
        if path.startswith("blocks."):
            _, layer, inner = path.split(".", 2)
            prefix = f"transformer.h.{layer}."
        is_conv1d = prefix and value.ndim == 2
        weights[f"{prefix}{names[inner]}.{kind}"] = value.T if is_conv1d else value
    return weights


def llama_weights(model, config):
    names = {
        "attention_norm": "input_layernorm",
        "attention.out": "self_attn.o_proj",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.gate": "mlp.gate_proj",
        "feed_forward.up": "mlp.up_proj",
        "feed_forward.down": "mlp.down_proj",
    }
    weights = {}
    for name, value in model.state_dict().items():
        if name.startswith("blocks."):
            _, layer, inner = name.removesuffix(".weight").split(".", 2)
            prefix = f"model.layers.{layer}."
            if inner == "attention.qkv":
                attention = model.blocks[int(layer)].attention
                sizes = [n * attention.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
                for letter, part in zip("qkv", value.split(sizes), strict=True):
                    weights[f"{prefix}self_attn.{letter}_proj.weight"] = part
            else:
                weights[f"{prefix}{names[inner]}.weight"] = value
        else:
            renamed = {"output": "lm_head", "embed_tokens": "model.embed_tokens", "final_norm": "model.norm"}
            weights[renamed[name.removesuffix(".weight")] + ".weight"] = value
    return weights


def transformers_gpt2(config):
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_positions,
            n_embd=config.hidden_dim,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            tie_word_embeddings=config.tie_embeddings,
        )
    )


def transformers_llama(config):
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= dict(
            rope_type="llama3",
            factor=config.rope_scaling.factor,
            low_freq_factor=config.rope_scaling.low_freq_factor,
            high_freq_factor=config.rope_scaling.high_freq_factor,
            original_max_position_embeddings=config.rope_scaling.original_max_positions,
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim or config.hidden_dim // config.num_heads,
            max_position_embeddings=config.max_positions,
            rms_norm_eps=config.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=config.tie_embeddings,
        )
    )


@pytest.mark.parametrize(
    ("family", "theirs", "mapping"),
    [
        ("gpt", transformers_gpt2, gpt2_weights),
        ("gpt untied", transformers_gpt2, gpt2_weights),
        ("llama", transformers_llama, llama_weights),
        ("llama tied", transformers_llama, llama_weights),
        ("llama wide heads", transformers_llama, llama_weights),
        ("llama scaled", transformers_llama, llama_weights),
    ],
)
def test_logits_equal_those_of_transformers(family, theirs, mapping):
    config = FAMILIES[family]
    model, reference = ready(config).eval(), theirs(config).eval()
    shuffled_vectors(model)
    missing, unexpected = reference.load_state_dict(mapping(model, config), strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if config.tie_embeddings else set())
    reference.tie_weights()
    tokens = tokens_BT(config)
    with torch.no_grad():
        ours, expected = model(tokens), reference(input_ids=tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.std().item())


def test_rotary_scaling_changes_the_logits():
    plain, scaled = ready(FAMILIES["llama"]), ready(FAMILIES["llama scaled"])
    tokens = tokens_BT(plain.config)
    assert (plain(tokens) - scaled(tokens)).abs().max() > 1e-3


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    table = rope_table(llama(head_dim=16), torch.arange(10))
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 10, 1, 16)
    q_rotated, k_rotated = rotate(q, table), rotate(k, table)
    torch.testing.assert_close(q_rotated.norm(dim=-1), q.norm(dim=-1))
    scores = torch.einsum("bthk,bshk->ts", q_rotated, k_rotated)
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1])
    assert (scores[0] - scores[0, 0]).abs().max() > 1e-3


def test_logits_depend_on_the_past_only(config):
    model, tokens = ready(config).eval(), tokens_BT(config)
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % config.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=0)
    assert ((before[:, 12:] - after[:, 12:]).abs().amax(-1) > 0).all()


def test_loss_is_the_sum_over_counting_targets(config):
    model, tokens = ready(config), tokens_BT(config)
    targets = tokens_BT(config, seed=1)
    targets[0, :7] = targets[2, 19] = -100
    loss, logits = model(tokens, targets), model(tokens)
    chosen = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(loss, -chosen[targets != -100].sum())
    assert loss.dtype == torch.float32 and loss.ndim == 0


def test_loss_of_no_targets_is_zero_with_zero_gradient():
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    loss = sum_cross_entropy(hidden, torch.randn(5, 4), torch.full((2, 3), -100))
    loss.backward()
    assert loss == 0 and not hidden.grad.any()


def test_loss_is_summed_in_fp32_under_bf16():
    hidden, weight = torch.randn(64, 32, 16).bfloat16(), torch.randn(50, 16).bfloat16()
    targets = torch.randint(50, (64, 32))
    loss = sum_cross_entropy(hidden, weight, targets)
    exact = F.cross_entropy(F.linear(hidden, weight).double().flatten(0, 1), targets.flatten(), reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


def test_objective_hands_tokens_and_targets_to_the_model():
    config = gpt()

    batch, model = Batch(tokens=tokens_BT(config), targets=tokens_BT(config, seed=1)), ready(config)
    task_model = TaskModel(model, CausalLM())
    assert sums_of(task_model, batch).item() == model(*batch.values()).item()
    assert torch.equal(task_model(batch["tokens"], predicts=True), model(batch["tokens"]))


def test_meta_model_has_all_its_tensors_on_meta_and_runs(config):
    with torch.device("meta"):
        model = build_model(config)
        loss = model(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64))
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers(), loss])
    assert all(param.dtype == torch.float32 for param in model.parameters())
    assert not list(model.buffers())


def test_tied_model_has_one_vocabulary_parameter():
    def shapes(tied):
        model = build_model(gpt(tie_embeddings=tied))
        return [name for name, p in model.named_parameters(remove_duplicate=False) if p.shape == (101, 32)]

    assert shapes(tied=True) == ["embed_tokens.weight"]
    assert shapes(tied=False) == ["embed_tokens.weight", "output.weight"]


def test_parameter_names_stay():
    """Checkpoints and exports rely on them."""
    names = [name for name, _ in build_model(llama(num_layers=1)).named_parameters()]
    assert names == [
        "embed_tokens.weight",
        "blocks.0.attention_norm.weight",
        "blocks.0.attention.qkv.weight",
        "blocks.0.attention.out.weight",
        "blocks.0.feed_forward_norm.weight",
        "blocks.0.feed_forward.gate.weight",
        "blocks.0.feed_forward.up.weight",
        "blocks.0.feed_forward.down.weight",
        "final_norm.weight",
        "output.weight",
    ]
    names = [name for name, _ in build_model(gpt(num_layers=1)).named_parameters() if name.endswith("weight")]
    assert names == [
        "embed_tokens.weight",
        "embed_positions.weight",
        "blocks.0.attention_norm.weight",
        "blocks.0.attention.qkv.weight",
        "blocks.0.attention.out.weight",
        "blocks.0.feed_forward_norm.weight",
        "blocks.0.feed_forward.up.weight",
        "blocks.0.feed_forward.down.weight",
        "final_norm.weight",
    ]


@pytest.mark.parametrize("mode", ["parameters", "autocast"])
def test_bf16_is_near_fp32(config, mode):
    model = ready(config).eval()
    tokens, targets = tokens_BT(config), tokens_BT(config, seed=1)
    exact = model(tokens, targets)
    if mode == "parameters":
        loss = model.bfloat16()(tokens, targets)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, targets)
    assert loss.dtype == torch.float32 and loss != exact
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
    loss.backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in model.parameters())


def gradients(model, tokens, targets):
    model.zero_grad()
    model(tokens, targets).backward()
    return {name: param.grad.clone() for name, param in model.named_parameters()}


def test_blocks_can_be_checkpointed(config):
    model = ready(config)
    data = tokens_BT(config), tokens_BT(config, seed=1)
    expected = gradients(model, *data)
    for block in model.blocks:
        inner = block.forward
        block.forward = lambda *args, inner=inner: checkpoint(inner, *args, use_reentrant=False)
    torch.testing.assert_close(gradients(model, *data), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["gpt", "llama scaled"])
def test_blocks_compile_whole_and_only_once(family):
    config = FAMILIES[family]
    model = ready(config)
    data = tokens_BT(config), tokens_BT(config, seed=1)
    expected = gradients(model, *data)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(gradients(model, *data), expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_dropout_acts_in_training_only():
    config = gpt(dropout=0.5)
    model, tokens = ready(config), tokens_BT(config)
    assert not torch.equal(model.train()(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))
    torch.testing.assert_close(model(tokens), ready(gpt())(tokens))


def test_initial_loss_is_near_that_of_guessing():
    config = gpt(init_std=0.02)
    loss = ready(config)(tokens_BT(config), tokens_BT(config, seed=1)) / 60
    assert abs(loss.item() - math.log(config.vocab_size)) < 0.1
