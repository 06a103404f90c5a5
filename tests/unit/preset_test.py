"""Presets have the published numbers of parameters."""

from pathlib import Path

import pytest
import torch
import yaml

from bigtrain.cli.hydra_cli import read_run
from bigtrain.cli.settings import group_options
from bigtrain.config import Head, ModelConfig, ModelKind, TrainConfig
from bigtrain.config.check import resolve
from bigtrain.config.convert import from_dict
from bigtrain.models import build_model
from bigtrain.models.hf.build import describe_architecture
from bigtrain.models.sizes import model_sizes
from bigtrain.optim.schedule import lr_at

PRESETS = Path(__file__).parents[2] / "configs/model"

# Released checkpoints: exact. GPT-3 was never released: table 2.1 of arXiv 2005.14165, as printed there.
EXACT = {
    "gpt_nano": 1_350_400,
    "gpt2_124m": 124_439_808,
    "gpt2_355m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1b5": 1_557_611_200,
    "llama3_1b": 1_235_814_400,
    "llama3_3b": 3_212_749_824,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "mixtral_8x7b": 46_702_792_704,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_235b_a22b": 235_093_634_560,
    "moe_nano": 2_265_728,
}
# BERT's masked language model as released; Keras' and PyTorch's counts of the other shapes.
OTHERS = {
    "bert_mini": None,
    "bert_base": 109_514_298,
    "bert_large": 335_174_458,
    "vit_base": 86_567_656 - 998 * 769,  # as printed for 1,000 labels, without 998 of them
    "vit_tiny": 5_717_416 - 998 * 193,
    "vit_digits": None,
    "transformer_mini": None,
    "transformer_base": None,
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "modernbert_base": 149_655_232,
    "modernbert_mini": None,
    "whisper_tiny": 37_760_640,
    "mlp_digits": 8_970,
    "cnn_digits": 85_066,
    "mlp_mnist": 784 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10,
    "cnn_mnist": 93_322,
    "cnn_cifar": 3 * 32 * 9 + 32 + 32 * 64 * 9 + 64 + 64 * 64 * 128 + 128 + 128 * 10 + 10,
    "lstm": 4 * 50 * (1 + 50 + 2) + 4 * 50 * (50 + 50 + 2) + 102,
    # Generator and discriminator have the same matrices, turned around, but for the first and last dense ones.
    "gan_digits": (64 + 1) * 512 + 512 + 1 + 2 * 9 * (128 * 64 + 64) + 64 + 1 + 64 + 128,
    "gan_mnist": (64 + 1) * 6272 + 6272 + 1 + 2 * 9 * (128 * 64 + 64) + 64 + 1 + 64 + 128,
    "gru": 3 * 50 * (1 + 50 + 2) + 3 * 50 * (50 + 50 + 2) + 102,
}
PRINTED = {
    "gpt3_125m": 125e6,
    "gpt3_350m": 350e6,
    "gpt3_760m": 760e6,
    "gpt3_1b": 1.3e9,
    "gpt3_2b7": 2.7e9,
    "gpt3_6b7": 6.7e9,
    "gpt3_13b": 13e9,
    "gpt3_175b": 175e9,
}


def read_preset(name):
    model = from_dict(ModelConfig, yaml.safe_load((PRESETS / f"{name}.yaml").read_text()))
    return resolve(TrainConfig(model=model)).model


def count_parameters(model):
    with torch.device("meta"):
        built = build_model(model)
    assert all(parameter.is_meta for parameter in built.parameters())
    return sum(parameter.numel() for parameter in built.parameters())


def test_every_preset_is_held_against_a_published_number():
    assert {path.stem for path in PRESETS.glob("*.yaml")} == {*EXACT, *PRINTED, *OTHERS, "hf", "own"}
    assert read_preset("hf").kind is ModelKind.hf


