"""Optimizer updates against torch and numpy, with the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from fd_jax import optimizer

STEPS = 5
SCHEDULE = optimizer.Cosine(
    start=1e-4, peak=1e-2, minimum=1e-5, warmup_steps=2, total_steps=10, lag=1
)
SHAPES = {
    "blocks": {"0": {"fc1": {"kernel": (8, 6), "bias": (6,)}}, "1": {"table": (9, 4)}},
    "cls_token": (1, 1, 8),
    "head": {"kernel": (6, 3), "bias": (3,)},
}
NO_DECAY = (r"(^|/)cls_token$",)


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    is_shape = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    return jax.tree.map(
        lambda shape: (scale * rng.normal(size=shape)).astype(np.float32), SHAPES, is_leaf=is_shape
    )


def gradients():
    """Gradients that are large at first, so that they are clipped, and then small."""
    return [tree(10 + step, scale=3.0 if step < 3 else 0.01) for step in range(STEPS)]


def run(tx, params):
    state = tx.init(params)
    for grads in gradients():
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def expected_rate(step, scale=1.0):
    """The schedule of docs/reference.md#lr-schedule in float64, with a lag of one step."""
    u = max(step - 1, 0)
    peak = 1e-2 * scale
    if u < 2:
        return 1e-4 + u * (peak - 1e-4) / 2
    return 1e-5 + (peak - 1e-5) / 2 * (1 + np.cos(np.pi * (u - 2) / 8))


def torch_run(params, *, scales=None, clip=3.0, decayed=None):
    """`run` with torch.optim.AdamW: one group per tensor, rates set before each step."""
    flat, treedef = jax.tree.flatten(params)
    paths = [optimizer.path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    scales = jax.tree.leaves(scales) if scales is not None else [1.0] * len(flat)
    tensors = [torch.nn.Parameter(torch.from_numpy(leaf.copy())) for leaf in flat]
    decayed = decayed or {"blocks/0/fc1/kernel", "blocks/1/table", "head/kernel"}
    groups = [
        {"params": [tensor], "weight_decay": 0.05 if path in decayed else 0.0}
        for path, tensor in zip(paths, tensors, strict=True)
    ]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    for step, grads in enumerate(gradients()):
        for tensor, grad in zip(tensors, jax.tree.leaves(grads), strict=True):
            tensor.grad = torch.from_numpy(grad.copy())
        torch.nn.utils.clip_grad_norm_(tensors, clip)
        for group, scale in zip(adamw.param_groups, scales, strict=True):
            group["lr"] = expected_rate(step, scale)
        adamw.step()
    return jax.tree.unflatten(treedef, [tensor.detach().numpy() for tensor in tensors])


def adamw(params, **kwargs):
    settings = {
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.05,
        "clip_norm": 3.0,
        "no_decay": NO_DECAY,
    }
    return optimizer.adamw(kwargs.pop("schedule", SCHEDULE), params, **{**settings, **kwargs})


def close(got, want):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-7)


def test_five_adamw_steps_equal_torch():
    params = tree(0)
    close(run(adamw(params), params)[0], torch_run(params))


@pytest.mark.parametrize(
    "wrong",
    [
        {"eps": 1e-3},
        {"weight_decay": 0.0},
        {"clip_norm": None},
        {"no_decay": ()},
        {"schedule": optimizer.Cosine(1e-4, 1e-2, 1e-5, 2, 10, lag=0)},
    ],
)
def test_wrong_settings_do_not_equal_torch(wrong):
    params = tree(0)
    with pytest.raises(AssertionError):
        close(run(adamw(params, **wrong), params)[0], torch_run(params))


def test_layer_decay_equals_torch():
    params = tree(0)
    scales = optimizer.layer_scales(
        params,
        lambda path: {"cls_token": 0, "blocks/0": 1, "blocks/1": 2}.get(
            path[: 9 if path[0] == "c" else 8], 3
        ),
        last=3,
        decay=0.65,
    )
    assert scales["cls_token"] == pytest.approx(0.65**3)
    assert scales["head"]["bias"] == 1.0
    close(run(adamw(params, layer_scales=scales), params)[0], torch_run(params, scales=scales))


def test_floors_of_the_schedule_are_not_scaled_unless_asked():
    """docs/reference.md#quirk-lr-floors: a small scale makes the rate fall, then rise."""
    scale = 1e-3
    assert SCHEDULE(0, scale) == pytest.approx(1e-4)
    assert SCHEDULE(3, scale) < SCHEDULE(0, scale)
    assert SCHEDULE(100, scale) == pytest.approx(1e-5)
    scaled = optimizer.Cosine(1e-4, 1e-2, 1e-5, 2, 10, lag=1, scale_floors=True)
    for step in (0, 1, 3, 7, 100):
        assert scaled(step, scale) == pytest.approx(float(scaled(step)) * scale, rel=1e-5)


def mmcv_rate(step, warmup, total):
    """The formulas of mmcv 1's hook, for a rate of 1."""
    regular = 1 - step / total
    return regular * (1 - (1 - step / warmup) * (1 - 1e-6)) if step < warmup else regular


