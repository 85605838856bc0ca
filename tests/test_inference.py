"""A model folder in use."""

import dataclasses
import pathlib
import re

from flax import nnx
import jax
import jax.export
import numpy as np
import pytest

import fd_jax
from fd_jax import inference, model_folder
from fd_jax.convert import exporting
from fd_jax.data.transforms import EvalTransform
from fd_jax.errors import ConfigError, ConversionError, DataError, ModelFolderError
from fd_jax.evaluation import segmentation
from fd_jax.models.spec import split
from tests import tiny
from tests.evaluation import segments


@pytest.fixture
def parts():
    encoder = split(tiny.teacher_spec().build(rngs=nnx.Rngs(0)))[1]
    return {"encoder": tiny.randomize(encoder, 3)}


@pytest.fixture
def folder(tmp_path, parts):
    model_folder.save(tmp_path / "model", tiny.teacher_spec(), parts)
    return tmp_path / "model"


def test_loaded_model_gives_the_features_of_the_saved_module(folder, parts):
    model = fd_jax.load_model(folder)
    images = tiny.batch(2)["image"]
    definition, _ = tiny.teacher_spec().abstract()
    want = nnx.merge(definition, parts["encoder"])(model.preprocess(images)).tokens
    np.testing.assert_allclose(model(model.preprocess(images)).tokens, want, atol=1e-5)
    pixels = (images / 255.0 - np.array(model.spec.mean)) / np.array(model.spec.std)
    np.testing.assert_allclose(model.preprocess(images), pixels, atol=1e-5)


def test_pictures_of_any_sizes_become_the_images_of_evaluation(folder):
    model = fd_jax.load_model(folder)
    pictures = [tiny.batch(1, side=side)["image"][0] for side in (50, 40)]
    transform = EvalTransform(32)
    want = model.preprocess(np.stack([transform(picture) for picture in pictures]))
    got = model.preprocess(pictures, resize=True)
    one_level = 1 / 255 / min(model.spec.std)
    assert np.abs(np.asarray(got) - np.asarray(want)).max() < 1.01 * one_level
    with pytest.raises(DataError, match="16-bit"):
        model.preprocess([pictures[0].astype(np.uint16)], resize=True)


def test_a_model_prints_what_it_is(folder):
    shown = repr(fd_jax.load_model(folder))
    spec, parts = model_folder.load(folder)
    values = sum(leaf.size for leaf in jax.tree.leaves(parts["encoder"])) / 1e6
    assert f"{spec.source!r}: vit, {values:.3g} M parameters, 32 px, 4 x 4 patches" in shown
    assert "of width 48, class token; parts: encoder" in shown


def test_attention_maps_are_those_of_the_network(folder, parts):
    model = fd_jax.load_model(folder)
    images = model.preprocess(tiny.batch(2)["image"])
    network = nnx.merge(tiny.teacher_spec().abstract()[0], parts["encoder"])
    want = [np.asarray(m.weights()) for m in network.attention_maps(images, [0, 1])]
    got = [np.asarray(m.weights()) for m in model.attention_maps(images)]
    np.testing.assert_allclose(got, want, atol=1e-6)
    (last,) = model.attention_maps(images, blocks=[-1])
    np.testing.assert_allclose(last.weights(), want[1], atol=1e-6)
    assert np.abs(want[1] - want[0]).max() > 1e-3
    with pytest.raises(ConfigError, match="has 2 blocks, so there is no block 2"):
        model.attention_maps(images, blocks=[2])


def test_model_can_be_loaded_for_another_image_size(folder):
    model = fd_jax.load_model(folder, image_size=48)
    features = model(model.preprocess(tiny.batch(1, side=48)["image"]))
    assert features.grid == (6, 6)
    assert model.spec.arch["image_size"] == 48


