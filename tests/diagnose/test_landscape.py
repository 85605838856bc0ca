"""Landscapes: directions against loops over PyTorch's layout, curves against closed forms."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special
from sklearn import datasets as sklearn_datasets

from fd_jax import inference, losses, model_folder, sharding
from fd_jax.data.datasets import Example
from fd_jax.diagnose import landscape
from fd_jax.diagnose.classifier import ImageClassifier
from fd_jax.diagnose.landscape import Landscape
from fd_jax.errors import ConfigError, DataError, ModelFolderError
from fd_jax.models import spec as specs
from tests import tiny
from tests.models import convnexts, resnets, vits

CLASSES = 10
KEY = jax.random.key(3)

VIT = {**tiny.STUDENT, "image_size": 32, "depth": 1}
SWIN = {"depths": [1, 1], "heads": [2, 2]}
SWIN_V2 = {**SWIN, "pretrained_windows": [0, 0]}
SPECS = {
    "ape": tiny.teacher_spec(depth=1, registers=2, ln_pre=True, layer_scale=0.1),
    "rpb": vits.student_spec(VIT, "rpb"),
    "shared_rpb": vits.student_spec(VIT, "shared_rpb"),
    "swin": tiny.swin_spec(1, **SWIN),
    "swin_v2": tiny.swin_spec(2, **SWIN_V2, extra_norm_every=1),
    "swin_v2_shared": tiny.swin_spec(2, **SWIN_V2, position="shared_rpb"),
    "convnext": convnexts.spec("dinov3", image_size=32, pooling="mean", depths=[1, 1, 1, 1]),
    "convnext_v2": convnexts.spec("v2", image_size=32, depths=[1, 1, 1, 1]),
    "resnet": resnets.spec(image_size=32, depths=[1, 1, 1], pooling="mean"),
}
TABLES = {
    "ape": ["cls_token", "pos_embed", "register_tokens"],
    "rpb": ["cls_token", "blocks/0/attn/rel_pos_bias/table"],
    "shared_rpb": ["cls_token", "rel_pos_bias/table"],
    "swin": [f"stages/{i}/blocks/0/attn/rel_pos_bias/table" for i in (0, 1)],
    "swin_v2": [
        f"stages/{i}/blocks/0/attn/{name}"
        for i in (0, 1)
        for name in ("logit_scale", "rel_pos_bias/fc1/kernel", "rel_pos_bias/fc2/kernel")
    ],
    "convnext": [],
    "resnet": [],
    "convnext_v2": [
        f"stages/{i}/blocks/0/mlp/grn/{name}" for i in range(4) for name in ("scale", "bias")
    ],
    "swin_v2_shared": [
        f"stages/{i}/{name}"
        for i in (0, 1)
        for name in (
            "blocks/0/attn/logit_scale",
            "rel_pos_bias/fc1/kernel",
            "rel_pos_bias/fc2/kernel",
        )
    ],
}


def head_params(spec, width):
    rng = np.random.default_rng(2)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    parts = {"head": {"kernel": draw(width, CLASSES) / np.sqrt(width), "bias": draw(CLASSES)}}
    if "norm" in spec.pooling:
        parts["fc_norm"] = {"scale": 1 + 0.1 * draw(width), "bias": draw(width)}
    return jax.tree.map(np.float32, parts)


def all_params(spec):
    width = nnx.eval_shape(lambda: spec.build(rngs=nnx.Rngs(0))).width
    return {"encoder": vits.random_params(spec), **head_params(spec, width)}


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def torch_layout(path, array):
    """The array as PyTorch stores it: outputs first."""
    if path.endswith("logit_scale"):
        return array[:, None, None]
    if "/grn/" in path:
        return array[None, None, None]
    if not path.endswith("kernel"):
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.reshape(len(array), -1).T


def filter_norms(path, array):
    """The norm of every filter, as Li et al. take it: over each entry of the first axis."""
    return np.array([np.sqrt(np.sum(row**2)) for row in torch_layout(path, array)])


def same_norms(path, delta, theta):
    return np.allclose(filter_norms(path, delta), filter_norms(path, theta), rtol=2e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_filters_of_a_literal_direction_have_the_norms_of_the_weights(name):
    """Negative control: neither the noise itself nor another direction's filters pass."""
    params = all_params(SPECS[name])
    direction = by_path(landscape.random_direction(params, KEY, tables="literal"))
    weights = by_path(params)
    assert direction.keys() == weights.keys()
    for path, theta in weights.items():
        delta = direction[path]
        if torch_layout(path, theta).ndim <= 1:
            assert not delta.any(), path
        else:
            assert same_norms(path, delta, theta), path
            noise = np.random.default_rng(0).normal(size=theta.shape)
            assert not same_norms(path, noise, theta), path


