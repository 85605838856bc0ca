"""Statistics of attention against naive loops, transformers' attentions and closed forms."""

import functools
import json
import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest
import torch

from fd_jax.diagnose import attention
from fd_jax.diagnose.attention import FIGURES, AttentionStatistics, explained_shares
from fd_jax.errors import ConfigError
from fd_jax.inference import Model
from fd_jax.models import sizes
from tests import tiny
from tests.models import swins, vits

TOLERANCE = 1e-6
IMAGES = 5  # in batches of 3, so that the last batch has padding

VITS = {
    "class token": tiny.teacher_spec(),
    "registers": tiny.teacher_spec(registers=3, layer_scale=0.5),
    "only registers": tiny.teacher_spec(cls_token=False, registers=1, position="rope"),
    "only patches": tiny.teacher_spec(cls_token=False),
    "shared_rpb": vits.student_spec({**vits.SMALL, "depth": 2}, "shared_rpb"),
    "not square": tiny.teacher_spec(image_size=[16, 40]),
}
# Grids of 8 and 4 under windows of 4: block 1 is shifted, block 2 is one window.
SWIN = {"image_size": 16, "depths": [2, 1], "heads": [2, 4]}
SWINS = {
    "swin": swins.spec(1, **SWIN),
    "swin_v2": swins.spec(2, **SWIN, pretrained_windows=[0, 0]),
}
SPECS = {**VITS, **SWINS}


