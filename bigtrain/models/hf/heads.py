"""Networks of transformers for tasks other than language models: one class each, given the task's tensors in their order.

Shape suffixes: B batch, T tokens.
"""

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bigtrain.config import Head
from bigtrain.errors import ConfigError, first_line, of_all_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel
else:  # which takes seconds to import
    PreTrainedModel = nn.Module


@dataclass(frozen=True, slots=True)
class HeadKind:
    """What transformers has for a head."""

    auto: str  # its class that finds the network of an architecture
    what: str  # what the network is, in messages
    architectures: str  # those that have it, in messages
    has_vocabulary: bool = True  # whether the network's input or output are ids of a tokenizer
    is_fresh: bool = False  # whether published weights may lack the head, which begins with fresh values then
    has_lengths: bool = False  # whether the lengths of the inputs follow them
    has_decoder: bool = False  # whether the tokens of a decoder come last


_ENCODER = "an encoder, such as bert or modernbert"
HEADS = {
    Head.causal_lm: HeadKind("AutoModelForCausalLM", "causal language model", "a decoder-only architecture"),
    Head.masked_lm: HeadKind("AutoModelForMaskedLM", "masked language model", _ENCODER),
    Head.sequence_classification: HeadKind(
        "AutoModelForSequenceClassification", "classifier of text", _ENCODER, is_fresh=True, has_lengths=True
    ),
    Head.token_classification: HeadKind(
        "AutoModelForTokenClassification", "classifier of tokens", _ENCODER, is_fresh=True, has_lengths=True
    ),
    Head.image_classification: HeadKind(
        "AutoModelForImageClassification",
        "classifier of images",
        "one for images, such as vit or convnext",
        has_vocabulary=False,
        is_fresh=True,
    ),
    Head.audio_classification: HeadKind(
        "AutoModelForAudioClassification",
        "classifier of audio",
        "one for audio, such as wav2vec2 or audio-spectrogram-transformer",
        has_vocabulary=False,
        is_fresh=True,
        has_lengths=True,
    ),
    Head.seq2seq_lm: HeadKind(
        "AutoModelForSeq2SeqLM",
        "sequence to sequence model",
        "an encoder with a decoder, such as t5 or marian",
        has_lengths=True,
        has_decoder=True,
    ),
    Head.ctc: HeadKind(
        "AutoModelForCTC",
        "model with connectionist temporal classification",
        "wav2vec2",
        is_fresh=True,
        has_lengths=True,
    ),
    # A classifier, for its trunk has the names that other tasks give it; what is outside is not used.
    Head.embedding: HeadKind(
        "AutoModelForSequenceClassification", "encoder of text", _ENCODER, is_fresh=True, has_lengths=True
    ),
    Head.speech_seq2seq: HeadKind(
        "AutoModelForSpeechSeq2Seq", "speech to text model", "one for speech, such as whisper", has_decoder=True
    ),
}
_RANDOM_BY_RANK = {"layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "apply_spec_augment": False}
"""Settings by which each rank would leave out layers of its own, so that collectives do not meet, or mask by numbers
that do not follow from the run's seed."""


def prepare_config(hf_config: Any, head: Head, num_outputs: int | None) -> None:
    """Set what a head needs in a transformers configuration, in place; ValueError if it cannot be trained."""
    if head in (Head.causal_lm, Head.masked_lm):
        return
    for name, value in _RANDOM_BY_RANK.items():
        if hasattr(hf_config, name):
            setattr(hf_config, name, value)
    if num_outputs is not None and hf_config.num_labels != num_outputs:
        hf_config.num_labels = num_outputs
    if head is not Head.sequence_classification:
        return
    if hf_config.is_encoder_decoder:
        raise ValueError("it classifies at tokens that end a text, and samples need not have one")
    text = hf_config.get_text_config()
    if text.pad_token_id is None:  # decoders are read at the last token before the padding
        end = text.eos_token_id
        text.pad_token_id = end if isinstance(end, int) and end < text.vocab_size else 0


class HFNetwork(nn.Module):
    """A network of transformers with the head of a task, given the task's tensors in their order.

    Parameter names are those of transformers with ``causal_lm.`` in front, in all, so that runs of different tasks share
    the names of what they have in common.
    """

    causal_lm: PreTrainedModel

    def __init__(self, network: PreTrainedModel, head: Head):
        super().__init__()
        self.causal_lm = network
        self.head = head
        text_config = network.config.get_text_config()
        self.vocab_size: int | None = getattr(text_config, "vocab_size", None)
        self._padding: int | None = getattr(text_config, "pad_token_id", None)
        self.arguments = set(inspect.signature(network.forward).parameters)

    @property
    def output_layer(self) -> nn.Module | None:
        """The layer that makes logits over a vocabulary of states ``(..., D)``."""
        return self.causal_lm.get_output_embeddings()

    def forward(self, inputs: Tensor, *others: Tensor) -> Any:
        """Return logits: ``(B, C)``, or ``(B, T, C)`` of a classifier of tokens or a decoder; or embeddings ``(B, D)``.

        ``others`` are lengths ``(B,)`` of the inputs, for the heads that have them, then tokens ``(B, T)`` of the
        decoder. ConfigError: inputs are not of the network's size.
        """
        kind, given = HEADS[self.head], dict[str, Any]()
        if kind.has_decoder:
            others, given["decoder_input_ids"] = others[:-1], others[-1]
        if others:
            is_input = torch.arange(inputs.shape[1], device=inputs.device) < others[0][:, None]
            if kind.has_vocabulary and not inputs.is_floating_point() and self._padding is not None:
                inputs = inputs.where(is_input, self._padding)
            given["attention_mask"] = is_input.long()
        if "use_cache" in self.arguments:
            given["use_cache"] = False
        given = {name: value for name, value in given.items() if name in self.arguments}
        given[self.causal_lm.main_input_name] = inputs
        try:
            if self.head is Head.embedding:
                states = self.causal_lm.base_model(**given)[0]
                return (states * is_input[:, :, None]).sum(dim=1) / others[0][:, None]
            logits = self.causal_lm(**given).logits
        except ValueError as error:  # transformers' checks of sizes
            raise of_all_ranks(ConfigError(f"{type(self.causal_lm).__name__}: {first_line(error)}")) from error
        if self.head is Head.ctc:
            of_speech: Any = self.causal_lm
            return logits, of_speech._get_feat_extract_output_lengths(others[0])
        return logits

    def example(self, length: int) -> tuple[Tensor, ...]:
        """Return the tensors of one sample of ``length`` tokens, or of the network's own size, on the CPU."""
        config: Any = self.causal_lm.config  # of a class of its architecture
        head = HEADS[self.head]
        lengths = [torch.tensor([length])] if head.has_lengths else []
        tokens = None
        if head.has_vocabulary:  # not of padding, which has no position in some networks
            tokens = torch.full((1, length), ((self._padding or 0) + 1) % self.vocab_size, device="cpu")
        match self.causal_lm.main_input_name:
            case "pixel_values":
                size = getattr(config, "image_size", None) or 224
                size = list(size) if isinstance(size, list | tuple) else [size, size]
                return (torch.zeros(1, getattr(config, "num_channels", 3), *size),)
            case "input_features":
                inputs = torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions)
            case "input_values" if hasattr(config, "num_mel_bins"):
                return (torch.zeros(1, config.max_length, config.num_mel_bins),)
            case "input_values":
                inputs, lengths = torch.zeros(1, 4000), [torch.tensor([4000])]
            case _:
                inputs = tokens
        return (inputs, *lengths, *([tokens] if head.has_decoder else []))


def is_of_head(network: PreTrainedModel, name: str) -> bool:
    """Return whether a tensor of a network of transformers, or of its files, is outside its trunk, or of a pooler."""
    prefix = network.base_model_prefix
    trunk = getattr(network, prefix, None)
    if trunk is None:  # encoder and decoder are the network's own
        return False
    first, *_ = name.removeprefix(f"{prefix}.").partition(".")
    return first == "pooler" or not (name.startswith(f"{prefix}.") or first in trunk._modules)
