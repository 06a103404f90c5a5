"""Pairs of answers: from rows to samples, and the losses that compare them."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bigtrain.config import Content, DataConfig, DataSource, Packing, PreferenceLoss, TaskConfig
from bigtrain.data.prepare.chat import Chat, find_chat
from bigtrain.data.prepare.corpus import prepare
from bigtrain.data.read.corpus import Corpus
from bigtrain.data.read.documents import PreferenceSamples, RatedSamples, document_samples
from bigtrain.data.read.tokenizer import load_tokenizer
from bigtrain.errors import DataError
from bigtrain.tasks import build_objective
from bigtrain.tasks.base import split_sums
from bigtrain.tasks.preference import Preference, without_adapters

OF_PAIRS = [loss for loss in PreferenceLoss if loss is not PreferenceLoss.kto]
QUESTION = {"role": "user", "content": "say a"}


def answer(text):
    return {"role": "assistant", "content": text}


def rows():
    yield {"prompt": "say a", "chosen": "a, gladly", "rejected": "no"}
    yield {"prompt": [QUESTION], "chosen": [answer("a")], "rejected": [answer("b, never")]}
    yield {"chosen": [QUESTION, answer("a a")], "rejected": [QUESTION, answer("b")]}
    yield {"prompt": "say a", "chosen": [QUESTION, answer("aa")], "rejected": [QUESTION, answer("a" * 60)]}


def samples_of(tmp_path, length=96):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    data = DataConfig(source=DataSource.jsonl, path=str(path), content=Content.preference, tokenizer="bytes")
    data.root, data.validation_fraction, data.packing = str(tmp_path / "data"), 0.0, Packing.preferences
    directory = prepare(data, progress=False)
    samples = PreferenceSamples(Corpus.open(directory, vocab_size=257).split("train"), length)
    return samples, load_tokenizer(directory)


def test_every_form_of_a_row_becomes_two_texts_of_which_the_answers_count(tmp_path):
    samples, tokenizer = samples_of(tmp_path)
    found = samples.gather(np.arange(4))
    prompt = "<|im_start|>user\nsay a<|im_end|>\n<|im_start|>assistant\n"
    expected = [("a, gladly", "no"), ("a", "b, never"), ("a a", "b"), ("aa", "a" * 60)]
    for number, texts in enumerate(expected):
        for name, text in zip(("chosen", "rejected"), texts, strict=True):
            ids, targets = found[name][number], found[f"{name}_targets"][number]
            whole = f"{prompt}{text}<|im_end|>\n"
            assert tokenizer.decode(ids[ids != 0].tolist()) == whole[: len(whole) - 1][:96]
            assert tokenizer.decode(targets[targets >= 0].tolist()) == whole[len(prompt) : 97]
            counted = np.flatnonzero(targets >= 0)
            assert (ids[counted[1:]] == targets[counted[:-1]]).all()
    assert samples.num_cut() == 1


def test_pairs_whose_answer_does_not_begin_within_a_sample_are_not_drawn(tmp_path):
    samples, _ = samples_of(tmp_path, length=20)
    assert samples.answered().size == 0


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": "a"}, "no field 'rejected'"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": []}, "field 'rejected': behind the prompt comes no answer"),
        (
            {"prompt": "x", "chosen": [QUESTION, answer("a")], "rejected": [QUESTION, answer("b")]},
            "field 'prompt': it is",
        ),
        (
            {"chosen": [QUESTION], "rejected": [QUESTION, answer("a")]},
            "field 'chosen': behind the prompt comes no answer",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "'chosen' and 'rejected' are the same"),
        ({"prompt": "q", "chosen": [answer("a") | {"mood": "x"}], "rejected": "b"}, "does not write its mood"),
    ],
)
def test_what_is_no_pair_is_refused(row, problem):
    with pytest.raises(ValueError, match=problem):
        find_chat("bytes", None).write_answers(row, ("chosen", "rejected"))


def test_only_losses_with_a_reference_read_one():
    reads = [loss for loss in PreferenceLoss if "log_probabilities" in Preference(loss=loss).fields]
    assert reads == [loss for loss in PreferenceLoss if loss.has_reference] and PreferenceLoss.orpo not in reads


def test_a_template_that_writes_the_prompt_otherwise_is_refused():
    template = "{% if add_generation_prompt %}?{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="does not write the answer behind what asks for it"):
        Chat({"default": template}, {}).write_answers(
            {"prompt": "q", "chosen": "a", "rejected": "b"}, ("chosen", "rejected")
        )


class Adapted(torch.nn.Module):
    """Logits of a table, to which an adapter adds another one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base, self.added = torch.randn(11, 11), torch.nn.Parameter(torch.randn(11, 11))
        self._disable_adapters = False

    def forward(self, tokens, predicts=True):
        return (self.base if self._disable_adapters else self.base + self.added)[tokens]


