"""The section ``task``."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from bigtrain.config.bounds import Bound, OnlyIf
from bigtrain.config.choices import Divergence, Inputs, Noise, PreferenceLoss, TaskKind


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """What the run minimises and measures."""

    kind: str = TaskKind.causal_lm.name
    """``causal_lm``: the next token; ``masked_lm``: hidden tokens; ``classification``: one label per sample; ``token_classification``: one per token; ``regression``: numbers per sample; ``seq2seq``: a text from a text; ``denoise``: a text from one with gaps; ``contrastive``: which two texts are a pair; ``preference``: which of two answers; ``reward``: a number for each of two answers; ``distillation``: the next token and what a teacher says of it; ``ctc`` and ``speech``: a text from audio; ``gan``: images like those of the data, from noise; or the name of an own part, such as ``ideas.focal``."""
    settings: Annotated[dict[str, Any], OnlyIf("kind", not_in=tuple(TaskKind.__members__))] = field(
        default_factory=dict
    )
    """Settings of an own objective."""
    mask_share: Annotated[float, Bound(gt=0, le=1), OnlyIf("kind", is_in=("masked_lm", "denoise"))] = 0.15
    """Expected share of the words, with ``denoise`` of the tokens, that are hidden and predicted."""
    noise: Annotated[Noise, OnlyIf("kind", is_in=("denoise",))] = Noise.spans
    """``spans``: each gap is a sentinel, and the target is what is in the gaps (T5); ``infilling``: each gap is a mask, and the target is the whole text (BART, which hides a share of 0.3)."""
    mean_span: Annotated[float, Bound(ge=1, le=100), OnlyIf("kind", is_in=("denoise",))] = 3.0
    """Mean length of a gap in tokens."""
    mask_id: Annotated[int | None, Bound(ge=0), OnlyIf("kind", is_in=("masked_lm", "denoise"))] = None
    """Token that stands for a hidden one; by default the tokenizer's own, or the first id that it does not use."""
    inputs: Annotated[Inputs | None, OnlyIf("kind", is_in=("classification", "regression"))] = None
    """Column of the data that the network gets; by default ``tokens`` of text, ``pixels`` of images, ``features`` of records."""
    loss: Annotated[PreferenceLoss, OnlyIf("kind", is_in=("preference",))] = PreferenceLoss.dpo
    """``dpo`` and ``ipo`` compare with ``data.scores`` or the base of the adapters, ``orpo`` and ``simpo`` with nothing; ``kto`` reads rated answers in place of pairs, and compares as ``dpo``."""
    beta: Annotated[float, Bound(gt=0, le=10**4), OnlyIf("kind", is_in=("preference",))] = 0.1
    """Weight of the log-probabilities, or of ORPO's odds."""
    margin: Annotated[float, Bound(ge=0), OnlyIf("loss", is_in=("simpo",))] = 0.0
    """By how much rewards are to differ at least."""
    desirable_weight: Annotated[float, Bound(ge=0, le=10**4), OnlyIf("loss", is_in=("kto",))] = 1.0
    """Factor of the loss of good answers."""
    undesirable_weight: Annotated[float, Bound(ge=0, le=10**4), OnlyIf("loss", is_in=("kto",))] = 1.0
    """Factor of the loss of bad answers."""
    divergence: Annotated[Divergence, OnlyIf("kind", is_in=("distillation",))] = Divergence.forward
    """Kullback-Leibler divergence of the teacher from the student (``forward``), or of the student from the teacher."""
    teacher_weight: Annotated[float, Bound(ge=0, le=1), OnlyIf("kind", is_in=("distillation",))] = 0.5
    """Share of the divergence in the loss; the rest is the cross-entropy of the next token."""
    teacher_temperature: Annotated[float, Bound(gt=0, le=10**3), OnlyIf("kind", is_in=("distillation",))] = 1.0
    """Logits of teacher and student are divided by it in the divergence, which is multiplied by its square."""
    num_labels: Annotated[int | None, Bound(ge=2), OnlyIf("kind", is_in=("classification", "token_classification"))] = (
        None
    )
    """Labels are below this, and the network returns as many logits; by default as many as text or images have names, of records 2."""
    multi_label: Annotated[bool, OnlyIf("kind", is_in=("classification",))] = False
    """A sample has any number of labels: text with a list of them, records with a 0 or 1 for each."""
    class_weights: Annotated[Any, OnlyIf("kind", is_in=("classification",))] = None
    """Factor of the loss of each label, such as ``[1.0,5.0]`` (with ``multi_label`` of where it is there); ``balanced`` weighs all labels alike on the training side."""
    group_by: Annotated[str | None, OnlyIf("kind", is_in=("classification",))] = None
    """Column of ``data=records`` with the group of each sample, from 0 to 15 (-1: none): validations have accuracy and F1 of each, and the largest gap."""
    temperature: Annotated[float, Bound(gt=0), OnlyIf("kind", is_in=("contrastive",))] = 0.05
    """Cosines of embeddings are divided by it."""
    symmetric: Annotated[bool, OnlyIf("kind", is_in=("contrastive",))] = False
    """Sources are to be found by their targets, too, with half of the loss (CLIP)."""
    noise_dim: Annotated[int, Bound(ge=1, le=10**5), OnlyIf("kind", is_in=("gan",))] = 64
    """Normal numbers that an image is made from."""
    num_values: Annotated[int, Bound(ge=1), OnlyIf("kind", is_in=("regression",))] = 1
    """Numbers of a sample that are predicted, as many as the network returns."""