@pytest.mark.parametrize(
    "name", ["rpb", *(pytest.param(n, marks=pytest.mark.slow) for n in SPECS if n != "rpb")]
)
def test_zeroed_and_literal_differ_exactly_in_the_tables(name):
    params = all_params(SPECS[name])
    zeroed, literal = (
        by_path(landscape.random_direction(params, KEY, tables=tables))
        for tables in ("zeroed", "literal")
    )
    tables = {f"encoder/{path}" for path in TABLES[name]}
    assert {path for path in zeroed if not np.array_equal(zeroed[path], literal[path])} == tables
    assert not any(zeroed[path].any() for path in tables)


@pytest.mark.parametrize("size", [1.0, 1e-10, 0.0])
@pytest.mark.parametrize(
    ("shape", "axes"), [((5, 3), (0,)), ((5, 3, 4), (0,)), ((2, 2, 3, 4), (0, 1, 2)), ((4,), ())]
)
def test_filters_are_normalized_as_defined(shape, axes, size):
    """Also where the 1e-10 in the denominator is as large as the norm of the noise."""
    rng = np.random.default_rng(1)
    theta, noise = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    noise = np.float32(size) * noise
    want = np.zeros(shape)
    for index in np.ndindex(*(1 if axis in axes else n for axis, n in enumerate(shape))):
        one = tuple(slice(None) if axis in axes else i for axis, i in enumerate(index))
        norms = [np.sqrt(np.sum(np.float64(x[one]) ** 2)) for x in (theta, noise)]
        want[one] = noise[one] * (norms[0] / (norms[1] + 1e-10))
    got = np.asarray(landscape.normalize_filters(noise, theta, axes))
    np.testing.assert_allclose(got, want, rtol=2e-6)


def test_filters_along_the_wrong_axis_have_other_norms():
    theta, noise = (np.random.default_rng(i).normal(size=(6, 4)) for i in (0, 1))
    right, wrong = (np.asarray(landscape.normalize_filters(noise, theta, (i,))) for i in (0, 1))
    assert same_norms("kernel", right, theta)
    assert not same_norms("kernel", wrong, theta)


def test_noise_is_normal_and_independent_between_parameters_and_directions():
    params = {
        "encoder": {"blocks": {i: {"mlp": {"fc1": {"kernel": np.ones((400, 50))}}} for i in "01"}}
    }
    drawn = [
        delta
        for number in (0, 1)
        for delta in by_path(
            landscape.random_direction(params, jax.random.fold_in(KEY, number), tables="zeroed")
        ).values()
    ]
    moments = [(np.mean(x), np.mean(x**2), np.mean(x**4)) for x in drawn]
    np.testing.assert_allclose(moments, np.tile([0, 1, 3], (4, 1)), atol=0.15)
    correlation = np.corrcoef([x.ravel() for x in drawn])
    np.testing.assert_allclose(correlation, np.eye(4), atol=0.04)


def test_a_direction_depends_on_a_parameter_s_path_alone():
    params = all_params(SPECS["rpb"])
    whole = landscape.random_direction(params, KEY, tables="zeroed")
    part = {"encoder": {"blocks": params["encoder"]["blocks"]}}
    alone = landscape.random_direction(part, KEY, tables="zeroed")
    blocks = (direction["encoder"]["blocks"] for direction in (alone, whole))
    jax.tree.map(np.testing.assert_array_equal, *blocks)


