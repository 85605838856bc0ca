#!/usr/bin/env bash
# transformers 5.23.0: the relative position bias of a BEiT whose pictures are not square.
#
# A BEiT built for such pictures has a bias table whose rows are ordered height first. At every
# forward pass the table goes through an interpolation to the size of the picture, which should
# leave it as it is at the model's own size. It is reshaped with height and width exchanged first,
# so for a grid that is not square the bias of nearly every pair of patches is that of another
# offset. There is no error. For a square grid the exchange has no effect, so a test with square
# pictures cannot see it.
#
# Seen: square: largest difference 0.0; wide: largest difference above 1 (the entries are 0, 1, 2...)
set -euo pipefail
PYTHON=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 numpy==2.4.6

cat > "$folder/compare.py" <<'PY'
import torch
from transformers import BeitConfig
from transformers.models.beit.modeling_beit import BeitRelativePositionBias


def largest_difference(height, width):
    """Between the bias that the module gives at its own size and the rows of its own table."""
    config = BeitConfig(
        image_size=(8 * height, 8 * width), patch_size=8, hidden_size=8, num_attention_heads=1
    )
    module = BeitRelativePositionBias(config)
    table = module.relative_position_bias_table
    table.data = torch.arange(table.numel(), dtype=torch.float32).reshape(table.shape)
    index = module.generate_relative_position_index((height, width))
    with torch.no_grad():
        got = module((height, width)).squeeze()
    return float((got - table.data[index].squeeze()).abs().max())


print("square: largest difference", largest_difference(3, 3))
print("wide: largest difference above 1:", largest_difference(2, 4) > 1)
PY
"$folder/env/bin/python" "$folder/compare.py" 2>/dev/null | tee "$folder/seen.txt"
grep -qx 'square: largest difference 0.0' "$folder/seen.txt"
grep -qx 'wide: largest difference above 1: True' "$folder/seen.txt"
echo "as described"
