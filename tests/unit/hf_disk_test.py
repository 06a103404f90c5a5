"""What stands in the files of a transformers model: the names and shapes on disk, and a config.json for all versions."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from bigtrain.models.hf.disk import disk_config, disk_tensors
from tests.hf_families import FAMILIES, build_family


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_neox", "qwen3_moe", "deepseek_v3", "hrm_text"])
def test_names_and_values_are_those_that_transformers_saves(family: str, tmp_path):
    model = build_family(family)
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    groups = disk_tensors(model, model.state_dict())
    found = {}
    for group in groups:
        tensors = group.convert({name: model.state_dict()[name] for name in group.sources})
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == group.shapes
        assert not tensors.keys() & found.keys()
        found |= tensors
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (found.keys() == model.state_dict().keys()) is (family == "llama"), "nothing was converted"


def test_what_is_one_tensor_on_disk_is_one_group():
    model = build_family("hrm_text")
    sources = [group.sources for group in disk_tensors(model, model.state_dict())]
    assert max(map(len, sources)) > 1
    assert sorted(name for group in sources for name in group) == sorted(model.state_dict())


SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
PLAIN = {"model_type": "llama", "vocab_size": 97, "eos_token_id": [1, 4]}
WRITTEN = {"architectures": ["X"], "torch_dtype": "float32"}


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        (PLAIN, PLAIN),
        (PLAIN | {"dtype": "bfloat16"}, PLAIN | {"dtype": "float32"}),
        (PLAIN | {"torch_dtype": "bfloat16", "architectures": ["Y"]}, PLAIN),
        (PLAIN | {"auto_map": {"AutoModel": "a--b.C"}, "quantization_config": {"quant_method": "fp8"}}, PLAIN),
        (
            PLAIN | {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
            PLAIN | {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "rope_theta": 5.0},
        ),
        (
            {"text_config": PLAIN | {"dtype": "bfloat16", "rope_parameters": SCALED | {"rope_theta": 5.0}}},
            {
                "text_config": PLAIN
                | {"dtype": "float32", "rope_parameters": SCALED | {"rope_theta": 5.0}}
                | {"rope_theta": 5.0, "rope_scaling": SCALED}
            },
        ),
        # What is said in the older form already stays as it is.
        (
            PLAIN | {"rope_theta": 7.0, "rope_scaling": None, "rope_parameters": SCALED | {"rope_theta": 5.0}},
            PLAIN | {"rope_theta": 7.0, "rope_scaling": None, "rope_parameters": SCALED | {"rope_theta": 5.0}},
        ),
    ],
)
def test_a_configuration_stays_but_for_types_code_and_older_names(published: dict, expected: dict):
    kept = dict(published)
    assert disk_config(published, architecture="X", dtype="float32") == expected | WRITTEN
    assert published == kept


def test_every_family_says_its_rotary_positions_in_both_forms():
    for family in FAMILIES:
        config = transformers.AutoConfig.for_model(**FAMILIES[family])
        found = disk_config(config.to_dict(), architecture="X", dtype="float32")
        assert ("rope_theta" in found) is (getattr(config, "rope_parameters", None) is not None), family
        again, own = (c.to_dict() for c in (transformers.AutoConfig.for_model(**found), config))
        assert {key for key in own if again[key] != own[key]} <= {"architectures", "dtype"}, family


def test_older_names_that_transformers_takes_for_another_position_are_left_out():
    """Its full attention has a type of scaling that the older form cannot say beside that of the sliding one."""
    published = transformers.Gemma4TextConfig(num_hidden_layers=2).to_dict()
    found = disk_config(published, architecture="X", dtype="float32")
    assert "rope_scaling" not in found
    again = transformers.Gemma4TextConfig.from_dict(found)
    assert again.rope_parameters == published["rope_parameters"]


def test_older_names_stand_beside_settings_that_are_infinite(tmp_path):
    transformers.BambaConfig().save_pretrained(tmp_path)
    published = json.loads((tmp_path / "config.json").read_text())
    assert "Infinity" in str(published["time_step_limit"])
    assert disk_config(published, architecture="X", dtype="float32")["rope_theta"] == 10000.0
