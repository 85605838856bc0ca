"""Agreement against plain numpy, and the files of a report."""

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
    """A task, its inputs (with padding) and the `agreement` for them."""
    task = DistillTask(tiny.config(teacher))
    params = tiny.randomize(task.init(jax.random.key(0))[0], 5, scale=0.05)
    frozen = task.load_frozen()
    train = [tiny.batch(seed=1), tiny.batch(seed=2)]
    held_out = [tiny.batch(seed=3), {**tiny.batch(seed=4), "weight": (np.arange(16) < 5) * 1.0}]
    mean = agreement.mean_target(task, frozen, train)
    result = agreement.agreement(task, params, frozen, held_out, mean)
    return task, params, frozen, train, held_out, result


def test_agreement_equals_its_formula_in_numpy(scores):
    task, params, frozen, train, held_out, result = scores

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

        assert result[kind]["r2"] == pytest.approx(r2, rel=1e-4)
        assert result[kind]["cosine"] == pytest.approx(cosine(tk, pk), rel=1e-3, abs=1e-5)
        constant = np.broadcast_to(mk, tk.shape)
        assert result[kind]["cosine_of_mean"] == pytest.approx(cosine(tk, constant), rel=1e-4)


def test_predicting_the_mean_has_r2_zero(scores, tmp_path):
    """The student's projector ignores its input and outputs the mean target."""
    task, params, frozen, train, _, _ = scores
    mean = agreement.mean_target(task, frozen, train)
    kernel = np.zeros_like(params["projector"]["kernel"])
    constant = {**params, "projector": {"kernel": kernel, "bias": mean["patch"]}}
    result = agreement.agreement(task, constant, frozen, train, mean)
    assert result["patch"]["r2"] == pytest.approx(0, abs=1e-5)
    assert result["patch"]["cosine"] == pytest.approx(result["patch"]["cosine_of_mean"], abs=1e-6)


def test_colours_are_the_principal_components():
    rng = np.random.default_rng(0)
    scales = np.array([5.0, 3.0, 2.0] + [0.1] * 13)
    tokens = rng.normal(size=(10, 20, 16)) * scales
    colours = pictures.principal_colours(tokens)(tokens)
    assert colours.shape == (10, 20, 3)
    for channel in range(3):
        flat = colours[..., channel].reshape(-1)
        assert abs(np.corrcoef(flat, tokens[..., channel].reshape(-1))[0, 1]) > 0.9


def test_the_report_has_plots_and_an_improved_agreement(finished):
    workdir, _ = finished
    folder = report.write_report(workdir)
    text = (folder / "report.md").read_text()
    for name in ("loss.png", "maps.png"):
        assert f"({name})" in text
        assert np.asarray(Image.open(folder / name)).std() > 10
    scores = json.loads((folder / "agreement.json").read_text())
    assert scores["after"]["patch"]["r2"] > scores["before"]["patch"]["r2"]
    assert str(folder) in report.summary(folder)


@pytest.mark.slow
def test_training_and_held_out_agreement_use_their_own_split(finished):
    workdir, _ = finished
    scores = json.loads((report.write_report(workdir) / "agreement.json").read_text())
    config, task, params = report._open_run(report.epath.Path(workdir))
    feed, frozen = Feed(**config.data), task.load_frozen()
    mean = agreement.mean_target(task, frozen, feed.sequential("train", batch_size=32))
    for name, split in (("training", "train"), ("after", "eval")):
        batches = feed.sequential(split, batch_size=32)
        result = agreement.agreement(task, params, frozen, batches, mean)
        assert scores[name]["patch"]["r2"] == pytest.approx(result["patch"]["r2"], abs=1e-5)
    assert scores["training"]["patch"]["r2"] != pytest.approx(result["patch"]["r2"], abs=1e-4)


def test_a_folder_that_is_no_workdir_is_refused(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        report.write_report(tmp_path)


def test_the_untrained_student_is_the_initial_state_of_the_run(finished):
    """The report's untrained student has the parameters with which step 0 began."""
    workdir, _ = finished
    config, task, _ = report._open_run(report.epath.Path(workdir))
    untrained, _ = jax.jit(task.init)(jax.random.key(config.seed))
    spec, parts = model_folder.load(workdir / "model")
    assert spec.arch == task.student_spec.arch
    network = nnx.merge(task.student_def, untrained["encoder"])
    assert network(spec.normalize(tiny.batch(2)["image"])).tokens.shape == (2, 17, 32)
    moved = np.abs(parts["encoder"]["cls_token"] - np.asarray(untrained["encoder"]["cls_token"]))
    # A few small steps away, not another random initialization.
    assert 0 < moved.max() < 0.02