def pictures(spec, count=IMAGES, seed=3):
    shape = (count, *sizes.sides(spec.arch["image_size"]), 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@functools.cache
def model(name):
    spec = SPECS[name]
    params = (swins if name in SWINS else vits).random_params(spec)

    def clamp(path, leaf):  # at SwinV2's largest scale, float32 has no six digits of a weight left
        return np.minimum(leaf, 2.5) if path[-1].key == "logit_scale" else leaf

    params = jax.tree_util.tree_map_with_path(clamp, params)
    return Model(spec, {"encoder": params})


def batches(images, size):
    """Full batches; the last one is filled with other pictures of weight 0."""
    for start in range(0, len(images), size):
        rows = images[start : start + size]
        others = 255 - images[: size - len(rows)]
        weight = (np.arange(size) < len(rows)).astype(np.float32)
        yield {"image": np.concatenate([rows, others]), "weight": weight}


def run(statistics, images, *, size=3, place=lambda batch: batch):
    """The figures, from sums in float64 over batches."""
    step = jax.jit(statistics.sums)
    totals = {}
    for batch in batches(images, size):
        for name, value in step(statistics.params, place(batch)).items():
            assert value.dtype == np.float32
            totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
    return statistics.figures(totals, len(images))


@functools.cache
def figures(name, **options):
    return run(AttentionStatistics(name, model(name), FIGURES, **options), pictures(SPECS[name]))


@functools.cache
def weights(name):
    """The weights of every layer, [R, A, N, N] in float64."""

    @jax.jit
    def compute(params, images):
        network = vits.bind(SPECS[name], params)
        return [a.weights() for a in network.attention_maps(images, range(network.depth))]

    images = model(name).preprocess(pictures(SPECS[name]))
    found = compute(model(name).params["encoder"], images)
    return [np.asarray(layer, np.float64) for layer in found]


def layers(spec, *, shift_back=True, patch=None):
    """(prefix, side of a patch in pixels, places [G, P, 2]) of every layer."""
    arch = spec.arch
    if spec.family == "vit":
        grid = [side // arch["patch_size"] for side in sizes.sides(arch["image_size"])]
        prefix = arch["cls_token"] + arch["registers"]
        places = [[(row, column) for row in range(grid[0]) for column in range(grid[1])]]
        return [(prefix, patch or arch["patch_size"], places)] * arch["depth"]
    found = []
    for stage, depth in enumerate(arch["depths"]):
        grid = arch["image_size"] // arch["patch_size"] // 2**stage
        w = min(arch["window"], grid)
        for block in range(depth):
            shift = w // 2 if shift_back and block % 2 and grid > w else 0
            places = [
                [
                    ((top + r + shift) % grid, (left + c + shift) % grid)
                    for r in range(w)
                    for c in range(w)
                ]
                for top in range(0, grid, w)
                for left in range(0, grid, w)
            ]
            found.append((0, patch or arch["patch_size"] * 2**stage, places))
    return found


def naive(weights, layer, *, normalize="patches", compare="rows"):
    """The figures of one layer by loops over rows, heads, queries and keys."""
    prefix, patch, places = layer
    rows, heads, tokens, _ = weights.shape
    distance, dropped = np.zeros(heads), np.zeros(heads)
    entropy, total = np.zeros(heads), np.zeros((tokens, tokens))
    cosines, divergences = [], []
    for row in range(rows):
        place = places[row % len(places)]
        for head in range(heads):
            for query in range(tokens):
                moved = kept = lost = 0.0
                for key in range(tokens):
                    weight = weights[row, head, query, key]
                    total[query, key] += weight / (rows * heads)
                    if weight > 0:
                        entropy[head] -= weight * math.log(weight) / (rows * tokens)
                    if key < prefix:
                        lost += weight
                    elif query >= prefix:
                        kept += weight
                        moved += (
                            weight * patch * math.dist(place[query - prefix], place[key - prefix])
                        )
                if query >= prefix:
                    share = kept if normalize == "patches" else 1.0
                    distance[head] += moved / share / (rows * (tokens - prefix))
                    dropped[head] += lost / (rows * (tokens - prefix))
        for first in range(heads):
            for second in range(heads):
                for token in range(tokens):
                    a, b = weights[row, first], weights[row, second]
                    if first < second:
                        u, v = (
                            (a[token], b[token])
                            if compare == "rows"
                            else (a[:, token], b[:, token])
                        )
                        cosines.append(u @ v / math.sqrt(u @ u) / math.sqrt(v @ v))
                    if first != second:
                        p, q = a[token], b[token]
                        seen = p > 0
                        divergences.append((p[seen] * np.log(p[seen] / q[seen])).sum())
    return {
        "distance": distance,
        "dropped": dropped,
        "similarity": np.mean(cosines),
        "entropy": entropy,
        "divergence": np.mean(divergences),
        "maps": total[prefix:, prefix:],
        "class_row": total[0, prefix:],
        "class_column": total[prefix:, 0],
    }


def naive_shares(average, grid):
    """Shares of variance, with groups collected in dictionaries."""
    size = len(average)
    shares = {}
    for name in ("offset", "key"):
        groups = {}
        for i in range(size):
            for j in range(size):
                (r, c), (s, d) = divmod(i, grid[1]), divmod(j, grid[1])
                groups.setdefault((r - s, c - d) if name == "offset" else j, []).append(
                    average[i, j]
                )
        mean = average.mean()
        between = sum(len(g) * (sum(g) / len(g) - mean) ** 2 for g in groups.values())
        shares[name] = between / ((average - mean) ** 2).sum()
    return shares


def each(weights, layers, **options):
    return [naive(w, layer, **options) for w, layer in zip(weights, layers, strict=True)]


def wanted(name, **options):
    return each(weights(name), layers(SPECS[name]), **options)


@pytest.mark.parametrize("name", SPECS)
def test_figures_equal_naive_loops(name):
    got, spec = figures(name), SPECS[name]
    has_class = bool(spec.arch.get("cls_token"))
    class_only = {"class_row", "class_column"}
    assert got.keys() == {*FIGURES, "dropped", *(class_only if has_class else ())}
    for number, want in enumerate(wanted(name)):
        for figure, value in want.items():
            if figure in class_only and not has_class:
                continue
            np.testing.assert_allclose(got[figure][number], value, rtol=TOLERANCE, atol=1e-7)
        grid = (4, 4) if name != "not square" else (2, 5)
        shares = naive_shares(want["maps"], grid)
        for kind, share in shares.items():
            assert got["shares"][kind][number] == pytest.approx(share, abs=TOLERANCE)
    json.dumps(got)


@pytest.mark.parametrize("name", ["registers", "swin"])
def test_other_conventions_equal_naive_loops(name):
    got = figures(name, normalize="none", compare="columns")
    for number, want in enumerate(wanted(name, normalize="none", compare="columns")):
        for figure in ("distance", "dropped", "similarity"):
            np.testing.assert_allclose(got[figure][number], want[figure], rtol=TOLERANCE)


def apart(figure, name, wrong, **options):
    """The smallest relative difference over layers (and heads) between a figure and wrong ones."""
    got = figures(name, **options)[figure]
    return min(
        np.abs(np.asarray(ours) / other[figure] - 1).min()
        for ours, other in zip(got, wrong, strict=True)
    )


def test_wrong_conventions_are_seen():
    """Control: each of these is a mistake that others made, or that is easily made."""
    spec, found = SPECS["registers"], weights("registers")
    right = layers(spec)
    assert apart("distance", "registers", wanted("registers")) < TOLERANCE
    assert apart("distance", "registers", wanted("registers", normalize="none")) > 1e-2
    kept = [(0, patch, [[(0, 0)] * prefix + places[0]]) for prefix, patch, places in right]
    assert apart("distance", "registers", each(found, kept)) > 1e-3
    units = layers(spec, patch=1)
    assert apart("distance", "registers", each(found, units)) > 1
    swapped = each([w.swapaxes(-1, -2) for w in found], right)
    assert apart("distance", "registers", swapped) > 1e-3
    assert apart("similarity", "registers", wanted("registers", compare="columns")) > 1e-3
    transposed = np.asarray(figures("registers")["maps"][0]).T
    assert np.abs(transposed / wanted("registers")[0]["maps"] - 1).max() > 1e-2


def test_patches_of_a_stage_have_its_size():
    """Control: patches of the first stage's size in all stages."""
    first = layers(SPECS["swin"], patch=SPECS["swin"].arch["patch_size"])
    for number, w in enumerate(weights("swin")):
        got = np.asarray(figures("swin")["distance"][number])
        off = np.abs(got / naive(w, first[number])["distance"] - 1).max()
        assert (off > 0.5) == (number == 2)


def test_shifted_windows_have_places_before_the_shift():
    """By their table, since pairs that only the roll made neighbours have next to no weight."""
    made = AttentionStatistics("swin", model("swin"), ["distance"])._layers
    right, rolled = layers(SPECS["swin"]), layers(SPECS["swin"], shift_back=False)
    for number, layer in enumerate(made):
        tables = []
        for _, patch, places in (right[number], rolled[number]):
            across = np.asarray(places)[:, :, None] - np.asarray(places)[:, None]
            tables.append(patch * np.sqrt((across**2).sum(-1)))
        np.testing.assert_allclose(layer.distances, tables[0], rtol=TOLERANCE)
        assert (np.abs(layer.distances - tables[1]).max() > 1) == (number == 1)


@pytest.mark.parametrize("name", ["registers", "swin_v2"])
def test_neither_batches_nor_order_matter(name):
    images = pictures(SPECS[name])
    statistics = AttentionStatistics(name, model(name), FIGURES)
    want = figures(name)
    got = run(statistics, images[::-1], size=4)
    for figure, value in want.items():
        for ours, theirs in zip(jax.tree.leaves(got[figure]), jax.tree.leaves(value), strict=True):
            assert ours == pytest.approx(theirs, rel=5 * TOLERANCE, abs=TOLERANCE)


def test_padding_of_weight_one_is_seen():
    """Control: the pictures that fill the last batch would change the figures."""
    statistics = AttentionStatistics("registers", model("registers"), ["distance"])
    (batch,) = batches(pictures(SPECS["registers"], 2), 3)
    step = jax.jit(statistics.sums)
    found = [
        np.array(
            statistics.figures(step(statistics.params, {**batch, "weight": weight}), 2)["distance"]
        )
        for weight in (batch["weight"], np.ones(3, np.float32))
    ]
    assert np.abs(found[1] / found[0] - 1).min() > 0.1


@pytest.mark.parametrize("name", ["class token", "swin"])
def test_devices_do_not_matter(name):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))

    def place(batch):
        return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))

    statistics = AttentionStatistics(name, model(name), FIGURES)
    got = run(statistics, pictures(SPECS[name]), size=8, place=place)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(figures(name)), strict=True):
        assert ours == pytest.approx(theirs, rel=5 * TOLERANCE, abs=TOLERANCE)