@pytest.mark.parametrize("name", [*EXACT, *PRINTED])
def test_number_of_parameters(name):
    model = read_preset(name)
    assert model.name == name
    num_parameters = count_parameters(model)
    assert num_parameters == model_sizes(model).total
    if name in EXACT:
        assert num_parameters == EXACT[name]
    else:
        # Two printed digits, and a printed shape that leaves rounding open: the largest gap is 350M, 1.7 %.
        assert num_parameters == pytest.approx(PRINTED[name], rel=0.02)


@pytest.mark.parametrize("name", OTHERS)
def test_number_of_parameters_of_other_networks(name, tmp_path):
    model = from_dict(ModelConfig, yaml.safe_load((PRESETS / f"{name}.yaml").read_text()))
    if model.kind is ModelKind.hf:
        heads = {"bert": Head.masked_lm, "marian": Head.seq2seq_lm, "vit": Head.image_classification}
        heads |= {"modernbert": Head.masked_lm, "t5": Head.seq2seq_lm, "whisper": Head.speech_seq2seq}
        model.head = heads[model.architecture]
        model.name = describe_architecture(model, tmp_path)
    assert OTHERS[name] in (None, count_parameters(model))


LABELLED = ["data.content=labelled"]
RECIPES = {
    "bert_pretraining": ("bert_base", 1e-4, []),
    "bert_finetuning": ("bert_base", 3e-5, LABELLED),
    "modernbert_pretraining": ("modernbert_base", 8e-4, []),
    "continue_pretraining": ("gpt2_124m", 1.2e-4, []),
    "t5_finetuning": ("t5_small", 3e-4, ["data=gettext", "data.path=names"]),
    "translation": ("transformer_base", 512**-0.5 * 4000**-0.5, ["data=gettext", "data.path=names"]),
    "vit_imagenet": ("vit_base", 3e-3, ["data.path=images"]),
    "whisper_training": ("whisper_tiny", 1.5e-3, ["data.path=speech.npz"]),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_goes_with_its_preset(recipe, tmp_path):
    name, peak, data = RECIPES[recipe]
    config = read_run([f"+model={name}", f"+recipe={recipe}", f"data.root={tmp_path}", *data])
    assert count_parameters(config.model) > 10**7
    top = lr_at(
        config.scheduler.warmup_steps, peak_lr=config.optimizer.lr, num_steps=10**7, config=config.scheduler
    )  # the first step at the peak
    assert top == pytest.approx(peak, rel=0.01)


ARTICLES = {
    "a0_gpt2_generate": (None, ["model.architecture=gpt2", "model.name=null", "model.pretrained=false"]),
    "a0_gru": (20000 * 512 + 3 * 1024 * (512 + 1024 + 2) + 20000 * (1024 + 1), []),
    "a1_mlp_mnist": (784 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10, ["data.path=mnist"]),
    "a2_transformer": (None, ["data.path=names"]),
    "a3_lstm": (4 * 50 * (1 + 50 + 2) + 4 * 50 * (50 + 50 + 2) + 2 * (50 + 1), ["data.path=rows.npz"]),
    "a4_cnn_mnist": (93322, ["data.path=mnist"]),  # as Keras counts it
}


@pytest.mark.parametrize("article", ARTICLES)
def test_a_program_of_an_article_has_its_shape_and_its_optimizer(article, tmp_path):
    parameters, data = ARTICLES[article]
    config = read_run([f"+articles={article}", f"data.root={tmp_path}", *data])
    assert parameters in (None, count_parameters(config.model))
    assert (config.scheduler.kind.name, config.scheduler.warmup_steps) == ("constant", 0)
    assert article == "a0_gpt2_generate" or (config.optimizer.kind.name, config.optimizer.weight_decay) == ("adam", 0)


def test_every_program_of_an_article_is_tested():
    assert sorted(ARTICLES) == group_options("articles")


def test_a_wrong_shape_is_noticed():
    model = read_preset("gpt2_124m")
    model.num_layers += 1
    assert count_parameters(model) != EXACT["gpt2_124m"]
