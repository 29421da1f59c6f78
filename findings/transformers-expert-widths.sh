#!/usr/bin/env bash
#
# transformers 5.24.0 with torch 2.13.0 on a CPU: a mixture of experts as it is made, or loaded, does
# not compute if the width of its experts is no multiple of 16 bytes; with
# experts_implementation="eager" it does.
#
# Guess beforehand: the width of an expert is free, and whatever implementation is the default takes
# every width that eager takes.
# Seen: the default is "grouped_mm" wherever torch has it. A Qwen3-Next of moe_intermediate_size 14
# in fp32 (56 bytes a row) raises RuntimeError "strides should be multiple of 16 bytes" in its first
# forward pass, and saves and loads without a word. With 16 both compute the same. So widths of tiny
# models in tests, and of experts that were pruned, need eager. Source:
# transformers/integrations/moe.py, torch/nn/functional.py (grouped_mm).
#
# Installs into a temporary folder; fails if the width is accepted by now.

set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "transformers==5.24.0" "numpy==2.4.6"

cat >"$folder/widths.py" <<'PYTHON'
import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM


def model(width):
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        layer_types=["full_attention"] * 2,
    )
    return Qwen3NextForCausalLM(config).eval()


@torch.no_grad()
def logits(width, how=None):
    made = model(width)
    if how is not None:
        made.set_experts_implementation(how)
    return made(torch.arange(9).unsqueeze(0)).logits


def refused(width):
    try:
        logits(width)
    except RuntimeError as error:
        return str(error)
    return None


said = refused(14)
print("width 14:", said)
assert said is not None and "16 bytes" in said
assert logits(14, "eager").isfinite().all()
assert refused(16) is None
torch.testing.assert_close(logits(16), logits(16, "eager"), rtol=0, atol=1e-5)
PYTHON
"$folder/env/bin/python" "$folder/widths.py"
