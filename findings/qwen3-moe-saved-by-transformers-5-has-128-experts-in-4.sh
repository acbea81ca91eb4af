#!/usr/bin/env bash
# One would guess: config.json of a Qwen3-MoE saved by transformers 5 names its number of experts as the published ones
# do, `num_experts`, for the class still has an attribute of that name. transformers 5 writes `num_local_experts` alone
# and reads both; transformers 4.57 reads `num_experts` alone and builds the default of 128 experts. Of Qwen2-MoE, whose
# class has the same attribute, the number stays.
# Seen with transformers 5.23.0 and 4.57.6.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for version in 5.23.0 4.57.6; do
    python3 -m venv "$version"
    "$version/bin/pip" install -q "transformers==$version"
done
cat >read.py <<'PYTHON'
import sys

import transformers

found = {}
for kind in ("Qwen3Moe", "Qwen2Moe"):
    config = getattr(transformers, f"{kind}Config")
    if transformers.__version__.startswith("5"):
        config(num_experts=4).save_pretrained(kind)
    found[kind] = config.from_pretrained(kind).num_experts
print("transformers", transformers.__version__, "reads", found)
sys.exit(0 if found == {"Qwen3Moe": int(sys.argv[1]), "Qwen2Moe": 4} else 1)
PYTHON
5.23.0/bin/python read.py 4
grep -o '"num[a-z_]*experts": [0-9]*' Qwen3Moe/config.json Qwen2Moe/config.json
4.57.6/bin/python read.py 128