HUGGING_FACE = {
    "ViTModel": "class token",
    "Dinov2WithRegistersModel": "registers",
}


@pytest.mark.parametrize("class_name", HUGGING_FACE)
def test_figures_equal_those_of_transformers(class_name, tmp_path):
    name = HUGGING_FACE[class_name]
    spec = SPECS[name]
    theirs = vits.hugging_face(spec, model(name).params["encoder"], tmp_path / "model")
    assert type(theirs).__name__ == class_name
    theirs.set_attn_implementation("eager")
    pixels = np.moveaxis(np.asarray(model(name).preprocess(pictures(spec))), -1, 1)
    with torch.no_grad():
        found = theirs(torch.from_numpy(pixels.copy()), output_attentions=True).attentions
    for number, (w, layer) in enumerate(zip(found, layers(spec), strict=True)):
        for figure, want in naive(w.numpy().astype(np.float64), layer).items():
            np.testing.assert_allclose(figures(name)[figure][number], want, rtol=1e-5)


# docs/reference.md#attention-distance: (patch, mean distance between patches of 224 x 224 pixels)
UNIFORM = {16: 116.492227, 14: 116.565053, 32: 115.502894}
LARGEST = {16: 294.156421, 14: 296.984848, 32: 271.529004}


@pytest.mark.parametrize("patch", UNIFORM)
def test_uniform_attention(patch):
    small = {"image_size": 224, "width": 8, "heads": 2, "mlp_width": 8, "depth": 1}
    spec = tiny.teacher_spec(**small, patch_size=patch, registers=2)
    params = vits.random_params(spec)
    params["blocks"]["0"]["attn"]["qkv"]["kernel"][:, :2] = 0
    for name in ("q_bias", "k_bias"):
        params["blocks"]["0"]["attn"][name][:] = 0
    made = Model(spec, {"encoder": params})
    got, without = (
        run(
            AttentionStatistics("uniform", made, figures, normalize=kind), pictures(spec, 1), size=1
        )
        for figures, kind in ((FIGURES, "patches"), (["distance"], "none"))
    )
    patches = (224 // patch) ** 2
    tokens = patches + 3
    np.testing.assert_allclose(got["distance"], UNIFORM[patch], rtol=TOLERANCE)
    np.testing.assert_allclose(
        without["distance"], UNIFORM[patch] * patches / tokens, rtol=TOLERANCE
    )
    np.testing.assert_allclose(got["dropped"], 3 / tokens, rtol=TOLERANCE)
    np.testing.assert_allclose(got["similarity"], 1, atol=TOLERANCE)
    np.testing.assert_allclose(got["entropy"], math.log(tokens), rtol=TOLERANCE)
    np.testing.assert_allclose(got["divergence"], 0, atol=TOLERANCE)
    np.testing.assert_allclose(got["maps"], 1 / tokens, rtol=TOLERANCE)
    assert got["shares"] == {"offset": [0.0], "key": [0.0]}


@pytest.mark.parametrize("patch", LARGEST)
def test_largest_distance(patch):
    spec = tiny.teacher_spec(image_size=224, patch_size=patch, width=8, heads=1, depth=1)
    made = Model(spec, {"encoder": vits.random_params(spec)})
    (layer,) = AttentionStatistics("any", made, ["distance"])._layers
    assert layer.distances.max() == pytest.approx(LARGEST[patch], abs=1e-4)
    patches = layer.distances[0, 1:, 1:].astype(np.float64)
    assert patches.mean() == pytest.approx(UNIFORM[patch], abs=1e-5)


PATCHES = 16  # on a grid of 4 x 4
IDENTITY = np.arange(PATCHES)
NEXT = (IDENTITY + 1) % PATCHES
FIFTH = np.full(PATCHES, 5)


@functools.cache
def _figures_of_choice(*heads):
    spec = tiny.teacher_spec(width=2 * PATCHES, heads=2, depth=1, cls_token=False, norm_eps=1e-12)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), spec.abstract()[1])
    params["pos_embed"][0] = np.eye(PATCHES, 2 * PATCHES)
    params["blocks"]["0"]["norm1"]["scale"][:] = 1
    kernel = params["blocks"]["0"]["attn"]["qkv"]["kernel"]
    for head, keys in enumerate(heads):
        part = slice(head * PATCHES, (head + 1) * PATCHES)
        if keys is not None:
            kernel[:PATCHES, 0, part] = 8 * np.eye(PATCHES)
            kernel[list(keys), 1, part.start + IDENTITY] = 8
    made = Model(spec, {"encoder": params})
    return run(AttentionStatistics("chosen", made, FIGURES), pictures(spec, 2), size=2)


