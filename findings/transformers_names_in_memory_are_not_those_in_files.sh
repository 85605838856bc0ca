#!/usr/bin/env bash
# transformers 5.23.0 gives the weights of many models other names in memory than in their files:
# save_pretrained renames, torch.save(model.state_dict()) does not. A checkpoint that a training
# script saves from Dinov2Model shares 10 of 18 names of a block with the published file, and a
# DINOv3ViTModel none. For CLIP both are alike, but CLIPVisionModel alone has lost the prefix
# "vision_model." that its tensors have in the files of CLIPModel.
#
# Output seen (CPython 3.11.7, torch 2.13.0, 2026-11-28):
#   Dinov2Model: 10 of 18 names of a block are in the file
#   DINOv3ViTModel: 0 of 17 names of a block are in the file
#   ViTModel: 0 of 16 names of a block are in the file
#   CLIPVisionModel: 16 of 16 names of a block are in the file
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy safetensors
env/bin/python - >seen 2>/dev/null <<'PYTHON'
import transformers
from safetensors import safe_open

sizes = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}
for name in ("Dinov2", "DINOv3ViT", "ViT", "CLIPVision"):
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}Model")(config)
    model.save_pretrained(name)
    with safe_open(f"{name}/model.safetensors", "pt") as file:
        stored = set(file.keys())
    block = [key for key in model.state_dict() if ".0." in key]
    found = sum(key in stored for key in block)
    print(f"{name}Model: {found} of {len(block)} names of a block are in the file")
PYTHON
cat seen
diff seen - <<'EXPECTED'
Dinov2Model: 10 of 18 names of a block are in the file
DINOv3ViTModel: 0 of 17 names of a block are in the file
ViTModel: 0 of 16 names of a block are in the file
CLIPVisionModel: 16 of 16 names of a block are in the file
EXPECTED
