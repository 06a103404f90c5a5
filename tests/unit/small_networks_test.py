"""Settings of the small networks and of their tasks that cannot be right: one sentence, before anything is computed."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from bigtrain.cli.hydra_cli import read_run
from bigtrain.config import Inputs, TaskConfig
from bigtrain.errors import ConfigError, DataError
from bigtrain.models.construction import find_stacks
from bigtrain.models.small import CNN, MLP
from bigtrain.tasks import build_objective
from bigtrain.tasks.base import Objective, TaskModel
from bigtrain.tasks.classification import Classification

RECORDS = ["data=records", "data.path=x.npz"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ("+model=mlp_mnist model.settings.num_outputs=0", r"model\.settings\.num_outputs=0: must be at least 1"),
        ("+model=mlp_mnist model.settings.hidden_dims=[8,-4]", r"hidden_dims\[1\]=-4: must be at least 1"),
        ("+model=mlp_mnist model.settings.dropout=1.0", "dropout=1.0: must be less than 1"),
        ("+model=cnn_mnist model.settings.image_size=2", "image_size=2: nothing is left of an image"),
        ("+model=cnn_mnist model.settings.num_pools=9", "num_pools=9: at most one for each of the 3"),
        ("+model=cnn_mnist model.settings.pads=true model.settings.kernel_size=4", "kernel_size=4: must be odd"),
        (
            "+model=cnn_mnist model.settings.group_norm=true model.settings.channels=[8,17]",
            "channels: 17 does not divide into groups",
        ),
    ],
)
def test_shapes_that_cannot_be_built_are_named(args, told):
    with pytest.raises(ConfigError, match=told):
        read_run([*args.split(), "task=classification", *RECORDS])


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ("+model=mlp_mnist task=classification data=stdlib", "needs data.content=labelled"),
        ("+model=bert_mini task=classification data=records data.path=x.npz", "no network for task.inputs=features"),
        ("+model=gpt_nano task=regression data=records data.path=x.npz", "own decoder predicts text only"),
        (
            "+model=mlp_mnist task=masked_lm data=stdlib data.sequence_length=8",
            "model.name=mlp predicts one label or vector a sample",
        ),
    ],
)
def test_tasks_name_the_data_and_networks_that_are_not_theirs(args, told):
    with pytest.raises(ConfigError, match=told):
        read_run(args.split())
    assert read_run(["+model=mlp_mnist", "task=classification", *RECORDS]).model.name == "mlp"


@pytest.mark.parametrize(
    ("args", "num_outputs"),
    [
        ("task=classification task.num_labels=7", 7),
        ("task=classification task.class_weights=[1,2,3]", 3),
        ("task=regression task.num_values=2", 2),
        ("task=regression", 1),
    ],
)
def test_a_network_ends_as_the_task_says(args, num_outputs):
    given = ["+model=mlp_mnist", *args.split(), *RECORDS]
    assert read_run(given).model.settings["num_outputs"] == num_outputs
    assert read_run([*given, f"model.settings.num_outputs={num_outputs}"]) == read_run(given)
    with pytest.raises(ConfigError, match=rf"num_outputs=9: task=\w+ predicts {num_outputs}; leave num_outputs out"):
        read_run([*given, "model.settings.num_outputs=9"])


def test_samples_of_another_size_are_named():
    for network, shape in ((MLP(num_inputs=6), (2, 5)), (CNN(image_size=8), (2, 1, 9, 9)), (CNN(), (2, 28, 28))):
        with pytest.raises(ConfigError, match=rf"a sample has the shape \({shape[1]},"):
            network.build()(torch.zeros(shape))
    assert MLP(num_inputs=6).build()(torch.zeros(2, 2, 3)).shape == (2, 10)


@pytest.mark.parametrize("length", [0, 4])
def test_lengths_that_are_not_those_of_the_tokens_are_named(length):
    objective = Classification(inputs=Inputs.tokens)
    samples = {"tokens": np.zeros((2, 3), int), "lengths": np.array([3, 1]), "labels": np.zeros(2, int)}
    assert objective.count(samples).tolist() == [1, 1]
    with pytest.raises(DataError, match=f"lengths: {length}, but a sample has from 1 to 3 tokens"):
        objective.count(samples | {"lengths": np.array([3, length])})


@pytest.mark.parametrize("returned", [None, 1.0, torch.zeros(1, dtype=torch.int64)])
def test_an_objective_that_returns_no_tensor_of_fractions_is_named(returned):
    class Wrong(Objective):
        fields: ClassVar[dict] = {}

        def __call__(self, network, *tensors):
            return returned

    with pytest.raises(ConfigError, match=r"Wrong returns .*; an objective returns a tensor of fractions"):
        TaskModel(torch.nn.Identity(), Wrong())()


def test_an_objective_without_fields_is_named(tmp_path, monkeypatch):
    class Bare(Objective):
        def count(self, samples):
            return np.ones(1, dtype=np.int64)

        def __call__(self, network, *tensors):
            return torch.zeros(1)

    monkeypatch.setattr("bigtrain.config.parts.instance", lambda *_, **__: Bare())
    with pytest.raises(ConfigError, match="it has no fields"):
        build_objective(dataclasses.replace(TaskConfig(), kind="ideas.bare"))


@pytest.mark.parametrize("blocks", [nn.ModuleDict({"one": nn.Linear(2, 2)}), nn.Linear(2, 2), 3])
def test_what_is_called_blocks_and_is_no_list_of_modules_is_a_part_as_any_other(blocks):
    network = nn.Module()
    network.blocks, network.layers = blocks, nn.ModuleList([nn.Linear(2, 2)])
    assert find_stacks(network) == [network.layers]
    network.blocks = nn.Sequential(nn.Linear(2, 2))
    assert find_stacks(network) == [network.blocks]