@pytest.mark.parametrize(
    "params",
    [
        {"encoder": {"blocks": {"0": {"adapter": {"kernel": np.ones((2, 2))}}}}},
        {"head": {"bias": np.ones((2, 2))}},
        {"head": {"kernel": np.ones(2)}},
    ],
    ids=["unknown", "bias of two dimensions", "kernel of one"],
)
def test_a_parameter_that_the_table_does_not_know_is_an_error(params):
    with pytest.raises(ValueError, match="parameter (encoder|head)/.*"):
        landscape.random_direction(params, KEY, tables="zeroed")


def test_the_curve_of_a_quadratic_has_the_known_curvature():
    """f(p) = k/2 |p|^2 + sum p. Along any direction its curvature is k times |weights|^2."""
    params = all_params(SPECS["ape"])
    direction = landscape.random_direction(params, KEY, tables="zeroed")
    k, positions = 3.0, landscape.symmetric_steps(5, radius=2.0)

    def quadratic(p):
        leaves = jax.tree.leaves(p)
        return sum(k / 2 * jnp.sum(jnp.square(x)) + jnp.sum(x) for x in leaves)

    got = np.asarray(
        jax.jit(lambda p, d: landscape.curve(quadratic, p, d, positions))(params, direction),
        np.float64,
    )
    theta, delta = by_path(params), by_path(direction)
    want = [
        sum(np.sum(k / 2 * (theta[x] + a * delta[x]) ** 2 + theta[x] + a * delta[x]) for x in theta)
        for a in positions
    ]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    second_difference = (got[0] - 2 * got[2] + got[4]) / 2.0**2
    perturbed = sum(np.sum(theta[x] ** 2) for x in theta if x.endswith("kernel"))
    assert second_difference == pytest.approx(k * perturbed, rel=1e-4)