def pair():
    chosen, rejected = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]]), torch.tensor([[1, 2, 8], [4, 9, 9]])
    chosen_targets, rejected_targets = (
        torch.tensor([[-100, 3, 9, -100], [-100, 6, 7, 1]]),
        torch.tensor([[-100, 8, 4], [-100, -100, 2]]),
    )
    return chosen, chosen_targets, rejected, rejected_targets


def log_probability(table, tokens, targets):
    counted = targets >= 0
    nats = -F.cross_entropy(table[tokens[counted]], targets[counted], reduction="sum")
    return nats, int(counted.sum())


@pytest.mark.parametrize("loss", [loss for loss in OF_PAIRS if loss.has_reference])
def test_a_scored_reference_stands_for_the_base(loss):
    objective, network = build_objective(TaskConfig(kind="preference", loss=loss)), Adapted()
    sides = (pair()[:2], pair()[2:])
    scored = [[log_probability(network.base, tokens[n], targets[n])[0] for tokens, targets in sides] for n in (0, 1)]
    assert torch.allclose(objective(network, *pair(), torch.tensor(scored)), objective(network, *pair()))
    assert not torch.allclose(objective(network, *pair(), torch.zeros(2, 2)), objective(network, *pair()))


@pytest.mark.parametrize("loss", OF_PAIRS)
def test_losses_are_those_of_their_authors(loss):
    network, beta, margin = Adapted(), 0.3, 0.5
    objective = build_objective(TaskConfig(kind="preference", loss=loss, beta=beta, margin=margin))
    found = objective(network, *pair())
    expected, right = 0.0, 0
    for number in (0, 1):
        scores = []
        for side in (0, 2):
            tokens, targets = (tensor[number] for tensor in pair()[side : side + 2])
            (now, length), (before, _) = (
                log_probability(table, tokens, targets)
                for table in ((network.base + network.added).detach(), network.base)
            )
            mean = now / length
            scores.append(
                {
                    PreferenceLoss.dpo: now - before,
                    PreferenceLoss.ipo: (now - before) / length,
                    PreferenceLoss.orpo: mean,
                    PreferenceLoss.simpo: mean,
                }[loss].item()
            )
        difference = scores[0] - scores[1]
        right += difference > 0
        odds = [score - math.log(1 - math.exp(score)) for score in scores] if loss is PreferenceLoss.orpo else [0, 0]
        expected += {
            PreferenceLoss.dpo: math.log1p(math.exp(-beta * difference)),
            PreferenceLoss.ipo: (difference - 1 / (2 * beta)) ** 2,
            PreferenceLoss.orpo: -scores[0] + beta * math.log1p(math.exp(odds[1] - odds[0])),
            PreferenceLoss.simpo: math.log1p(math.exp(margin - beta * difference)),
        }[loss]
    assert found[0].item() == pytest.approx(expected, rel=1e-5)
    metrics = objective.metrics(0.0, split_sums(objective, found[1:].tolist()))
    assert metrics["accuracy"] == right / 2
    found[0].backward()
    assert network.added.grad.abs().sum() > 0 and not network._disable_adapters


def test_padding_and_pairs_that_lack_an_answer_count_for_nothing():
    objective = build_objective(TaskConfig(kind="preference"))
    chosen, chosen_targets, rejected, rejected_targets = pair()
    whole = objective(Adapted(), chosen[:1], chosen_targets[:1], rejected[:1], rejected_targets[:1])
    rejected_targets[1] = -100
    names = list(objective.fields)[:4]
    batch = (chosen, chosen_targets, rejected, rejected_targets)
    assert torch.allclose(objective(Adapted(), *batch), whole)
    assert objective.count({name: tensor.numpy() for name, tensor in zip(names, batch, strict=True)}).tolist() == [1, 0]


def test_without_adapters_is_undone_when_it_fails():
    network = Adapted()
    with pytest.raises(ZeroDivisionError), without_adapters(network):
        assert network._disable_adapters and not network.training, "the reference is computed without dropout"
        _ = 1 / 0
    assert not network._disable_adapters and network.training


