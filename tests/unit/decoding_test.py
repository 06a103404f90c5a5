"""Texts that a decoder writes are those of transformers' own greedy search."""

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, MarianConfig, T5Config

from bigtrain.tasks.answers import write_greedily

NEVER, START, NUM_TOKENS = 3, 5, 12
SETTINGS = {
    "marian": MarianConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        pad_token_id=0,
        eos_token_id=NEVER,
        forced_eos_token_id=None,
        decoder_start_token_id=START,
        init_std=1.0,
    ),
    "t5": T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=NEVER,
        decoder_start_token_id=START,
        initializer_factor=20.0,
    ),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_what_is_written_is_what_transformers_writes(kind):
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(SETTINGS[kind]).eval()
    source_BS = torch.randint(6, 40, (16, 7))
    lengths_B = torch.randint(1, 8, (16,))
    mask_BS = (torch.arange(7) < lengths_B[:, None]).long()
    source_BS = source_BS.where(mask_BS == 1, 0)

    def network(tokens_BS, lengths_B, decoder_BT):
        return model(input_ids=tokens_BS, attention_mask=mask_BS, decoder_input_ids=decoder_BT).logits

    def write(eos_id):
        first_B = torch.full((16,), START)
        return write_greedily(network, (source_BS, lengths_B), first_B, num_tokens=NUM_TOKENS, eos_id=eos_id)

    with torch.no_grad():
        rows = write(NEVER).tolist()
        shares = {token: sum(token in row for row in rows) for token in range(6, 40)}
        eos_id = next(token for token, count in shares.items() if 0 < count < 16)  # texts of several lengths
        written_BT = write(eos_id)
        limits = {"num_beams": 1, "do_sample": False, "max_new_tokens": NUM_TOKENS, "eos_token_id": eos_id}
        right_BT = model.generate(source_BS, attention_mask=mask_BS, **limits)[:, 1:]
    assert written_BT.shape == (16, NUM_TOKENS)
    for written, right in zip(written_BT.tolist(), right_BT.tolist(), strict=True):
        end = right.index(eos_id) + 1 if eos_id in right else len(right)
        assert written[:end] == right[:end] and set(written[end:]) <= {eos_id}