@pytest.mark.parametrize("points, radius", [(3, 1.0), (51, 1.0), (51, 0.3), (101, 0.7)])
def test_positions_are_equal_steps_around_exactly_zero(points, radius):
    got = landscape.symmetric_steps(points, radius)
    np.testing.assert_allclose(got, np.linspace(-radius, radius, points), rtol=0, atol=1e-15)
    assert got[points // 2] == 0
    np.testing.assert_array_equal(got, -got[::-1])


def save_classifier(folder, name, pooling, **arch):
    spec = dataclasses.replace(SPECS[name], classes=CLASSES, pooling=pooling)
    spec = dataclasses.replace(spec, arch={**spec.arch, **arch}, mean=(0.4, 0.5, 0.6))
    model_folder.save(folder, spec, all_params(spec))
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    where = tmp_path_factory.mktemp("classifiers") / "student"
    return save_classifier(where, "rpb", "mean_norm", final_norm=False)


def labelled(size, side=32):
    """A batch whose last three rows are padding."""
    batch = tiny.labelled_batch(size=size, side=side)
    batch["weight"][-3:], batch["label"][-3:] = 0, -1
    return batch


def plain_evaluation(model, batch):
    """Mean loss and accuracy in numpy, from the features of a `inference.Model`."""
    spec, params = model.spec, model.params
    pixels = (batch["image"] / 255 - np.array(spec.mean)) / np.array(spec.std)
    features = model(jnp.asarray(pixels, jnp.float32))
    pooled = np.asarray(features.patches, np.float64).mean(axis=1)
    if spec.pooling == "cls":
        pooled = np.asarray(features.cls_token, np.float64)
    if spec.pooling == "mean_norm":
        centred = pooled - pooled.mean(axis=1, keepdims=True)
        pooled = centred / np.sqrt(np.mean(centred**2, axis=1, keepdims=True) + 1e-6)
        pooled = pooled * params["fc_norm"]["scale"] + params["fc_norm"]["bias"]
    logits = pooled @ params["head"]["kernel"] + params["head"]["bias"]
    real = batch["weight"] > 0
    logits, label = logits[real], batch["label"][real]
    loss = special.logsumexp(logits, axis=1) - logits[np.arange(len(label)), label]
    return loss.mean(), np.mean(np.argmax(logits, axis=1) == label)


def measured(measurement, batches, *, params=None):
    """The figures of a landscape over some batches."""
    compute = jax.jit(measurement.sums)
    params = measurement.params if params is None else params
    totals, images = {}, 0
    for batch in batches:
        for name, value in compute(params, batch).items():
            assert value.dtype == jnp.float32
            totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
        images += int(np.sum(batch["weight"]))
    return measurement.figures(totals, images)["landscape"]


@pytest.mark.parametrize(
    ("name", "pooling", "image_size"),
    [
        ("rpb", "mean_norm", 48),
        pytest.param("ape", "cls", None, marks=pytest.mark.slow),
        pytest.param("swin", "mean", None, marks=pytest.mark.slow),
    ],
)
def test_points_equal_a_plain_evaluation_of_the_perturbed_network(
    tmp_path, name, pooling, image_size
):
    """The middle point is the network itself; the outer ones are it plus or minus the direction."""
    folder = save_classifier(tmp_path / "model", name, pooling)
    options = {"seed": 4, "directions": 2, "points": 3, "radius": 0.5, "tables": "literal"}
    got = measured(
        Landscape("it", folder, image_size=image_size, **options), [labelled(12, image_size or 32)]
    )
    assert got["position"] == [-0.5, 0.0, 0.5]
    model = inference.load_model(folder, image_size=image_size)
    middle = model.params
    key = jax.random.fold_in(jax.random.key(4, impl="threefry2x32"), 1)
    direction = landscape.random_direction(middle, key, tables="literal")
    for point, a in enumerate(got["position"]):
        model.params = jax.tree.map(lambda p, d, a=a: np.asarray(p + a * d), middle, direction)
        loss, accuracy = plain_evaluation(model, labelled(12, image_size or 32))
        assert got["loss"][1][point] == pytest.approx(loss, rel=2e-5)
        assert got["accuracy"][1][point] == pytest.approx(accuracy)
    assert got["loss"][0][1] == got["loss"][1][1]
    assert got["loss"][0][0] != pytest.approx(got["loss"][1][0], rel=1e-3)


def rows(batch, start, stop, size):
    """Some rows of a batch, filled up with padding."""
    filler = {"weight": 0, "label": -1, "image": 0, "index": -1}
    out = {}
    for name, value in batch.items():
        out[name] = np.full((size, *value.shape[1:]), filler[name], value.dtype)
        out[name][: stop - start] = value[start:stop]
    return out


@pytest.fixture(scope="module")
def measurement(student):
    return Landscape("student", student, directions=2, points=3)


@pytest.mark.slow
def test_figures_depend_on_neither_batch_size_nor_mesh(measurement):
    batch = labelled(24)
    whole = measured(measurement, [batch])
    small = measured(measurement, [rows(batch, 0, 16, 16), rows(batch, 16, 24, 16)])
    mesh = sharding.make_mesh(data=4, fsdp=2)
    params = jax.device_put(measurement.params, sharding.param_shardings(measurement.params, mesh))
    split = measured(
        measurement, [jax.device_put(batch, sharding.batch_sharding(mesh))], params=params
    )
    for other in (small, split):
        np.testing.assert_allclose(other["loss"], whole["loss"], rtol=1e-5)
        np.testing.assert_allclose(other["accuracy"], whole["accuracy"])
    padding_counted = measured(
        measurement, [{**batch, "weight": np.ones(24, np.float32), "label": abs(batch["label"])}]
    )
    assert not np.allclose(padding_counted["loss"], whole["loss"], rtol=1e-3)


@pytest.mark.slow
def test_bfloat16_is_near_float32(measurement, student):
    other = Landscape("student", student, directions=2, points=3, dtype=jnp.bfloat16)
    one, two = (measured(each, [labelled(24)]) for each in (measurement, other))
    assert one["loss"] != two["loss"]
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=0.05)


def test_settings_are_recorded(student):
    settings = {"seed": 7, "radius": 0.25, "tables": "literal"}
    figures = Landscape("student", student, directions=1, points=3, **settings).figures(
        {"loss": np.full((1, 3), 8.0), "correct": np.full((1, 3), 2.0), "unlabelled": np.zeros(())},
        4,
    )
    assert figures["landscape"] == {
        "position": [-0.25, 0.0, 0.25],
        "loss": [[2.0, 2.0, 2.0]],
        "accuracy": [[0.5, 0.5, 0.5]],
        "augmentation": "none (evaluation transform)",
        "weight_decay": "not part of the loss",
        **settings,
    }