@pytest.mark.parametrize(
    "images, remedy",
    [
        (np.zeros((1, 32, 32, 3), np.float32), "np.round(255 * images)"),
        (np.zeros((1, 32, 32, 3), np.uint16), "images >> 8"),
        (np.zeros((1, 32, 32, 3), np.int64), "int64 [1, 32, 32, 3]"),
        (np.zeros((32, 32, 3), np.uint8), "image[None]"),
        (np.zeros((1, 3, 32, 32), np.uint8), "np.moveaxis"),
        ([[0, 1]], "list"),
    ],
    ids=["float", "16 bit", "int", "single image", "channels first", "list"],
)
def test_preprocess_refuses_what_would_give_other_features(teacher, images, remedy):
    model = fd_jax.load_model(teacher)
    with pytest.raises(DataError, match=re.escape(remedy)):
        model.preprocess(images)


@pytest.fixture
def segmenting(tmp_path):
    made = segments.spec()
    model_folder.save(tmp_path / "segmenting", made, segments.parts(made))
    return inference.load_model(tmp_path / "segmenting")


def test_labels_equal_those_of_an_evaluation(segmenting):
    pictures = [segments.picture(i, size).image for i, size in enumerate(segments.SIZES)]
    labels = segmenting.segment(pictures)
    assert [label.shape for label in labels] == list(segments.SIZES)
    assert all(label.dtype == np.int32 for label in labels)
    assert len(np.unique(np.concatenate([label.ravel() for label in labels]))) > 2
    made = segments.spec()
    run = segments.compiled(made, jax.devices()[:1])
    items = [
        segments.Picture(i, str(i), picture, label.astype(np.uint8))
        for i, (picture, label) in enumerate(zip(pictures, labels, strict=True))
    ]
    for stride, same in ((21, True), (32, False)):
        evaluator = segmentation.Segmented(8, 5, 32, scale=(128, 32), stride=stride)
        result = evaluator(run, segments.weights(made, run.mesh), segments.Pictures(items))
        assert (result["aacc"] > 0.9998) == same
    assert segmenting._segments._cache_size() == 1
    array = np.stack([pictures[0], pictures[0][::-1]])
    np.testing.assert_array_equal(segmenting.segment(array)[0], labels[0])


def test_logits_are_those_of_the_network(segmenting):
    images = np.stack([segments.picture(i, (32, 32)).image for i in range(3)])
    got = segmenting.segment(images, logits=True)
    made = segments.spec()
    run = segments.compiled(made, jax.devices()[:1])
    weights = segments.weights(made, run.mesh)
    want = run.predict(weights.params, weights.extra, {}, {"image": images})
    assert got.shape == (3, 16, 16, 5) and got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_segmenting_refuses_what_it_cannot_do(segmenting, folder, tmp_path):
    with pytest.raises(ModelFolderError, match="'tiny' has no segmenter.*finetune.py"):
        inference.load_model(folder).segment([np.zeros((32, 32, 3), np.uint8)])
    with pytest.raises(DataError, match=r"float32 \[1, 40, 50, 3\]; expected uint8"):
        segmenting.segment([np.zeros((40, 50, 3), np.float32)])
    with pytest.raises(DataError, match=r"one picture, \[40, 50, 3\].*: \[picture\]"):
        segmenting.segment(np.zeros((40, 50, 3), np.uint8))
    with pytest.raises(DataError, match="40 x 32 pixels, and the network reads 32 x 32"):
        segmenting.segment(np.zeros((2, 40, 32, 3), np.uint8), logits=True)
    wide = inference.load_model(tmp_path / "segmenting", image_size=(32, 48))
    with pytest.raises(ModelFolderError, match="reads 32 x 48 pixels; load it with image_size=N"):
        wide.segment([np.zeros((40, 50, 3), np.uint8)])


NAMES = ["cat", "coffee", "rocket"]


