#!/usr/bin/env bash
# A small chat model made on the spot: a Llama learns what this machine's standard library says of itself, then by LoRA to
# answer questions about it, then by DPO to come to the point; exports in transformers and peft, and a page with the
# answers of each. Minutes on two CPU cores. Started by `make demo-finetune`; every command below can be typed as it stands.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # ranks x threads = cores

files=runs/demo-finetune
train=(torchrun --standalone --nproc-per-node=2 launch/train.py run.root=$files)
adapters=(model.pretrained=true +adapter=lora model.adapter.rank=16 model.adapter.alpha=32)
prompts=(validation.prompts=$files/prompts.txt validation.prompt_tokens=40)
llama='{vocab_size: 2048, hidden_size: 128, intermediate_size: 384, num_hidden_layers: 4, num_attention_heads: 4, max_position_embeddings: 256, tie_word_embeddings: true}'

step() {
  printf '\n\033[1m%s\033[0m\n' "$1"
  shift
  printf '$ %s\n' "$*"
  "$@"
}

step "1. Texts, a tokenizer with a chat template, chats, and pairs of answers" python launch/demo_finetune.py make $files
step "2. Train on text" "${train[@]}" +model=hf model.architecture=llama "model.settings=$llama" +experiment=demo \
  data=jsonl data.path=$files/texts.jsonl data.tokenizer=$files/tokenizer data.sequence_length=128 "${prompts[@]}" \
  train.steps=600 validation.every_steps=600 run.name=text
step "3. Export it" python launch/export.py checkpoint=$files/text out=$files/base
step "4. Train adapters on the answers of chats" "${train[@]}" +model=hf model.name=$files/base "${adapters[@]}" \
  +experiment=finetune "${prompts[@]}" data.path=$files/chats.jsonl run.name=chats
step "5. Export them, merged" python launch/export.py checkpoint=$files/chats out=$files/sft
step "6. Train adapters on pairs of answers" "${train[@]}" +model=hf model.name=$files/sft "${adapters[@]}" \
  +experiment=preferences "${prompts[@]}" data.path=$files/pairs.jsonl run.name=pairs
step "7. Export them, merged" python launch/export.py checkpoint=$files/pairs out=$files/merged
step "8. Export them alone" python launch/export.py checkpoint=$files/pairs out=$files/adapter merge=false
step "9. Open both in transformers and peft" python launch/demo_finetune.py check $files
step "10. Write a page with the answers of all three" python launch/report.py $files/text $files/chats $files/pairs \
  out=$files/report.html

printf '\nThe page is %s/report.html. Remove %s to see it again.\n' $files $files