def digits():
    """scikit-learn's digits as images of 32 pixels. -> uint8 [N, 32, 32, 3], int32 [N]"""
    images, label = sklearn_datasets.load_digits(return_X_y=True)
    pixels = np.kron(images.reshape(-1, 8, 8), np.ones((4, 4))) * 15
    return np.repeat(pixels[..., None], 3, axis=-1).astype(np.uint8), label.astype(np.int32)


def trained(folder, images, label, steps=150):
    """Trains the classifier in a folder and writes it back."""
    network = ImageClassifier(folder)
    tx = optax.adam(1e-2)

    def loss(params):
        logits = network.logits(params, images)
        return jnp.mean(losses.cross_entropy(logits, jax.nn.one_hot(label, CLASSES)))

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]

    params = jax.tree.map(np.asarray, train(network.params))
    model_folder.save(folder, network.spec, params, overwrite=True)


@pytest.mark.slow
def test_a_trained_network_is_in_a_valley_of_its_training_loss(tmp_path):
    spec = dataclasses.replace(SPECS["rpb"], classes=CLASSES, pooling="mean_norm")
    encoder = specs.split(spec.build(rngs=nnx.Rngs(0)))[1]
    folder = tmp_path / "digits"
    parts = {"encoder": encoder, **head_params(spec, tiny.STUDENT["width"])}
    model_folder.save(folder, spec, jax.tree.map(np.asarray, parts))
    images, label = (x[:128] for x in digits())
    trained(folder, images, label)
    batch = {"image": images, "label": label, "weight": np.ones(128, np.float32)}
    got = measured(Landscape("digits", folder, directions=2, points=11), [batch])
    loss, accuracy = np.array(got["loss"]), np.array(got["accuracy"])
    assert accuracy[0, 5] > 0.95
    assert (loss.argmin(axis=1) == 5).all()
    assert (loss[:, [0, -1]] > 10 * loss[:, [5]]).all()
    assert (accuracy[:, [0, -1]] < 0.7).all()


def test_a_folder_without_a_head_is_refused(tmp_path):
    folder = tiny.save_student(tmp_path / "student")
    with pytest.raises(
        ModelFolderError, match="student has no classifier head.*fine-tune or probe"
    ):
        Landscape("student", folder)


def test_a_head_that_does_not_fit_its_description_is_refused(tmp_path):
    spec = dataclasses.replace(SPECS["rpb"], classes=CLASSES + 1, pooling="mean_norm")
    model_folder.save(tmp_path / "model", spec, all_params(spec))
    with pytest.raises(ModelFolderError, match="head/bias has shape"):
        Landscape("model", tmp_path / "model")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points": 50}, "points=50: expected an odd number"),
        ({"points": 1}, "points=1: expected an odd number"),
        ({"radius": 0.0}, "radius=0.0: expected a number above 0"),
        ({"directions": 0}, "directions=0"),
        ({"tables": "none"}, "tables='none' is unknown; expected one of 'zeroed', 'literal'"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_before_the_folder_is_read(settings, message):
    with pytest.raises(ConfigError, match=message):
        Landscape("student", "/no/such/folder", **settings)


@dataclasses.dataclass
class Labels:
    """A dataset of one image."""

    num_classes: int | None
    label: int = 0
    name: str = "some/split"
    class_names: tuple[str, ...] | None = None

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return Example(b"", self.label)

    def describe(self, index):
        return f"{self.name}[{index}]"


def test_a_dataset_has_to_have_the_labels_that_the_head_knows(measurement):
    measurement.check_dataset(Labels(CLASSES))
    for dataset, message in (
        (Labels(None), "some/split has no class labels; use a dataset"),
        (Labels(CLASSES, label=-1), "some/split hides its class labels"),
        (Labels(CLASSES - 1), "some/split has 9 classes, but the head of student has 10"),
    ):
        with pytest.raises(DataError, match=message):
            measurement.check_dataset(dataset)


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_single_images_without_a_label_are_refused(measurement, label):
    batch = labelled(24)
    batch["label"][:2] = label
    with pytest.raises(DataError, match="2 of 21 images have no label of the classes that student"):
        measured(measurement, [batch])
