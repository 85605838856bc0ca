"""Networks of timm and open_clip, with the outputs that these libraries gave.

`outputs/` holds, for a small network of every style and switch, names and shapes of its tensors,
the files that the library writes beside them, and its tokens for one picture at two sizes.
`python -m benchmarks.coverage --outputs` made them; the weights follow from the names (`seeded`).
"""

import dataclasses
import json
from pathlib import Path

from flax import nnx
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from fd_jax import inference
from fd_jax.checkpoint import LazyArray
from fd_jax.convert import importing
from fd_jax.convert.containers.tensors import MappedFile
from fd_jax.convert.trees import flat
from fd_jax.errors import ConversionError
from tests.convert import seeded

OUTPUTS = Path(__file__).parent / "outputs"
NAMES = sorted(path.stem for path in OUTPUTS.glob("*.json"))
# Those that run by default; all others are slow tests.
QUICK = ("beit", "clip_quick_gelu", "convnext_v2", "eva02_clip", "vit_prefix_positions")
POOLED = [name for name in NAMES if "pooled" in np.load(OUTPUTS / f"{name}.npz")]
TOLERANCE = 4e-6  # of the largest value; Swin V2 in timm is off by 2e-6 from its own float64
# Facts that no tensor tells, and what they are not.
OTHERS = {
    "activation": lambda value: "gelu_tanh" if value != "gelu_tanh" else "gelu_erf",
    "norm_eps": lambda value: 1e-6 if value == 1e-5 else 1e-5,
    "rope_theta": lambda value: value / 2,
    "rope_pairs": lambda value: "halves" if value == "neighbours" else "neighbours",
    "rope_reference": lambda value: 2 * value if value else 3,
    "rope_offset": lambda value: value + 1,
    "rope_axes": lambda value: "yx" if value == "xy" else "xy",
    "pretrained_windows": lambda value: [side + 3 for side in value],
    "shortcut": lambda value: "pooled" if value == "strided" else "strided",
}


def cases(names, quick=QUICK):
    """Parameters of a test, of which those that are not quick are marked."""
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in names]


@dataclasses.dataclass(frozen=True)
class Saved:
    """A network as the library made it: its description, and arrays by the side of the picture."""

    about: dict
    tokens: dict[int, np.ndarray]
    pooled: np.ndarray | None


def saved(name):
    with np.load(OUTPUTS / f"{name}.npz") as arrays:
        tokens = {int(key): arrays[key] for key in arrays if key.isdigit()}
        pooled = arrays["pooled"] if "pooled" in arrays else None
    return Saved(json.loads((OUTPUTS / f"{name}.json").read_text()), tokens, pooled)


def write(found: Saved, folder, **changes):
    """The folder that the library would have written; `changes` are of the file beside it."""
    tensors = seeded.arrays(found.about["shapes"])
    save_file(tensors, folder / found.about["weights"], {"format": "pt"})
    for name, content in found.about["beside"].items():
        (folder / name).write_text(json.dumps({**content, **changes}))
    return folder


def read(found: Saved, folder, **changes):
    return importing.read("auto", write(found, folder, **changes))


def ours(spec, encoder, side):
    definition, _ = spec.abstract()
    run = jax.jit(lambda params, pixels: nnx.merge(definition, params)(pixels).tokens)
    with jax.default_matmul_precision("highest"):
        return np.asarray(run(encoder, spec.normalize(seeded.images(side))))


def off(found, expected):
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", cases(NAMES))
def test_tokens_are_those_of_the_library_at_two_sizes(name, tmp_path):
    found = saved(name)
    got = read(found, tmp_path)
    for side, expected in found.tokens.items():
        spec, encoder = got.spec.resized(got.params["encoder"], side)
        assert off(ours(spec, encoder, side), expected) < TOLERANCE


@pytest.mark.parametrize("name", cases(NAMES, ("vit_quick_gelu",)))
def test_the_comparison_sees_every_fact_that_no_tensor_tells(name, tmp_path):
    found = saved(name)
    got = read(found, tmp_path)
    side = min(found.tokens)
    resized, encoder = got.spec.resized(got.params["encoder"], side)
    arch, expected = resized.arch, found.tokens[side]
    wrong = {fact: {fact: other(arch[fact])} for fact, other in OTHERS.items() if fact in arch}
    if isinstance(arch.get("heads"), int) and "rpb" not in arch["position"]:  # tables have heads
        wrong["heads"] = {"heads": arch["heads"] // 2 if arch["heads"] % 2 == 0 else 1}
    if arch.get("bottleneck"):  # other blocks have one answer
        wrong["stride_at"] = {"stride_at": "first"}
    for fact, change in wrong.items():
        spec = dataclasses.replace(resized, arch={**arch, **change})
        assert off(ours(spec, encoder, side), expected) > 5 * TOLERANCE, fact
    shifted = dataclasses.replace(resized, mean=(0.1, 0.2, 0.3))
    assert off(ours(shifted, encoder, side), expected) > 5 * TOLERANCE


@pytest.mark.parametrize("name", cases(POOLED, ("clip_gelu", "vit_map")))
def test_pooled_vectors_are_those_of_the_library(name, tmp_path):
    found = saved(name)
    got = read(found, tmp_path)
    model = inference.Model(got.spec, got.params)
    images = got.spec.normalize(seeded.images(min(found.tokens)))
    assert off(np.asarray(model.pooled(images)), found.pooled) < TOLERANCE


@pytest.mark.parametrize("name", ["vit", "beit"])
def test_another_size_needs_the_position_resizing_of_the_library(name, tmp_path):
    found = saved(name)
    got = read(found, tmp_path)
    side = max(found.tokens)
    other = dataclasses.replace(got.spec, position_resize="size")
    spec, encoder = other.resized(got.params["encoder"], side)
    assert off(ours(spec, encoder, side), found.tokens[side]) > 5 * TOLERANCE


def test_a_config_of_another_network_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="vit_bose_patch16_224"):
        read(saved("vit"), tmp_path, architecture="vit_bose_patch16_224")


def test_the_outputs_are_small_and_name_their_libraries():
    assert sum(path.stat().st_size for path in OUTPUTS.iterdir()) < 1 << 20
    assert {saved(name).about["library"].partition(" ")[0] for name in NAMES} == {
        "timm",
        "open_clip",
    }


@pytest.mark.parametrize("name", ["beit", "clip_gelu", "convnext", "eva02", "swin_v2", "vit_gated"])
def test_arrays_of_every_style_are_read_when_they_are_written(name, tmp_path, monkeypatch):
    """One after the other, so that a giant is never in memory; position tables may be resized."""
    monkeypatch.setattr(importing, "_LAZY_SIZE", 1)
    folder = write(saved(name), tmp_path)
    read, load = [], MappedFile.array

    def counted(file, *arguments):
        read.append(arguments[-1])
        return load(file, *arguments)

    monkeypatch.setattr(MappedFile, "array", counted)
    params = flat(importing.read("auto", folder, lazy=True).params)
    tables = [path for path in params if path.endswith(("pos_embed", "rel_pos_bias/table"))]
    eager = {path for path, value in params.items() if not isinstance(value, LazyArray)}
    assert eager == set(tables) and len(read) == len(tables)
