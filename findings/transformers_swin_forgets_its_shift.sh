#!/usr/bin/env bash
# transformers 5.23.0: what a Swin V1 gives for a large picture depends on whether it has seen a small one.
#
# SwinLayer clips its window and sets its shift to 0 in the forward pass, where a grid is no larger than
# the window, and keeps both in the module. Later pictures with a larger grid are then computed without
# the shift, for ever, in eval mode and under no_grad alike. At its own 224 pixels every published Swin
# has such a grid in its last stage: a model that ran once at 224 is another network at 448 than one that
# did not. Swin V2 decides in its constructor and has no such memory.
#
# Seen: the same model, weights and picture of 64 pixels, before and after one of 32 pixels:
#   largest difference, relative to the largest value: 0.045
#   a copy that saw nothing before: 0.000
set -euo pipefail
PYTHON=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 numpy==2.4.6

cat > "$folder/compare.py" <<'PY'
import copy

import torch
from transformers import SwinConfig, SwinModel

torch.manual_seed(0)
shape = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "patch_size": 4, "window_size": 4}
model = SwinModel(SwinConfig(image_size=32, **shape)).eval()
fresh = copy.deepcopy(model)
small, large = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 64, 64)


def features(network, pixels):
    with torch.no_grad():
        return network(pixels, interpolate_pos_encoding=True).last_hidden_state


def difference(found):
    return float((found - before).abs().max() / before.abs().max())


before = features(model, large)
features(model, small)
after, unseen = difference(features(model, large)), difference(features(fresh, large))
print(f"largest difference, relative to the largest value: {after:.3f}")
print(f"a copy that saw nothing before: {unseen:.3f}")
assert after > 0.01 and unseen < 1e-5, (after, unseen)
PY
"$folder/env/bin/python" "$folder/compare.py" 2>/dev/null