def rated(tmp_path, rows, length=96):
    path = tmp_path / "rated.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(source=DataSource.jsonl, path=str(path), content=Content.rated, tokenizer="bytes")
    data.root, data.validation_fraction, data.packing = str(tmp_path / "data"), 0.0, Packing.preferences
    directory = prepare(data, progress=False)
    return document_samples(
        Corpus.open(directory, vocab_size=257).split("train"), dataclasses.replace(data, sequence_length=length)
    )


def test_rated_answers_are_read_with_their_own_prompt_and_with_another_one(tmp_path):
    rows = [{"prompt": f"say {n}", "completion": "ab" * (n + 1), "label": n != 1} for n in range(3)]
    rows[2]["completion"] = [answer(rows[2]["completion"])]
    samples = rated(tmp_path, rows)
    found, tokenizer = samples.gather(np.arange(3)), load_tokenizer(next((tmp_path / "data").iterdir()))
    assert found["labels"].tolist() == [1, 0, 1] and isinstance(samples, RatedSamples)
    for number in range(3):
        for name, other in (("chosen", number), ("rejected", (number + 1) % 3)):
            ids, targets = found[name][number], found[f"{name}_targets"][number]
            prompt, text = f"<|im_start|>user\nsay {number}<|im_end|>\n<|im_start|>assistant\n", "ab" * (other + 1)
            whole = f"{prompt}{text}<|im_end|>\n"
            assert tokenizer.decode(ids[ids != 0].tolist()) == whole
            assert tokenizer.decode(targets[targets >= 0].tolist()) == whole[len(prompt) :]
    assert rated(tmp_path, rows, length=20).answered().size == 0


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "completion": "b"}, "no field 'label'; set data.label_field"),
        (
            {"prompt": "a", "completion": "b", "label": "fine"},
            "field 'label' is 'fine': true of a good answer, else false",
        ),
        ({"prompt": "a", "label": True}, "no field 'completion': a row has a 'prompt'"),
        ({"completion": "a", "label": True}, "no prompt that is not empty"),
    ],
)
def test_what_is_not_rated_is_refused(tmp_path, row, problem):
    with pytest.raises(DataError, match=problem):
        rated(tmp_path, [row])


def test_kto_judges_from_the_mean_over_the_whole_step():
    network, weights = Adapted(), {"desirable_weight": 2.0, "undesirable_weight": 0.5}
    objective = build_objective(TaskConfig(kind="preference", loss=PreferenceLoss.kto, beta=0.3, **weights))
    labels = torch.tensor([1, 0])
    total, number = objective.averaged(network, *pair(), labels)
    after, ratios = (network.base + network.added).detach(), {}
    for side in (0, 2):
        texts = list(zip(*pair()[side : side + 2], strict=True))
        ratios[side] = [
            (log_probability(after, *text)[0] - log_probability(network.base, *text)[0]).item() for text in texts
        ]
    assert total.item() == pytest.approx(sum(ratios[2]), rel=1e-5) and number == 2
    for mean in (0.7, -1.0):
        found = objective(network, *pair(), labels, torch.full((2,), mean))
        kl = max(mean, 0.0)
        good, bad = (
            1 / (1 + math.exp(-0.3 * (ratio - kl) * sign)) for ratio, sign in zip(ratios[0], (1, -1), strict=True)
        )
        assert found[0].item() == pytest.approx(2.0 * (1 - good) + 0.5 * (1 - bad), rel=1e-5)
        metrics = objective.metrics(0.0, split_sums(objective, found[1:].tolist()))
        assert metrics["kl"] == pytest.approx(kl) and metrics["chosen_reward"] == pytest.approx(
            0.3 * ratios[0][0], rel=1e-5
        )
    scored = torch.tensor(
        [[log_probability(network.base, pair()[s][n], pair()[s + 1][n])[0] for s in (0, 2)] for n in (0, 1)]
    )
    mean = torch.zeros(2)
    assert torch.allclose(objective(network, *pair(), labels, scored, mean), objective(network, *pair(), labels, mean))
    assert torch.allclose(objective.averaged(network, *pair(), labels, scored), torch.stack([total, number]))
    padding = (*pair()[:1], torch.full((2, 4), -100), *pair()[2:], torch.full((2,), -100), mean)
    assert not objective(network, *padding).any() and not objective.averaged(network, *padding[:5]).any()
