"""The report's figures against plain numpy, and its files."""

import json

from flax import nnx
import jax
import numpy as np
from PIL import Image
import pytest

from fd_jax import model_folder, report
from fd_jax.data.feed import Feed
from fd_jax.errors import UserError
from fd_jax.evaluation import agreement
from fd_jax.show import pictures
from fd_jax.tasks.distill import DistillTask
from tests import tiny


@pytest.fixture(scope="module")
def scores(teacher):
    """Task, inputs and what `agreement` says of them, padding included."""
    task = DistillTask(tiny.config(teacher))
    params = tiny.randomize(task.init(jax.random.key(0))[0], 5, scale=0.05)
    frozen = task.load_frozen()
    train = [tiny.batch(seed=1), tiny.batch(seed=2)]
    held_out = [tiny.batch(seed=3), {**tiny.batch(seed=4), "weight": (np.arange(16) < 5) * 1.0}]
    mean = agreement.mean_target(task, frozen, train)
    found = agreement.agreement(task, params, frozen, held_out, mean)
    return task, params, frozen, train, held_out, found


def test_agreement_is_what_its_formula_says(scores):
    task, params, frozen, train, held_out, found = scores

    def targets(batches):
        keep = [batch["weight"] > 0 for batch in batches]
        tokens = [np.asarray(task.teacher_target(frozen, batch)) for batch in batches]
        return np.concatenate([t[k] for t, k in zip(tokens, keep, strict=True)]).astype(float)

    keep = np.concatenate([batch["weight"] > 0 for batch in held_out])
    p = np.concatenate([np.asarray(task.predict(params, batch)) for batch in held_out])[keep]
    t, m = targets(held_out), targets(train)
    for kind, at in {"cls": slice(0, 1), "patch": slice(1, None)}.items():
        tk, pk = t[:, at], p[:, at]
        mk = m[:, at].mean((0, 1))
        r2 = 1 - ((tk - pk) ** 2).sum() / ((tk - mk) ** 2).sum()

        def cosine(a, b):
            return (
                (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
            ).mean()

        assert found[kind]["r2"] == pytest.approx(r2, rel=1e-4)
        assert found[kind]["cosine"] == pytest.approx(cosine(tk, pk), rel=1e-3, abs=1e-5)
        constant = np.broadcast_to(mk, tk.shape)
        assert found[kind]["cosine_of_mean"] == pytest.approx(cosine(tk, constant), rel=1e-4)


def test_predicting_the_mean_has_r2_zero(scores, tmp_path):
    """A student whose projector ignores its input and says the mean target."""
    task, params, frozen, train, _, _ = scores
    mean = agreement.mean_target(task, frozen, train)
    kernel = np.zeros_like(params["projector"]["kernel"])
    constant = {**params, "projector": {"kernel": kernel, "bias": mean["patch"]}}
    found = agreement.agreement(task, constant, frozen, train, mean)
    assert found["patch"]["r2"] == pytest.approx(0, abs=1e-5)
    assert found["patch"]["cosine"] == pytest.approx(found["patch"]["cosine_of_mean"], abs=1e-6)


def test_colours_are_the_principal_axes():
    rng = np.random.default_rng(0)
    scales = np.array([5.0, 3.0, 2.0] + [0.1] * 13)
    tokens = rng.normal(size=(10, 20, 16)) * scales
    colours = pictures.principal_colours(tokens)(tokens)
    assert colours.shape == (10, 20, 3)
    for channel in range(3):
        flat = colours[..., channel].reshape(-1)
        assert abs(np.corrcoef(flat, tokens[..., channel].reshape(-1))[0, 1]) > 0.9


def test_report_of_a_run(finished):
    workdir, _ = finished
    folder = report.write_report(workdir)
    text = (folder / "report.md").read_text()
    for name in ("loss.png", "maps.png"):
        assert f"({name})" in text
        assert np.asarray(Image.open(folder / name)).std() > 10
    scores = json.loads((folder / "agreement.json").read_text())
    assert scores["after"]["patch"]["r2"] > scores["before"]["patch"]["r2"]
    assert str(folder) in report.summary(folder)


def test_training_and_held_out_pictures_are_not_mixed_up(finished):
    workdir, _ = finished
    scores = json.loads((report.write_report(workdir) / "agreement.json").read_text())
    config, task, params = report._open_run(report.epath.Path(workdir))
    feed, frozen = Feed(**config.data), task.load_frozen()
    mean = agreement.mean_target(task, frozen, feed.sequential("train", batch_size=32))
    for name, split in (("training", "train"), ("after", "eval")):
        batches = feed.sequential(split, batch_size=32)
        found = agreement.agreement(task, params, frozen, batches, mean)
        assert scores[name]["patch"]["r2"] == pytest.approx(found["patch"]["r2"], abs=1e-5)
    assert scores["training"]["patch"]["r2"] != pytest.approx(found["patch"]["r2"], abs=1e-4)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        report.write_report(tmp_path)


def test_before_is_the_state_the_run_began_with(finished):
    """The untrained student of the report is the one that step 0 saw."""
    workdir, _ = finished
    config, task, _ = report._open_run(report.epath.Path(workdir))
    untrained, _ = jax.jit(task.init)(jax.random.key(config.seed))
    spec, parts = model_folder.load(workdir / "model")
    assert spec.arch == task.student_spec.arch
    network = nnx.merge(task.student_def, untrained["encoder"])
    assert network(spec.normalize(tiny.batch(2)["image"])).tokens.shape == (2, 17, 32)
    moved = np.abs(parts["encoder"]["cls_token"] - np.asarray(untrained["encoder"]["cls_token"]))
    # A few small steps away, not another draw.
    assert 0 < moved.max() < 0.02
