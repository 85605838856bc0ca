#!/usr/bin/env bash
# transformers 5.23.0: ResNetConfig.hidden_act is the activation of the stem and after the sum of a block.
# Inside of blocks it is always ReLU, because ResNetBasicLayer and ResNetBottleNeckLayer make their
# ResNetConvLayers without it.
#
# A network that another library trained with, say, GELU throughout therefore has other features in
# this class, without an error. fd_jax refuses a config.json of a ResNet whose hidden_act is not relu,
# and writes no other one.
#
# Seen, for a stem and four blocks of two convolutions: GELU 5, ReLU 4
set -euo pipefail
PYTHON=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 numpy==2.4.6 2>/dev/null

cat > "$folder/count.py" <<'PY'
import collections

import torch
import transformers

config = transformers.ResNetConfig(
    hidden_act="gelu", embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic"
)
model = transformers.ResNetModel(config).eval()
called = collections.Counter()
for module in model.modules():
    if not list(module.children()) and module.__class__.__module__.endswith("activation"):
        module.register_forward_hook(lambda m, *_: called.update([type(m).__name__]))
    elif type(module).__name__.startswith("GELU"):
        module.register_forward_hook(lambda m, *_: called.update(["GELU"]))
with torch.no_grad():
    model(torch.zeros(1, 3, 64, 64))
gelu, relu = sum(n for k, n in called.items() if "GELU" in k), called["ReLU"]
print(f"GELU {gelu}, ReLU {relu}")
assert (gelu, relu) == (5, 4)
PY
"$folder/env/bin/python" "$folder/count.py" 2>/dev/null
