"""A table against a file: both directions, and one error that lists everything."""

import numpy as np
import pytest

from fd_jax.convert.containers.tensors import Tensor
from fd_jax.convert.rules import matching, transforms
from fd_jax.convert.rules.names import summarize
from fd_jax.convert.rules.tables import Derived, Drop, Rule, Table
from fd_jax.errors import ConversionError

ARCH = {"depth": 2, "width": 4}
TABLE = Table(
    (
        Rule("blocks.{i}.w", "encoder/blocks/{i}/kernel", transforms.LINEAR),
        Rule("a", "encoder/a"),
        Rule("head.weight", "head/kernel", transforms.LINEAR, optional=True),
        Rule("head.bias", "head/bias", optional=True),
    ),
    (Drop("text.*", "the text tower"),),
    (Derived("index", lambda arch, place: np.arange(arch["width"])),),
)
SHAPES = {
    "encoder/blocks/0/kernel": (4, 3),
    "encoder/blocks/1/kernel": (4, 3),
    "encoder/a": (4,),
    "head/kernel": (4, "K"),
    "head/bias": ("K",),
}


def tensor(name, shape, dtype="float32", value=None):
    return Tensor(
        name, shape, dtype, lambda: np.zeros(shape, dtype) if value is None else np.array(value)
    )


def a_file(**changes):
    shapes = {"blocks.0.w": (3, 4), "blocks.1.w": (3, 4), "a": (4,), "text.x": (7,)}
    tensors = {name: tensor(name, shape) for name, shape in shapes.items()}
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in tensors.items() if value is not None}


def problems(**changes):
    return matching.match(TABLE, a_file(**changes), SHAPES, ARCH).problems


def test_a_file_that_fits_has_no_problems_and_is_converted():
    found = matching.match(TABLE, a_file(), SHAPES, ARCH)
    assert not found.problems and found.found == found.expected == 3
    assert found.dropped == {"the text tower": ["text.x"]}
    converted = {path: load() for path, load in matching.convert(found, a_file())}
    assert {k: v.shape for k, v in converted.items()} == {
        k: v for k, v in SHAPES.items() if k.startswith("encoder")
    }


def test_every_problem_is_reported_at_once():
    found = problems(
        blocks__0__w=None,
        blocks__1__w=tensor("blocks.1.w", (4, 3)),
        a=tensor("a", (4,), "int64"),
        stray=tensor("stray", (1,)),
        index=tensor("index", (4,), "int64", [0, 1, 2, 9]),
    )
    assert found == [
        "missing blocks.0.w [3, 4]",
        "blocks.1.w has shape [4, 3], expected [3, 4]",
        "a has dtype int64, expected one of float32, float16, bfloat16",
        "index does not hold the values that follow from the architecture",
        "unexpected stray",
    ]


def test_sizes_that_only_the_file_knows_must_agree():
    head = {
        "head__weight": tensor("head.weight", (10, 4)),
        "head__bias": tensor("head.bias", (10,)),
    }
    assert not problems(**head)
    head["head__bias"] = tensor("head.bias", (9,))
    assert problems(**head) == ["head.bias has shape [9], expected [K]"]


def test_nan_in_a_derived_tensor_is_refused():
    values = np.array([0, 1, np.nan, 3])
    assert problems(index=tensor("index", (4,), "float64", values))


def test_a_parameter_without_a_rule_is_a_fault_of_the_table():
    shapes = {**SHAPES, "encoder/b": (1,)}
    found = matching.match(TABLE, a_file(), shapes, ARCH)
    assert found.problems == ["no rule fills the parameter encoder/b"]


def test_writing_what_the_model_lacks_is_refused():
    params = {"encoder/a": np.zeros(4), "encoder/blocks/0/kernel": np.zeros((4, 3))}
    with pytest.raises(ConversionError, match="lacks .*encoder/blocks/1/kernel"):
        dict(matching.invert(TABLE, params, ARCH, derived=True))


def test_names_are_summarised_by_block_number():
    names = [f"blocks.{i}.mlp.0.w" for i in range(12)] + ["norm1.w", "img/encoderblock_3/k"]
    assert summarize(names) == [
        "blocks.*.mlp.*.w (12)",
        "norm1.w",
        "img/encoderblock_3/k",
    ]
