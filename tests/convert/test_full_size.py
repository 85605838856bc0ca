"""Sources at their real size: the whole chain within 1e-4 of torch.

    python -m tests.convert.test_full_size

checks every source but the giant and prints the differences; the test suite takes one source per
family.
"""

from pathlib import Path
import sys
import tempfile

import jax
import numpy as np
import pytest

from fd_jax import inference
from fd_jax.convert import importing
from tests.convert import oracles, synthetic

TOLERANCE = 1e-4
GIANT = "swinv2_giant"  # 12 GB of weights, several times over: only where it is named
# Name prefixes that the import drops and that would only cost time: text towers.
TEXT = ("text_model.", "params/txt/", "transformer.", "token_embedding", "feature_model.")


def difference(name: str, folder: Path) -> float:
    """Largest difference of the features, or logits, relative to the largest value."""
    given = synthetic.structure(name, small=False)
    for tree, tensors in given.trees.items():
        given.trees[tree] = {n: v for n, v in tensors.items() if not n.startswith(TEXT)}
    trees = synthetic.values(given)
    path = synthetic.write(given, trees, folder)
    importing.import_file(name, path, folder / "model")
    part, wanted = next(iter(synthetic.REAL[name].parts.items()))
    size = wanted.spec.arch["image_size"]
    model = inference.load_model(folder / "model")
    assert model.spec.arch == wanted.spec.arch
    images = np.random.default_rng(1).standard_normal((1, size, size, 3)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        ours = _features(model, images)
    oracle, tensors = oracles.reference(name, part, trees)
    expected = oracle(tensors, wanted.spec.arch, images, folder / "torch")
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


def _features(model, images):
    tokens = np.asarray(model(images).tokens)
    if "head" in model.params and model.spec.pooling == "mean":
        head = model.params["head"]
        return tokens.mean(axis=1) @ head["kernel"] + head["bias"]
    if "fc_norm" not in model.params:
        return tokens
    mean = tokens[:, 1:].mean(axis=1)
    mean = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-6)
    fc_norm, head = model.params["fc_norm"], model.params["head"]
    return (mean * fc_norm["scale"] + fc_norm["bias"]) @ head["kernel"] + head["bias"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "openai_clip_vit_b16",
        "dino_vitb16",
        "dinov2_vits14_hf",
        "dinov3_vits16",
        "siglip2_base_patch16_224_bigvision",
        "fd_official_distilled_clip_vit_b",
        "timm_beit_base_patch16_224",
        "esvit_swin_base_w14",
        "swinv2_large_patch4_window12to16_192to256_22kto1k_ft",
    ],
)
def test_features_at_full_size(name, tmp_path):
    assert difference(name, tmp_path) < TOLERANCE


def main() -> None:
    """Checks the named sources, or all; prints a line for each."""
    failed = False
    for name in sys.argv[1:] or [name for name in synthetic.names() if name != GIANT]:
        with tempfile.TemporaryDirectory() as folder:
            found = difference(name, Path(folder))
        print(f"{name:40} {found:.1e}", flush=True)
        failed |= not found < TOLERANCE
    sys.exit(failed)


if __name__ == "__main__":
    main()
