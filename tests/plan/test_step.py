"""Properties of the compiled TPU step: a small FD step for 16 chips, and a broken control."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from fd_jax.plan import hlo
from tests.plan.compile_step import FIGURES, IMAGES, STUDENT, TEACHER

ROOT = pathlib.Path(__file__).parent.parent.parent
MESH = {"data": 1, "fsdp": 16, "tensor": 1}
TOKENS = 197
MARGIN = 1.03
pytestmark = pytest.mark.slow  # two compilations for 16 chips


class Step:
    """The results of compile_step.py, in a process that starts at once; `wait` reads them."""

    def __init__(self, folder, *flags):
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment["JAX_PLATFORMS"] = "cpu"
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.plan.compile_step", f"--output={folder}", *flags],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def wait(self):
        output, _ = self._process.communicate(timeout=300)
        assert self._process.returncode == 0, output
        self.facts = json.loads((self._folder / "facts.json").read_text())
        self.module = hlo.Module((self._folder / "step.txt").read_text())
        self.collectives = self.module.collectives(MESH)
        return self

    def of_kind(self, kind):
        return [c for c in self.collectives if c.kind == kind]

    def inputs(self, *words):
        return {
            path: fields
            for path, fields in self.facts["inputs"].items()
            if all(word in path for word in words)
        }


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """[the step, a broken step]. The broken one has replicated moments and teacher, bfloat16
    reductions, no donation, a position bias per example, and hidden units in float32.
    """
    steps = [
        Step(tmp_path_factory.mktemp("step")),
        Step(tmp_path_factory.mktemp("broken"), "--broken"),
    ]
    return [step.wait() for step in steps]


@pytest.fixture(scope="module")
def step(both):
    return both[0]


@pytest.fixture(scope="module")
def broken(both):
    return both[1]


def expected_gathers(depth):
    """Number of gathers over fsdp in an FD step; teacher and student have the same depth.

    A block has six, because q, k and v are gathered separately. Student forward: its blocks, patch
    embedding and projector. Backward: its blocks again, except the last MLP, whose gathered copies
    still exist. Teacher: its blocks and its patch embedding.
    """
    return (6 * depth + 2) + (6 * depth - 2) + (6 * depth + 1)


def test_collectives_are_gathers_of_weights_and_sums_of_gradients(step):
    assert {c.kind for c in step.collectives} == {"all-gather", "all-reduce"}
    assert {c.axis for c in step.collectives} == {"fsdp"}
    gathers = step.of_kind("all-gather")
    assert sum(c.count for c in gathers) == expected_gathers(2)
    assert {c.dtypes for c in gathers} == {("bf16",)}
    weights = {
        size
        for width, hidden in (
            (STUDENT["width"], STUDENT["mlp_width"]),
            (TEACHER["width"], TEACHER["mlp_width"]),
        )
        for size in (width * width, width * hidden, 3 * 16 * 16 * width)
    } | {STUDENT["width"] * TEACHER["width"]}
    for gather in gathers:
        assert all(shape.bytes // 2 in weights for shape in gather.shapes), gather
    student, teacher = (
        4 * shape["width"] ** 2 + 2 * shape["width"] * shape["mlp_width"]
        for shape in (STUDENT, TEACHER)
    )
    patches = 3 * 16 * 16 * (STUDENT["width"] + TEACHER["width"])
    projector, last = (STUDENT["width"] * size for size in (TEACHER["width"], STUDENT["mlp_width"]))
    elements = 2 * (2 * student + teacher) - 2 * last + patches + projector
    assert sum(c.bytes for c in gathers) == 2 * elements


def test_gradients_are_summed_once(step):
    """The reduced bytes are those of the trained parameters in float32, plus some scalars."""
    parameters = sum(_size(f["shape"]) for f in step.inputs(".params").values())
    reduced = sum(c.bytes for c in step.of_kind("all-reduce"))
    # The gradients of the position tables may be summed as [A, N, N] for the four heads.
    assert 4 * parameters <= reduced <= 4 * parameters + 4 * 4 * TOKENS**2 + 1000


@pytest.mark.slow
@pytest.mark.parametrize("depth", [3, 4])
def test_the_number_of_gathers_grows_with_depth_as_expected(depth, tmp_path):
    deeper = Step(tmp_path, f"--depth={depth}").wait()
    assert sum(c.count for c in deeper.of_kind("all-gather")) == expected_gathers(depth)


def reduced_dtypes(step):
    return {dtype for c in step.of_kind("all-reduce") for dtype in c.dtypes} - {"s32"}


def test_gradients_are_reduced_in_float32(step, broken):
    assert reduced_dtypes(step) == {"f32"}
    assert "bf16" in reduced_dtypes(broken)


def whole_kernels(step, *words):
    return [path for path, f in step.inputs(*words, "kernel").items() if f["whole"]]


def test_moments_and_parameters_are_sharded(step, broken):
    assert len(step.inputs("opt_state", "kernel")) == 2 * len(step.inputs(".params", "kernel"))
    assert whole_kernels(step, "opt_state") == []
    assert whole_kernels(step, ".params") == []
    assert whole_kernels(broken, "opt_state") == list(broken.inputs("opt_state", "kernel"))


def test_the_teacher_is_sharded(step, broken):
    assert step.inputs("frozen", "kernel")
    assert whole_kernels(step, "frozen") == []
    assert whole_kernels(broken, "frozen") == list(broken.inputs("frozen", "kernel"))


def test_matmul_flops_equal_the_closed_form(step):
    """No matmul is missing or repeated. The broken step has as many, so it is no control here."""
    total, repeated = step.module.matmul_flops()
    assert total == IMAGES * step.facts["closed_form"]
    assert repeated == 0


def test_the_state_is_donated(step, broken):
    assert step.module.aliased_parameters() == set(range(step.facts["state_leaves"]))
    assert broken.module.aliased_parameters() == set()


def biases_per_example(step):
    """Shapes of stored arrays that repeat a bias [A, N, N] for each image."""
    repeated = sorted((IMAGES, STUDENT["heads"], TOKENS, TOKENS))
    return [s for s in step.module.stored_broadcasts() if sorted(s.dims) == repeated]


def test_the_position_bias_is_not_repeated_per_example(step, broken):
    assert biases_per_example(step) == []
    assert biases_per_example(broken)


def hidden_in_float32(step):
    """Shapes of hidden units, one row per token, that are written in float32."""
    hidden = {(IMAGES * TOKENS, s["mlp_width"]) for s in (STUDENT, TEACHER)}
    shapes = step.module.scheduled_shapes()
    return [s for s in shapes if s.dims in hidden and s.dtype == "f32"]


def test_hidden_units_are_written_in_the_compute_dtype(step, broken):
    assert hidden_in_float32(step) == []
    assert hidden_in_float32(broken)


def grown(costs, committed):
    """Ratio of each cost that exceeds its committed value by more than the margin."""
    return {
        name: value / committed[name]
        for name, value in costs.items()
        if value > MARGIN * committed[name]
    }


def test_costs_did_not_grow(step, broken):
    """Renew with `python -m tests.plan.compile_step --renew`; give the reason in the commit."""
    committed = json.loads(FIGURES.read_text())
    assert committed.keys() == step.facts["figures"].keys()
    assert grown(step.facts["figures"], committed) == {}
    assert {"arguments", "bytes_per_image"} <= grown(broken.facts["figures"], committed).keys()


def _size(shape):
    size = 1
    for side in shape:
        size *= side
    return size


def test_fused_attention_leaves_the_rest_of_the_step_as_it_is(step, tmp_path):
    """Weights are gathered and gradients summed as before; matmuls of attention are in kernels."""
    fused = Step(tmp_path, "--attention=pallas_tpu").wait()
    counts = [sum(c.count for c in one.of_kind("all-gather")) for one in (fused, step)]
    assert counts == [expected_gathers(2)] * 2
    test_gradients_are_summed_once(fused)
    assert reduced_dtypes(fused) == {"f32"}
    assert fused.module.aliased_parameters() == set(range(fused.facts["state_leaves"]))
    assert whole_kernels(fused, ".params") == whole_kernels(fused, "frozen") == []
    found = {kernel.name.split("_")[1]: kernel.calls for kernel in fused.module.kernels}
    assert found == {"forward": 2, "saving": 2, "backward": 2}  # teacher's, student's twice
    assert step.module.kernels == []  # control
    # The backward pass computes the logits of two blocks once more.
    again = 2 * 2 * TOKENS**2 * STUDENT["width"]
    total, _ = fused.module.matmul_flops()
    assert total == IMAGES * (step.facts["closed_form"] + again)
    squares = {
        shape
        for shape in fused.module.scheduled_shapes()
        if shape.dims[:1] == (IMAGES,) and shape.dims[-2:] == (TOKENS, TOKENS)
    }
    assert squares == set()
    assert fused.facts["figures"]["bytes_per_image"] < step.facts["figures"]["bytes_per_image"]
