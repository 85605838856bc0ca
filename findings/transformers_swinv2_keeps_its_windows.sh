#!/usr/bin/env bash
# transformers 5.23.0: a Swin V2 at another image size is another network than one made for that size.
#
# A grid that is no larger than the window clips it, and then nothing is shifted. Swinv2Layer decides
# this in its constructor, from the image_size of the config; Microsoft's code and timm decide it for
# the size that is run, and so does transformers' own Swin V1, at every forward pass. No tensor of V2
# depends on the window, so the same weights load into both, and the model takes images of any size
# without an error. Every published Swin V2 is concerned: the window fills the grid of its last stage.
#
# Seen: at the size of both: largest difference 0.0; at twice the size: largest difference above 0.1
set -euo pipefail
PYTHON=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 numpy==2.4.6

cat > "$folder/compare.py" <<'PY'
import torch
from transformers import Swinv2Config, Swinv2Model

torch.manual_seed(0)


def made_for(size):
    shape = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "patch_size": 4}
    return Swinv2Model(Swinv2Config(image_size=size, window_size=4, **shape)).eval()


small, same, large = made_for(32), made_for(32), made_for(64)
with torch.no_grad():
    for weight in small.parameters():
        weight.add_(0.2 * torch.randn_like(weight))
for other in (same, large):
    other.load_state_dict(small.state_dict(), strict=True)


def largest_difference(one, other, size):
    pixels = torch.randn(1, 3, size, size)
    with torch.no_grad():
        return float((one(pixels)[0] - other(pixels)[0]).abs().max())


print("at the size of both: largest difference", largest_difference(small, same, 32))
print("at twice the size: largest difference above 0.1:", largest_difference(small, large, 64) > 0.1)
PY
"$folder/env/bin/python" "$folder/compare.py" 2>/dev/null | tee "$folder/seen.txt"
grep -qx 'at the size of both: largest difference 0.0' "$folder/seen.txt"
grep -qx 'at twice the size: largest difference above 0.1: True' "$folder/seen.txt"
echo "as described"