def figures_of_choice(*heads):
    """The figures of two heads that look at one key for each query, or at all alike (None)."""
    return _figures_of_choice(*(None if keys is None else tuple(keys) for keys in heads))


def test_attention_to_itself():
    got = figures_of_choice(IDENTITY, IDENTITY)
    assert got["distance"] == [[0.0, 0.0]]
    assert got["dropped"] == [[0.0, 0.0]]
    assert got["entropy"] == [[0.0, 0.0]]
    np.testing.assert_allclose(got["similarity"], 1, atol=TOLERANCE)
    np.testing.assert_allclose(got["divergence"], 0, atol=TOLERANCE)
    np.testing.assert_array_equal(got["maps"][0], np.eye(PATCHES))
    assert got["shares"] == {"offset": [pytest.approx(1)], "key": [pytest.approx(0)]}


def test_disjoint_heads():
    got = figures_of_choice(IDENTITY, NEXT)
    np.testing.assert_allclose(got["similarity"], 0, atol=TOLERANCE)
    steps = [8 * math.dist(divmod(i, 4), divmod(int(NEXT[i]), 4)) for i in range(PATCHES)]
    np.testing.assert_allclose(got["distance"], [[0, np.mean(steps)]], rtol=TOLERANCE)


def test_one_key_against_all():
    got = figures_of_choice(IDENTITY, None)
    np.testing.assert_allclose(got["similarity"], 1 / math.sqrt(PATCHES), rtol=TOLERANCE)
    np.testing.assert_allclose(got["entropy"], [[0, math.log(PATCHES)]], atol=TOLERANCE)


