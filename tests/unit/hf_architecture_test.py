"""Any architecture of transformers from scratch, by its name and its own settings."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bigtrain.cli import hydra_cli
from bigtrain.config import ModelConfig, ModelKind
from bigtrain.errors import ConfigError
from bigtrain.models import build_model
from bigtrain.models.hf.build import _require_labels
from bigtrain.models.probe import unreached_parameters

LLAMA = [
    "+model=hf",
    "model.architecture=llama",
    "model.settings.hidden_size=32",
    "model.settings={num_hidden_layers: 3}",
]


def read(*args: str):
    return hydra_cli.read_run([*args, "data=synthetic", "data.sequence_length=16"])


def test_settings_become_a_description_that_the_same_command_finds_again(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, again = read(*LLAMA), read(*LLAMA)
    assert first == again and first.run.name.startswith("llama-")
    assert (first.model.hidden_dim, first.model.num_layers) == (32, 3)
    described = json.loads(Path(first.model.name, "config.json").read_text())
    assert (described["model_type"], described["hidden_size"], described["num_hidden_layers"]) == ("llama", 32, 3)
    assert read(*LLAMA, "model.settings.vocab_size=77").model.name != first.model.name
    assert {path.name for path in Path("data/models").glob("*/*")} == {"config.json"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["model.architecture=lama"], "model.architecture=lama: unknown; did you mean"),
        (
            [*LLAMA[1:], "model.settings.hiden_size=3"],
            "model.settings.hiden_size: unknown; did you mean 'hidden_size'?",
        ),
        ([*LLAMA[1:], "model.settings.hidden_size=wide"], "model.settings: llama does not take them: "),
        ([*LLAMA[1:], "model.name=gpt2"], "model.architecture=llama and model.name=gpt2: write one of them"),
        ([*LLAMA[1:], "model.pretrained=true"], "model.architecture begins from scratch: leave out model.pretrained"),
    ],
)
def test_what_transformers_does_not_know_is_named(tmp_path: Path, monkeypatch, args: list[str], message: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read("+model=hf", *args)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_settings_without_an_architecture_are_refused_and_native_models_ignore_both():
    with pytest.raises(ConfigError, match=r"model\.name: \+model=hf needs .* or model\.architecture="):
        read("+model=hf", "model.settings={a: 1}")
    native = hydra_cli.compose_run(hydra_cli.TrainConfig, ["+model=gpt_nano", "model.architecture=llama"])
    assert "model.architecture is ignored by model.kind=native" in hydra_cli.ignored_settings(native)


def test_the_first_of_several_classes_that_an_architecture_has_for_a_task_is_built(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = "{hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 32, image_size: 8}"
    of_records = ["task=classification", "task.inputs=pixels", "task.num_labels=3", "data=records", "data.path=x.npz"]
    settings = [f"model.settings={sizes}", "model.settings.patch_size=4", *of_records]
    config = hydra_cli.read_run(["+model=hf", "model.architecture=deit", *settings])
    with torch.device("meta"):
        model = build_model(config.model)
    assert type(model.causal_lm).__name__ == "DeiTForImageClassification"
    assert model.causal_lm.classifier.out_features == 3 and not unreached_parameters(model)


def test_a_head_without_names_of_another_size_is_no_reason_for_its_number_of_labels(tmp_path: Path):
    settings = {"architectures": ["BertForSequenceClassification"], "hidden_size": 8, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **settings}))
    config = ModelConfig(kind=ModelKind.hf, name=str(tmp_path), pretrained=True, num_outputs=3)
    network = type("BertForSequenceClassification", (nn.Module,), {})()
    with pytest.raises(ConfigError, match=r"has 2 labels \(without names\), but the task has 3; keep its trunk alone"):
        _require_labels(network, config)
