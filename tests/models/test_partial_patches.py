"""Images that patches do not fill: what remains at the right and at the bottom is not read."""

import dataclasses

import jax
import numpy as np
import pytest
import transformers

from configs import own
from fd_jax import inference, model_folder
from fd_jax.cost import flops
from fd_jax.diagnose import subjects
from fd_jax.errors import ConfigError, ModelFolderError
from fd_jax.models import sizes, transfer
from fd_jax.models.spec import ModelSpec
from fd_jax.tasks.distill import DistillTask
from fd_jax.tasks.segment import SegmentTask
from tests import tiny
from tests.convert import oracles
from tests.models import hugging_face, vits
from tests.models.torch_names import filled, renamed
from tests.models.vits import relative

TOLERANCE = 1e-5
SIZE, PATCH = 30, 4  # 7 x 7 patches, as SigLIP's 27 x 27 of 14 px in 384 px


def siglip(**arch):
    fields = {"image_size": SIZE, "patch_size": PATCH, "cls_token": False}
    fields |= {"activation": "gelu_tanh", "partial_patches": "crop"}
    return tiny.teacher_spec(**{**fields, **arch})


def siglip_model(params):
    config = transformers.SiglipVisionConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=SIZE,
        patch_size=PATCH,
        layer_norm_eps=1e-6,
        vision_use_head=False,
    )
    return filled(transformers.SiglipVisionModel(config), renamed(params, hugging_face.SIGLIP))


def test_siglip_of_an_odd_size_equals_transformers():
    spec = siglip()
    params, images = vits.random_params(spec), vits.pictures(spec, 2)
    model = siglip_model(params)
    want = oracles.run(lambda x: model(x).last_hidden_state, images)
    features = vits.bind(spec, params)(images)
    assert features.grid == (7, 7)
    assert relative(features.tokens, want) < TOLERANCE
    other_side = np.roll(images, (-2, -2), axis=(1, 2))
    assert relative(vits.bind(spec, params)(other_side).tokens, want) > 100 * TOLERANCE
    edge = images.copy()
    edge[:, 28:] = edge[:, :, 28:] = 9.0
    np.testing.assert_array_equal(vits.bind(spec, params)(edge).tokens, features.tokens)


def test_at_another_size_it_equals_transformers():
    before = siglip()
    params = vits.random_params(before)
    spec, resized = before.resized(params, 37)  # 9 x 9 patches
    images = vits.pictures(spec, 2)
    model = siglip_model(params)
    want = oracles.run(lambda x: model(x, interpolate_pos_encoding=True).last_hidden_state, images)
    features = vits.bind(spec, resized)(images)
    assert features.grid == (9, 9)
    assert relative(features.tokens, want) < TOLERANCE
    again, back = before.resized(params, 31)  # the same patches
    assert again.arch["image_size"] == 31
    np.testing.assert_array_equal(back["pos_embed"], params["pos_embed"])


def test_sizes():
    sizes.check_patches((30, 21), 4, partial="crop")
    assert sizes.patch_grid((30, 21), 4) == (7, 5)
    with pytest.raises(ConfigError, match="image_size 3 is less than patch_size 4"):
        sizes.check_patches(3, 4, partial="crop")
    with pytest.raises(ConfigError, match="partial_patches='pad' is unknown"):
        sizes.check_patches(32, 4, partial="pad")
    with pytest.raises(ConfigError, match="30 is not divisible by patch_size 4; use 28 or 32"):
        siglip(partial_patches="refuse").abstract()
    assert sizes.token_side(40, 14, (2, 2)) == 14
    assert sizes.token_side(32, 4, (2, 2)) == 16  # the last map of a Swin


def test_descriptions_agree():
    spec = siglip()
    assert ModelSpec.from_json(spec.to_json(), where="") == spec
    refused = dataclasses.replace(spec, arch={**spec.arch, "partial_patches": "refuse"})
    with pytest.raises(ModelFolderError, match="30 is not divisible by patch_size 4"):
        ModelSpec.from_json(refused.to_json(), where="")
    whole = siglip(image_size=28)
    assert flops.network(spec, trains=True) == flops.network(whole, trains=True)
    model = inference.Model(spec, {"encoder": vits.random_params(spec)})
    assert subjects.about(model)["patch"] == [PATCH, PATCH]
    assert "30 px, 7 x 7 patches" in repr(model)


def test_a_student_has_a_size_that_its_patches_fill(tmp_path):
    spec = siglip()
    model_folder.save(tmp_path / "teacher", spec, {"encoder": vits.random_params(spec)})
    found, side = own.network({"teacher": tmp_path / "teacher", "size": 0}, "teacher")
    assert (found, side) == (spec, 28)
    _, arch = own.student("tiny", spec, side)
    assert arch["image_size"] // arch["patch_size"] == 7


def test_a_grid_of_the_teacher_that_the_student_does_not_have_is_named():
    with pytest.raises(ConfigError, match=r"grid \(4, 4\): set teacher.image_size to 56"):
        DistillTask(tiny.config(), teacher_spec=siglip(image_size=40, patch_size=14))


def test_a_segmenter_needs_an_encoder_that_reads_the_whole_image():
    config = tiny.segmentation(**{"data.image_size": SIZE})
    with pytest.raises(ConfigError, match="30 is not divisible by patch_size 4; use 28 or 32"):
        SegmentTask(config, init_spec=siglip(depth=3))


def test_fine_tuning_at_another_patch_size_keeps_the_grid():
    spec = siglip()
    changes = transfer.Changes(
        image_size=45, final_norm=True, untie=False, keep_head=False, patch_size=6
    )
    started, _ = transfer.start(spec, {"encoder": vits.random_params(spec)}, changes)
    shapes = jax.tree.map(lambda leaf: leaf.shape, started["encoder"])
    wanted = transfer.target_spec(spec, changes).abstract()[1]
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, wanted)