def classifier(parts, *, pooling, names=None):
    """A classifier of three classes, and its logits in numpy from the features [B, 1 + P, D]."""
    spec = dataclasses.replace(
        tiny.teacher_spec(), classes=3, pooling=pooling, class_names=names and list(names)
    )
    rng = np.random.default_rng(5)
    width = spec.arch["width"]
    head = {"kernel": rng.normal(size=(width, 3)), "bias": rng.normal(size=3)}
    norm = {"scale": rng.normal(size=width), "bias": rng.normal(size=width)}
    parts = {**parts, "head": head} | ({"fc_norm": norm} if "norm" in pooling else {})

    def normalized(x):
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt(x.var(-1, keepdims=True) + spec.head_norm_eps)
        return centred / deviation * norm["scale"] + norm["bias"]

    def expected(tokens):
        patches = np.asarray(tokens, np.float64)[:, 1:]
        pooled = {
            "cls": lambda: np.asarray(tokens, np.float64)[:, 0],
            "mean": lambda: patches.mean(1),
            "mean_norm": lambda: normalized(patches.mean(1)),
            "norm_mean": lambda: normalized(patches).mean(1),
        }[pooling]()
        return pooled @ head["kernel"] + head["bias"]

    to_float32 = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), parts)
    return inference.Model(spec, to_float32), expected


@pytest.mark.parametrize("pooling", ["cls", "mean", "mean_norm", "norm_mean"])
def test_class_logits_equal_numpy_on_the_features(parts, pooling):
    model, expected = classifier(parts, pooling=pooling)
    images = model.preprocess(tiny.labelled_batch()["image"])
    logits = model.logits(images)
    assert logits.dtype == np.float32
    tokens = model(images).tokens
    np.testing.assert_allclose(logits, expected(tokens), rtol=1e-5, atol=1e-4)
    other = expected(np.roll(tokens, 1, axis=1))  # another token in the place of the class token
    assert np.abs(logits - other).max() > 1e-2


@pytest.mark.parametrize("names", [NAMES, None])
def test_pictures_of_any_sizes_are_classified_by_name(parts, names):
    model, expected = classifier(parts, pooling="mean_norm", names=names)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((40, 60), (97, 33))]
    found = model.classify(pictures, top=2)
    logits = expected(model(model.preprocess(pictures, resize=True)).tokens)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for pairs, row in zip(found, shares, strict=True):
        order = np.argsort(-row)[:2]
        assert [name for name, _ in pairs] == [(names or "012")[k] for k in order]
        np.testing.assert_allclose([share for _, share in pairs], row[order], rtol=1e-4)
    assert all(len(pairs) == 3 for pairs in model.classify(pictures))


def test_a_program_for_serving_has_the_logits(parts, tmp_path):
    model, _ = classifier(parts, pooling="mean_norm", names=NAMES)
    model_folder.save(tmp_path / "model", model.spec, model.params)
    written = exporting.export("stablehlo_logits", tmp_path / "model", tmp_path / "classifier.bin")
    assert written.remarks == [
        "it takes uint8 [b, 32, 32, 3] RGB images and gives logits [b, 3] float32: "
        "cat, coffee, rocket"
    ]
    program = jax.export.deserialize((tmp_path / "classifier.bin").read_bytes())
    pictures = tiny.labelled_batch()["image"]
    expected = model.logits(model.preprocess(pictures))
    np.testing.assert_allclose(program.call(pictures), expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(ConversionError, match="no classifier head, so it has no logits"):
        headless = dataclasses.replace(model.spec, classes=0, class_names=None)
        model_folder.save(tmp_path / "headless", headless, {"encoder": model.params["encoder"]})
        exporting.export("stablehlo_logits", tmp_path / "headless", tmp_path / "none.bin")
    assert not (tmp_path / "none.bin").exists()


def test_classifying_refuses_what_it_cannot_do(folder, parts):
    model, _ = classifier(parts, pooling="cls")
    with pytest.raises(DataError, match="there is no picture"):
        model.classify([])
    with pytest.raises(DataError, match="expected uint8"):
        model.classify([np.zeros((32, 32, 3), np.float32)])
    for named in ("cat.jpg", ["cat.jpg"], [pathlib.Path("cat.jpg")]):
        with pytest.raises(DataError, match="given by its name.*PIL.Image.open"):
            model.classify(named)
    with pytest.raises(DataError, match=r"one picture, \[32, 32, 3\]; expected a list"):
        model.classify(np.zeros((32, 32, 3), np.uint8))
    headless = fd_jax.load_model(folder)
    for refused in (headless.classify, headless.logits):
        with pytest.raises(ModelFolderError, match="has no classifier head: only features"):
            refused([np.zeros((32, 32, 3), np.uint8)])
