"""One vector of a picture as SigLIP, CLIP and Perception Encoder make it, and its model folders."""

import dataclasses
import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import fd_jax
from fd_jax import inference, model_folder, sharding
from fd_jax.convert import exporting, importing
from fd_jax.errors import ConfigError, ModelFolderError
from fd_jax.models import transfer
from fd_jax.models.spec import split
from fd_jax.tasks.classify import ClassifyTask
from fd_jax.tasks.distill import DistillTask
from tests import tiny
from tests.convert import oracles
from tests.models import hugging_face, vits
from tests.models.torch_names import filled, renamed
from tests.models.vits import relative

TOLERANCE = 1e-5
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 96, "image_size": 30, "patch_size": 4, "layer_norm_eps": 1e-6}
MAP = {"kind": "attention", "heads": 4, "mlp_width": 96, "norm_eps": 1e-6}
MAP |= {"activation": "gelu_tanh"}
PROJECTION = {"kind": "projection", "width": 20}


def spec_of(pool, **arch):
    odd = {"image_size": 30, "patch_size": 4, "partial_patches": "crop", "activation": "gelu_tanh"}
    return dataclasses.replace(tiny.teacher_spec(**{**odd, **arch}), pool=pool)


def siglip(pool=MAP):
    return spec_of(pool, cls_token=False)


def clip(pool=PROJECTION):
    return spec_of(pool, ln_pre=True, patch_bias=False, activation="quick_gelu")


def parts_of(spec):
    _, pool = split(spec.build_pool(rngs=nnx.Rngs(0)))
    return {"encoder": vits.random_params(spec), "pool": tiny.randomize(pool, 5)}


def pooled(spec, parts, images):
    return np.asarray(inference.pooled_vectors(spec, parts, images))


def test_siglips_head_equals_transformers():
    spec = siglip()
    parts, images = parts_of(spec), vits.pictures(spec, 2)
    config = transformers.SiglipVisionConfig(**SIZES, hidden_act="gelu_pytorch_tanh")
    tensors = renamed(parts["encoder"], hugging_face.SIGLIP)
    tensors |= hugging_face.siglip_head(parts["pool"])
    model = filled(transformers.SiglipVisionModel(config), tensors)
    want = oracles.run(lambda x: model(x).pooler_output, images)
    assert relative(pooled(spec, parts, images), want) < TOLERANCE
    for change in ({"heads": 2}, {"activation": "quick_gelu"}, {"norm_eps": 1e-1}):
        assert relative(pooled(siglip({**MAP, **change}), parts, images), want) > 100 * TOLERANCE
    zero = {**parts["pool"], "latent": np.zeros_like(parts["pool"]["latent"])}
    assert relative(pooled(spec, {**parts, "pool": zero}, images), want) > 100 * TOLERANCE


def test_clips_projection_equals_transformers():
    spec = clip()
    parts, images = parts_of(spec), vits.pictures(spec, 2)
    config = transformers.CLIPVisionConfig(**SIZES, projection_dim=20, hidden_act="quick_gelu")
    tensors = renamed(parts["encoder"], hugging_face.CLIP)
    tensors["visual_projection.weight"] = parts["pool"]["projection"]["kernel"].T
    model = filled(transformers.CLIPVisionModelWithProjection(config), tensors)
    want = oracles.run(lambda x: model(x).image_embeds, images)
    assert relative(pooled(spec, parts, images), want) < TOLERANCE
    network = vits.bind(spec, parts["encoder"])
    unnormalised = network(images, final_norm=False).cls_token
    kernel = parts["pool"]["projection"]["kernel"]
    assert relative(unnormalised @ kernel, want) > 100 * TOLERANCE