def test_one_key_for_all_queries():
    got = figures_of_choice(FIFTH, FIFTH)
    np.testing.assert_array_equal(got["maps"][0], np.eye(PATCHES)[FIFTH])
    assert got["shares"]["key"] == [pytest.approx(1)]
    assert got["shares"]["offset"][0] < 0.5


def test_shares_of_diagonals_and_columns():
    rng = np.random.default_rng(0)
    height, width = grid = (3, 5)
    by_offset = rng.random((2 * height - 1, 2 * width - 1))
    places = [divmod(i, width) for i in range(height * width)]
    diagonal = np.array([[by_offset[r - s, c - d] for s, d in places] for r, c in places])
    column = np.broadcast_to(rng.random(height * width), diagonal.shape)
    got = explained_shares(diagonal, grid)
    assert got["offset"] == pytest.approx(1) and got["key"] < 0.5
    got = explained_shares(column, grid)
    assert got["key"] == pytest.approx(1) and got["offset"] < 0.9
    row = explained_shares(column.T, grid)
    assert row["key"] == pytest.approx(0)
    noise = rng.random(diagonal.shape)
    assert explained_shares(noise, grid) == pytest.approx(naive_shares(noise, grid))
    constant = np.full(diagonal.shape, 1 / 15)
    constant[0, 0] *= 1 + 2**-23
    assert explained_shares(constant, grid) == {"offset": 0.0, "key": 0.0}


