"""Teacher dropping against plain loops."""

import numpy as np
import pytest

from fd_jax.tasks.dropping import Dropping, loss_of_kept

ROWS, TEACHERS = 9, 3


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    losses, draws = rng.uniform(size=(2, ROWS, TEACHERS)).astype(np.float32)
    return losses, draws, np.r_[np.ones(ROWS - 1), 0].astype(np.float32)


def unic(losses, draws, weight, rate):
    """UNIC's rule (arXiv 2408.05088), image by image: (loss, what stays)."""
    kept = np.zeros_like(losses)
    for i, own in enumerate(losses):
        for t in range(len(own)):
            kept[i, t] = t == own.argmax() or not draws[i, t] < rate
    kept *= weight[:, None]
    return (kept * losses).sum() / kept.sum(), kept


def test_by_image_it_is_unics_rule_but_for_the_scale(case):
    losses, draws, weight = case
    dropping = Dropping(0.5)
    assert dropping.init(TEACHERS) == {}
    kept = dropping.kept({}, losses, draws)
    want, stays = unic(losses, draws, weight, 0.5)
    np.testing.assert_array_equal(kept[:-1], stays[:-1])
    np.testing.assert_allclose(loss_of_kept(losses, kept, weight), TEACHERS * want, rtol=1e-6)
    assert 0 < (stays == 0).sum() < stays.size - ROWS
    lowest = Dropping(0.5).kept({}, -losses, draws)  # negative control: the nearest stays
    assert (np.asarray(lowest) != kept).any()


def test_without_any_left_out_it_is_the_sum_over_the_teachers(case):
    losses, draws, weight = case
    kept = Dropping(0.0).kept({}, losses, draws)
    want = losses[:-1].sum(axis=1).mean()
    np.testing.assert_allclose(loss_of_kept(losses, kept, weight), want, rtol=1e-6)


def test_running_losses_decide_for_all_images_of_a_step(case):
    losses, _, weight = case
    dropping = Dropping(0.999999, by="running", decay=0.9)
    state, want = dropping.init(TEACHERS), None
    for step in range(4):
        now = losses + np.eye(TEACHERS, dtype=np.float32)[step % TEACHERS]
        mean = now[:-1].astype(np.float64).mean(axis=0)
        want = mean if want is None else 0.9 * want + 0.1 * mean
        state = dropping.average(state, now, weight)
        np.testing.assert_allclose(state["loss"], want, rtol=1e-5)
        kept = np.asarray(dropping.kept(state, now, np.zeros_like(now)))
        np.testing.assert_array_equal(kept, np.eye(TEACHERS)[[want.argmax()] * ROWS])
    assert state["steps"] == 4
