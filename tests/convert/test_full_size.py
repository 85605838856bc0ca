"""One source per family at its real size: the whole chain within 1e-4 of torch."""

import jax
import numpy as np
import pytest

from fd_jax import model_folder
from fd_jax.convert import importing
from tests.convert import oracles, synthetic

# Name prefixes that the import drops and that would only cost time: text towers.
TEXT = ("text_model.", "params/txt/", "transformer.", "token_embedding", "feature_model.")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        ("openai_clip_vit_b16", 224),
        ("dino_vitb16", 224),
        ("dinov2_vits14_hf", 224),
        ("dinov3_vits16", 224),
        ("siglip2_base_patch16_224_bigvision", 224),
        ("fd_official_distilled_clip_vit_b", 224),
    ],
)
def test_features_at_full_size(name, image_size, tmp_path):
    given = synthetic.structure(name, small=False)
    for tree, tensors in given.trees.items():
        given.trees[tree] = {n: v for n, v in tensors.items() if not n.startswith(TEXT)}
    trees = synthetic.values(given)
    path = synthetic.write(given, trees, tmp_path)
    importing.import_file(name, path, tmp_path / "model")
    model = model_folder.load_model(tmp_path / "model", image_size=image_size)
    part = next(iter(synthetic.REAL[name].parts.values()))
    assert model.spec.arch == {**part.spec.arch, "image_size": image_size}
    images = np.random.default_rng(1).standard_normal((1, image_size, image_size, 3))
    images = images.astype(np.float32)
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(model(images).tokens)
    oracle, tensors = oracles.reference(name, next(iter(synthetic.REAL[name].parts)), trees)
    expected = oracle(tensors, part.spec.arch, images, tmp_path / "torch")
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()