def test_only_what_is_asked_for_is_summed():
    names = {
        "similarity": ["similarity"],
        "distance": ["distance", "dropped"],
        "shares": ["maps"],
    }
    for figure, summed in names.items():
        statistics = AttentionStatistics("tiny", model("class token"), [figure])
        (batch,) = batches(pictures(SPECS["class token"], 2), 2)
        shapes = jax.eval_shape(statistics.sums, statistics.params, batch)
        assert set(shapes) == {f"{name}/{layer}" for name in summed for layer in (0, 1)}
    got = run(statistics, pictures(SPECS["class token"], 2), size=2)
    assert got.keys() == {"shares"}


def temporary_bytes(depth):
    spec = tiny.teacher_spec(image_size=64, patch_size=4, width=16, mlp_width=32, depth=depth)
    made = Model(spec, {"encoder": vits.random_params(spec)})
    statistics = AttentionStatistics("deep", made, ["distance", "similarity", "maps"])
    (batch,) = batches(pictures(spec, 2), 2)
    compiled = jax.jit(statistics.sums).lower(statistics.params, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_one_blocks_weights_at_a_time():
    one_block = 2 * 4 * 257**2 * 4  # images, heads, pairs of tokens, bytes
    assert temporary_bytes(4) - temporary_bytes(2) < one_block


@pytest.mark.parametrize("name", ["class token", "swin"])
def test_every_block_waits_for_the_statistics_of_the_one_before(name):
    """Else the compiler for TPUs computes the weights of several blocks before it uses them."""
    statistics = AttentionStatistics(name, model(name), ["similarity"])
    (batch,) = batches(pictures(SPECS[name], 2), 2)
    jaxpr = jax.make_jaxpr(statistics.sums)(statistics.params, batch)
    waits = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "optimization_barrier"]
    assert len(waits) == len(statistics._layers) - 1
    for tokens, similarity in (eqn.outvars for eqn in waits):
        assert similarity in jaxpr.jaxpr.outvars
        assert any(tokens in eqn.invars for eqn in jaxpr.eqns)


def test_heads_need_a_partner():
    spec = tiny.teacher_spec(heads=1)
    made = Model(spec, {"encoder": vits.random_params(spec)})
    with pytest.raises(ConfigError, match=r"similarity of 'one': .* layers \[0, 1\] have one head"):
        AttentionStatistics("one", made, ["distance", "similarity"])
    AttentionStatistics("one", made, ["distance", "maps"])


@pytest.mark.parametrize(
    "wrong", [{"figures": ["distances"]}, {"normalize": "rows"}, {"compare": "keys"}], ids=str
)
def test_unknown_settings_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"{name}=.* is unknown; expected one of"):
        AttentionStatistics("tiny", model("class token"), **{"figures": ["maps"], **wrong})


def test_a_query_without_patches_counts_as_zero():
    w = np.zeros((1, 1, 3, 3), np.float32)
    w[0, 0, :2, 0] = 1  # all weight on the class token
    w[0, 0, 2] = 0, 1, 0
    table = np.pad(np.full((1, 2, 2), 7, np.float32), ((0, 0), (1, 0), (1, 0)))
    got = attention.distance(w, np.ones(1, np.float32), table, 1, normalize=True)
    np.testing.assert_array_equal(got["distance"][0, 0, 1:], [0, 7])
    np.testing.assert_array_equal(got["dropped"][0, 0, 1:], [1, 0])