def test_a_projection_may_follow_attention_and_have_a_bias():
    spec = siglip({**MAP, "width": 20, "bias": True})
    parts, images = parts_of(spec), vits.pictures(spec, 2)
    layer = parts["pool"]["projection"]
    alone = {**parts, "pool": {n: v for n, v in parts["pool"].items() if n != "projection"}}
    want = pooled(siglip(), alone, images) @ layer["kernel"] + layer["bias"]
    np.testing.assert_allclose(pooled(spec, parts, images), want, atol=TOLERANCE)
    assert pooled(spec, parts, images).shape == (2, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, spec = tmp_path_factory.mktemp("models") / "siglip", siglip()
    model_folder.save(path, spec, parts_of(spec))
    return path


def test_a_model_folder_keeps_it(folder):
    spec, loaded = model_folder.load(folder)
    parts = parts_of(siglip())
    assert spec == siglip()
    jax.tree.map(np.testing.assert_array_equal, loaded, parts)
    model = fd_jax.load_model(folder)
    images = model.preprocess(tiny.batch(2, side=30)["image"])
    np.testing.assert_allclose(
        model.pooled(images), pooled(spec, parts, images), atol=10 * TOLERANCE
    )
    assert "pooled by attention; parts: encoder, pool>" in repr(model)


def test_it_goes_with_a_network_of_another_size(folder):
    model = fd_jax.load_model(folder, image_size=(22, 37))
    images = model.preprocess(np.zeros((1, 22, 37, 3), np.uint8))
    assert model.pooled(images).shape == (1, 48)


def test_a_network_without_one_says_so():
    model = inference.Model(tiny.teacher_spec(), {"encoder": {}})
    with pytest.raises(ModelFolderError, match=r"'tiny' has no pool: .*features.cls_token"):
        model.pooled(jnp.zeros((1, 32, 32, 3)))


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (
            {**MAP, "mlp_width": 80},
            r"pool/mlp/fc1/kernel has shape \(48, 96\), expected",
        ),
        ({**MAP, "width": 20}, "missing pool/projection/kernel"),
        ({"kind": "projection", "width": 8}, "projects a class token, and there is none"),
        ({**MAP, "heads": 7}, "pool.heads=7 do not divide the encoder's 48 channels"),
        (
            {"kind": "mean"},
            "pool.kind='mean' is unknown; expected one of 'attention', 'proj",
        ),
        ({"kind": "attention", "heads": 4}, "pool.mlp_width is missing"),
        ({**MAP, "heads": 10**6}, "pool.heads=1000000: expected a whole number from 1 to 1024"),
        ({**MAP, "wings": 2}, "'wings': there is no such field"),
        ([1], "pool.kind=None is unknown"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_descriptions_that_do_not_fit_are_refused(tmp_path, pool, message):
    model_folder.save(tmp_path / "model", siglip(), parts_of(siglip()))
    (tmp_path / "model" / model_folder.DIGESTS).unlink()
    path = tmp_path / "model" / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pool": pool}))
    with pytest.raises(ModelFolderError, match=message):
        model_folder.load(tmp_path / "model")


def test_folders_with_a_pool_that_nobody_describes_are_refused(tmp_path, folder):
    spec, parts = model_folder.load(folder)
    plain = dataclasses.replace(spec, pool=None)
    for described, kept in ((plain, parts), (spec, {"encoder": parts["encoder"]})):
        with pytest.raises(ModelFolderError, match="a pool has to be in both, or in neither"):
            model_folder.save(tmp_path / "model", described, kept)
    model_folder.save(tmp_path / "model", spec, parts)
    (tmp_path / "model" / model_folder.DIGESTS).unlink()
    (tmp_path / "model" / "model.json").write_text(plain.to_json())
    with pytest.raises(ModelFolderError, match="unexpected pool/latent"):
        model_folder.load(tmp_path / "model")


def test_training_takes_the_encoder_alone(folder):
    spec, parts = model_folder.load(folder)
    changes = transfer.Changes(image_size=30, final_norm=True, untie=False, keep_head=False)
    assert transfer.target_spec(spec, changes).pool is None
    started, report = transfer.start(spec, parts, changes)
    assert started.keys() == {"encoder"}
    assert "dropped  pool" in report
    config = tiny.config(str(folder), **{"student.arch.patch_size": 4, "data.image_size": 28})
    config.student.arch.image_size = config.teacher.image_size = 28
    frozen = DistillTask(config).load_frozen()
    assert frozen.keys() == {"encoder"}
    tuned = ClassifyTask(tiny.fine_tuning(str(folder), **{"data.image_size": 28}))
    assert tuned.spec.pool is None


def test_it_goes_through_safetensors_of_our_own(tmp_path, folder):
    assert exporting.export("safetensors", folder, tmp_path / "model.safetensors").left == []
    importing.import_file("fd_jax", tmp_path / "model.safetensors", tmp_path / "again")
    spec, parts = model_folder.load(tmp_path / "again")
    assert spec.pool == MAP
    jax.tree.map(np.testing.assert_array_equal, parts, parts_of(siglip()))


def test_every_parameter_has_axes():
    for spec in (siglip({**MAP, "width": 16, "bias": True}), clip()):
        shapes = {"pool": spec.abstract_pool()[1]}
        sharding.param_shardings(shapes, sharding.make_mesh(data=2, fsdp=2, tensor=2))


def test_an_unknown_kind_is_refused_in_python_too():
    with pytest.raises(ModelFolderError, match="pool.kind='mean' is unknown"):
        siglip({"kind": "mean"}).abstract_pool()
    with pytest.raises(ModelFolderError, match="missing 4 required keyword"):
        siglip({"kind": "attention"}).abstract_pool()
    with pytest.raises(ConfigError, match="'tanh' is unknown"):
        spec_of(None, activation="tanh").abstract()