def mmengine_rates(warmup, total):
    """The recursions of mmengine's LinearLR and PolyLR, for a rate of 1."""
    rates, rate = [], 1e-6
    for step in range(total):
        if 0 < step < warmup:
            rate += (1 - 1e-6) / (warmup - 1)
        elif step > warmup:
            rate *= 1 - 1 / (total - step)
        rates.append(rate)
    return rates


@pytest.mark.parametrize("warmup,total", [(6, 20), (1500, 160_000)])
def test_polynomial_rates_equal_those_of_both_libraries(warmup, total):
    want = {
        "mmcv": [mmcv_rate(step, warmup, total) for step in range(total)],
        "mmengine": mmengine_rates(warmup, total),
    }
    steps = np.arange(total)
    for variant, rates in want.items():
        schedule = optimizer.Polynomial(4e-4, 1e-6, warmup, total, variant)
        got = np.asarray(schedule(steps, 0.5))
        np.testing.assert_allclose(got, 2e-4 * np.array(rates), rtol=1e-6, atol=1e-12)
        assert schedule(total) == schedule(2 * total) == 0
    # The two differ by the 0.94 % that the first has fallen at the end of the warm-up.
    assert want["mmengine"][warmup] / want["mmcv"][warmup] > 1.009


def test_mmengine_rates_are_those_that_it_was_observed_to_give():
    """mmengine 0.10.7: warm-up of 6 steps from 1e-6 and PolyLR to 20, rate 1."""
    observed = {0: 1e-06, 1: 0.2000008, 4: 0.8000002, 5: 1.0, 6: 1.0, 7: 0.9230769230769231}
    observed |= {13: 0.46153846153846156, 18: 0.07692307692307694, 19: 0.0}
    for step, rate in observed.items():
        assert mmengine_rates(6, 20)[step] == pytest.approx(rate, abs=1e-12)


def test_clipping_follows_torch_at_the_limit():
    grads = {"a": np.array([3.0, 4.0], np.float32)}  # norm 5
    for limit in (1.0, 5.0, 7.0):
        tensor = torch.nn.Parameter(torch.zeros(2))
        tensor.grad = torch.tensor([3.0, 4.0])
        torch.nn.utils.clip_grad_norm_([tensor], limit)
        clip = optimizer.clip_by_norm(limit)
        got, _ = clip.update(grads, clip.init(grads))
        np.testing.assert_allclose(got["a"], tensor.grad.numpy(), rtol=1e-6)


def test_lars_has_the_documented_spot_values():
    """docs/reference.md#lars: two steps of a [1, 2] kernel and of a bias."""
    flat = optimizer.Cosine(0.1, 0.1, 0.1, 0, 10, lag=0)
    tx = optimizer.lars(flat, momentum=0.9, weight_decay=0.0)
    params = {"kernel": jnp.array([[3.0, 4.0]]), "bias": jnp.array([1.0])}
    grads = {"kernel": jnp.array([[0.0, 2.0]]), "bias": jnp.array([0.5])}
    state = tx.init(params)
    values = []
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        values.append((float(params["kernel"][0, 1]), float(params["bias"][0])))
    np.testing.assert_allclose(values, [(3.9995, 0.95), (3.99855, 0.855)], rtol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_five_lars_steps_equal_numpy(weight_decay):
    """Trust ratio and decay only for matrices; momentum after both (docs/reference.md#lars)."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (6, 4), "bias": (4,), "zero": (3, 2)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    params["zero"][:] = 0  # its norm is 0, so it has no trust ratio
    schedule = optimizer.Cosine(0.0, 0.5, 0.0, 2, 5, lag=0)
    tx = optimizer.lars(schedule, momentum=0.9, weight_decay=weight_decay)
    got = jax.tree.map(jnp.asarray, params)
    state = tx.init(got)
    want = {name: value.astype(np.float64) for name, value in params.items()}
    momentum = {name: np.zeros(shape) for name, shape in shapes.items()}
    rates = [0.0, 0.25, 0.5, 0.375, 0.125]  # warm-up over two steps, then half a cosine over three
    for step, rate in enumerate(rates):
        grads = {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
        updates, state = tx.update(grads, state, got)
        got = optax.apply_updates(got, updates)
        assert float(schedule(step)) == pytest.approx(rate, abs=1e-7)
        for name, value in want.items():
            change = grads[name].astype(np.float64)
            if value.ndim > 1:
                change = change + weight_decay * value
                norms = np.linalg.norm(value), np.linalg.norm(change)
                if min(norms) > 0:
                    change = change * 0.001 * norms[0] / norms[1]
            momentum[name] = 0.9 * momentum[name] + change
            want[name] = value - rate * momentum[name]
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("moments,bytes_per_number", [("bfloat16", 6), ("factored", 0)])
def test_reduced_moments_take_less_memory_and_reduce_the_loss(moments, bytes_per_number):
    params = {"kernel": np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)}
    flat = optimizer.Cosine(1e-2, 1e-2, 1e-2, 0, 10, lag=0)
    tx = adamw(params, schedule=flat, moments=moments, clip_norm=None, weight_decay=0.0)
    state = tx.init(params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / params["kernel"].size
    assert size == pytest.approx(bytes_per_number, abs=0.1)

    def loss(params):
        return jnp.mean(jnp.square(params["kernel"]))

    before = loss(params)
    for _ in range(5):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    assert loss(params) < before
