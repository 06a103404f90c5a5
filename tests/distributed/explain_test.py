"""Explanations of classifiers: what is deleted first costs most, and gradients are those of the network."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bigtrain.config import Inputs
from bigtrain.data.read.batch import Batch
from bigtrain.run.explaining import SHARES, Classifier, gradient_times_input, log_odds, occlusion
from tests.distributed.launches import fork

DIGITS = ["+model=cnn_digits", "+experiment=digits_cnn", "data.augment={mixup:0}", "train.steps=150", "run.name=digits"]
TENTH = SHARES.index(0.1)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("digits")
    result = fork("train.py", *DIGITS, "validation.every_steps=150", cwd=directory)
    assert result.code == 0, result.err
    return directory


def test_important_pixels_cost_more_than_random_ones(digits: Path):
    result = fork("explain.py", "checkpoint=runs/digits", "index=[0,1]", cwd=digits)
    assert result.code == 0, result.err
    facts = json.loads((digits / "runs/digits/explain.json").read_text())
    right = facts["deletion"]["right"]
    assert right["gradient"][0] == right["random"][0] > 0.9 * facts["deletion"]["samples"] == 0.9 * 128
    for method in ("gradient", "occlusion"):
        assert right["random"][TENTH] - right[method][TENTH] > 0.15 * 128, right
    assert [len(sample["importance"]["occlusion"]) for sample in facts["samples"]] == [64, 64]
    page = (digits / "runs/digits/explain.html").read_text()
    assert page.count("data:image/png;base64") == 4 and "What deleting costs" in page
    assert "gradient" in result.out and "runs/digits/explain.html" in result.out


def test_inputs_of_a_file_are_explained_without_their_labels(digits: Path, tmp_path: Path):
    np.savez(tmp_path / "new.npz", pixels=np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype(np.float32))
    args = [
        "checkpoint=runs/digits",
        f"inputs={tmp_path}/new.npz",
        "index=[2]",
        "samples=0",
        f"out={tmp_path}/page.html",
    ]
    assert fork("explain.py", *args, cwd=digits).code == 0
    (sample,) = json.loads((tmp_path / "page.json").read_text())["samples"]
    assert sample["index"] == 2 and "label" not in sample
    result = fork("explain.py", *args[:2], "index=[3]", "samples=0", cwd=digits)
    assert (result.code, result.err.strip()) == (2, "index=[3]: there are 3 samples, counted from 0, and no 3")
    result = fork("explain.py", "checkpoint=runs/digits", "methods=[attention]", cwd=digits)
    assert result.code == 2 and "for encoders of text of transformers" in result.err


@pytest.mark.slow
def test_words_that_decide_are_found_and_attention_is_that_of_the_last_layer(tmp_path: Path):
    """A text is of one kind if it has the word ``good``; the rest of it are words of both kinds."""
    random = np.random.default_rng(0)
    words = ["tea", "sun", "rain", "house", "road", "tree", "bird", "stone"]
    rows = []
    for number in range(600):
        text = list(random.choice(words, size=8))
        text[random.integers(8)] = ("good", "bad")[number % 2]
        rows.append(json.dumps({"text": " ".join(text), "label": ("yes", "no")[number % 2]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    train = [
        *(
            "+model=bert_mini",
            "model.settings={num_hidden_layers:1,hidden_size:32,intermediate_size:64,vocab_size:400}",
        ),
        *(
            "task=classification",
            "data=jsonl",
            "data.content=labelled",
            "data.path=rows.jsonl",
            "data.sequence_length=32",
        ),
        *(
            "data.tokenizer_vocab_size=300",
            "data.validation_fraction=0.2",
            "train.steps=120",
            "train.global_batch_size=32",
        ),
        *("optimizer.lr=3e-3", "scheduler.warmup_steps=10", "validation.every_steps=120", "run.name=words"),
    ]
    result = fork("train.py", *train, cwd=tmp_path)
    assert result.code == 0, result.err
    methods = ["methods=[gradient,occlusion,attention]", "samples=64", "index=[0,1,2,3]"]
    result = fork("explain.py", "checkpoint=runs/words", *methods, cwd=tmp_path)
    assert result.code == 0, result.err
    facts = json.loads((tmp_path / "runs/words/explain.json").read_text())
    right = facts["deletion"]["right"]
    assert right["random"][0] > 0.9 * 64
    assert right["random"][TENTH] - right["occlusion"][TENTH] > 0.15 * 64, right
    for sample in facts["samples"]:
        assert sum(sample["importance"]["attention"]) <= 1.0001
        assert len(sample["tokens"]) == len(sample["importance"]["gradient"])


def test_gradients_and_occlusion_are_exact_for_a_linear_network():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    model, pixels = Classifier(network, Inputs.pixels, 0.0), torch.randn(3, 1, 3, 4)
    labels = torch.tensor([0, 1, 1])
    weight = network[1].weight[labels] - network[1].weight[1 - labels]
    expected = weight * pixels.flatten(1)
    batch = Batch(pixels=pixels)
    for method in (gradient_times_input, occlusion):
        assert torch.allclose(method(model, batch, labels), expected, atol=1e-5)
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    probability = logits.softmax(1)[0, 2]
    assert torch.allclose(log_odds(logits, torch.tensor([2])), (probability / (1 - probability)).log())
