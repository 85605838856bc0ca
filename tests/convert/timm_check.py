"""Opens the folders that we write for timm with timm, strictly, and compares the features.

    pip install timm && python -m tests.convert.timm_check

Apart from the test suite, whose packages do not include timm and its torchvision.
"""

from pathlib import Path
import tempfile

import jax
import numpy as np

from fd_jax import inference
from fd_jax.convert import exporting, families, importing
from tests.convert import oracles, synthetic

TOLERANCE = 1e-5
SOURCES = (
    "dino_vitb16",
    "deit_base_patch16_224",
    "openai_clip_vit_b16",
    "open_clip_vit_b16_laion2b",
    "dinov2_vitb14",
    "dinov2_vitb14_reg4",
    "dinov3_vitb16",
    "dinov3_vitb16_hf",
    "siglip2_base_patch16_224_hf",
    "timm_beit_base_patch16_224",
    "fd_official_distilled_clip_vit_b",
    "fd_official_finetuned_clip_vit_b",
    "esvit_swin_base_w14",
    "timm_swin_base_patch4_window7_224",
    "swinv2_base_patch4_window8_256",
    "swinv2_large_patch4_window12to16_192to256_22kto1k_ft",
    "fd_official_distilled_esvit_swin_b",
)


def check(name, folder):
    """Largest difference of features, relative to the largest value."""
    import timm

    given = synthetic.structure(name)
    path = synthetic.write(given, synthetic.values(given), folder)
    importing.import_file(name, path, folder / "model")
    exporting.export("timm", folder / "model", folder / "timm")
    loaded = inference.load_model(folder / "model")
    theirs = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval()
    size = loaded.spec.arch["image_size"]
    images = np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(loaded(images).tokens)
    expected = oracles.run(theirs.forward_features, images).reshape(ours.shape)
    return np.abs(ours - expected).max() / np.abs(expected).max()


def main():
    """Prints one line per source; fails on a key too few or too many, or another feature."""
    for name in SOURCES:
        families.SOURCES[name] = synthetic.small_source(name)
        with tempfile.TemporaryDirectory() as folder:
            difference = check(name, Path(folder))
        print(f"{name:40} {difference:.1e}", flush=True)
        assert difference < TOLERANCE


if __name__ == "__main__":
    main()
