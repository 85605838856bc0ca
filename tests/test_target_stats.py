"""The statistics pass, against the network called by hand and plain numpy."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import base
from fd_jax import load_model, target_stats
from fd_jax.data import datasets, transforms
from fd_jax.normalization import statistics
from fd_jax.tasks.distill import DistillTask
from fd_jax.tasks.teacher import Teacher
from tests import ports, tiny, xla

ROOT = pathlib.Path(__file__).parent.parent
COUNT = 61  # a prime, so that the last batch is padded and devices get different parts of it


def run(teacher, data, output, *flags):
    common = (f"--teacher={teacher}", "--data=digits", f"--data_dir={data}", f"--output={output}")
    return target_stats.main([*common, f"--split=test[:{COUNT}]", *flags])


@pytest.fixture(scope="module")
def measured(teacher, embedded_data, tmp_path_factory):
    """The file of an unusual size and before the norm, from eight devices."""
    output = tmp_path_factory.mktemp("measured") / "stats.npz"
    flags = ("--before_norm", "--image_size=24", "--data_size=32", "--batch_size=16")
    assert run(teacher, embedded_data, output, *flags) == 0
    return output


def test_moments_are_those_of_the_tokens_of_all_pictures(measured, teacher, embedded_data):
    changes = {"image_size": 24, "target__after_norm": False, "target__resample": "bilinear"}
    made = base.teacher("tiny", path=teacher, target__statistics=str(measured), **changes)
    made["target"]["normalize"] = "phi_s"
    task = DistillTask(tiny.several([("one", made)]))
    spectra = statistics.load(measured, task.goal.teacher.origin(after_norm=False))

    dataset = datasets.open_dataset("digits", f"test[:{COUNT}]", data_dir=embedded_data)
    transform = transforms.EvalTransform(32)
    images = np.stack([transform(dataset[i].image) for i in range(COUNT)])
    features = task.goal.teacher.features(task.load_frozen(), images, final_norm=False, drops=None)
    patches = np.asarray(features.patches, np.float64)
    tokens = {
        "cls": np.asarray(features.cls_token, np.float64),
        "patch": patches.reshape(-1, 48),
        "gap": patches.mean(axis=1),
    }
    assert spectra.keys() == tokens.keys()
    for group, rows in tokens.items():
        found, want = spectra[group], np.cov(rows.T, bias=True)
        assert found.tokens == len(rows)
        np.testing.assert_allclose(found.mean, rows.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(found.covariance, want, atol=1e-5 * np.abs(want).max())
    # Negative control: the network at its own size, and after its norm, has other tokens.
    model = load_model(teacher)
    other = np.asarray(model(model.preprocess(images)).cls_token)
    assert np.abs(other.mean(axis=0) - spectra["cls"].mean).max() > 1e-2


def test_a_normalised_class_token_has_the_variance_1_over_these_pictures(
    measured, teacher, embedded_data
):
    made = base.teacher(
        "tiny",
        path=teacher,
        image_size=24,
        target__kind="cls",
        target__after_norm=False,
        target__normalize="phi_s",
        target__statistics=str(measured),
    )
    task = DistillTask(tiny.several([("one", made)]))
    dataset = datasets.open_dataset("digits", f"test[:{COUNT}]", data_dir=embedded_data)
    images = np.stack([transforms.EvalTransform(32)(dataset[i].image) for i in range(COUNT)])
    frozen = jax.tree.map(np.asarray, task.load_frozen())
    target = np.asarray(task.teacher_target(frozen, {"image": images}))[:, 0]
    np.testing.assert_allclose(target.var(axis=0), 1, atol=1e-3)
    np.testing.assert_allclose(target.mean(axis=0), 0, atol=1e-4)


@pytest.mark.parametrize(
    "flags,message",
    [
        (("--split=test[:0]",), "digits has no examples in 'test[:0]'"),
        (("--output=stats.txt",), "expected a file name that ends in .npz"),
        (("--teacher=nowhere",), "no model folder at nowhere"),
        (("--batch_size=12",), "not divisible by 8 batch shards"),
        (("--stages=2",), "teacher.stages=2, but the teacher is a vit, without stages"),
    ],
)
def test_what_cannot_be_measured_is_refused_and_leaves_no_file(
    flags, message, teacher, embedded_data, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert run(teacher, embedded_data, tmp_path / "stats.npz", *flags) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_kept_unless_it_may_be_replaced(
    measured, teacher, embedded_data, capsys
):
    before = measured.read_bytes()
    assert run(teacher, embedded_data, measured) == 2
    assert "stats.npz exists" in capsys.readouterr().err
    assert measured.read_bytes() == before


@pytest.mark.slow
def test_two_processes_share_the_pictures_and_measure_the_same(teacher, embedded_data, tmp_path):
    port = ports.free()

    def start(name, devices, *flags):
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla.flags(devices)}
        command = [sys.executable, "-m", "fd_jax.target_stats", f"--teacher={teacher}"]
        command += ["--data=digits", f"--data_dir={embedded_data}", f"--split=test[:{COUNT}]"]
        command += [f"--output={tmp_path / name}.npz", "--batch_size=16", *flags]
        return subprocess.Popen(
            command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    shared = (f"--coordinator=localhost:{port}", "--num_processes=2")
    running = [start("one", 1)]
    running += [start("two", 2, *shared, f"--process_id={number}") for number in range(2)]
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    origin = Teacher.of_folder(str(teacher)).origin(after_norm=True)
    one, two = (statistics.load(tmp_path / f"{name}.npz", origin) for name in ("one", "two"))
    assert one.keys() == two.keys() == {"cls", "patch", "gap"}
    for group, alone in one.items():
        assert two[group].tokens == alone.tokens
        for field in ("mean", "covariance"):
            want = getattr(alone, field)
            got = getattr(two[group], field)
            np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
