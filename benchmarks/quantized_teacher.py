r"""How far the target of a teacher in int8 or float8 is from that in bfloat16, on photographs.

    make quickstart-data
    python -m benchmarks.quantized_teacher --output=benchmarks/quantized_teacher.json
    python -m benchmarks.quantized_teacher --blocks=v5e --output=benchmarks/quantized_teacher.json
    python -m benchmarks.quantized_teacher --table    # the tables of docs/quantized_teachers.md

The teacher is the quickstart's, DINOv2 ViT-S/14 at 224 pixels, and the pictures are 256 of its
held-out photographs, spread over all thirteen. The target is the paper's: each token whitened over
its own channels. R2 is that of a report: 1 for equal targets, 0 for their mean token. What is not
quantised runs in bfloat16, as on a TPU. A CPU computes the same products as a TPU, but may sum
those of float8 and bfloat16 in another order.

--blocks compiles one block of a teacher ahead of time for one chip, as benchmarks/scale does whole
steps, for the widths of ViT-B, ViT-L and ViT-g: what the compiler says that each takes, in bfloat16
and in int8. It needs libtpu and no chip. Both commands keep what the file has of the other. The
last table has the compiled steps of benchmarks/scale, where the files are there.
"""

import argparse
from collections.abc import Iterator
import dataclasses
import json
import pathlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
import numpy as np

from benchmarks import scale
from configs import distill_clip_vit_b16
from fd_jax import losses
from fd_jax.data import datasets, pipeline, transforms
from fd_jax.models import quantized
from fd_jax.models.narrow import KINDS
from fd_jax.optimizer import path_name
from fd_jax.plan import experiment, hlo, topology
from fd_jax.tasks.teacher import Teacher
from fd_jax.typing import Batch

RESULTS = pathlib.Path(__file__).with_name("quantized_teacher.json")
TEACHER, DATA, SPLIT, SIZE = "teachers/dinov2_vits14_onnx", "photos", "test", 224
BATCH = 16
# dtype and matmuls of each teacher that is compared.
TEACHERS = {
    "float32": ("float32", ""),
    "bfloat16": ("bfloat16", ""),
    **{kind: ("bfloat16", kind) for kind in KINDS},
}
# The targets from which others are measured, and these.
PAIRS = [
    *(("float32", name) for name in ("bfloat16", *KINDS)),
    *(("bfloat16", name) for name in KINDS),
]
TOKENS = {"cls": slice(0, 1), "patch": slice(1, None)}
WIDTHS, IMAGES = (768, 1024, 1536), 64  # channels of ViT-B, ViT-L and ViT-g; images on the chip
STEPS = [scale.Row(run, chip) for chip in ("v5e", "v6e") for run in ("distill_b", "distill_int8_b")]


class Apart:
    """Sums over the tokens of one kind, of a pair of targets."""

    def __init__(self):
        self.tokens, self.squares, self.differences, self.cosines = 0, 0.0, 0.0, 0.0
        self.largest, self.sum = 0.0, np.zeros(())

    def add(self, reference: np.ndarray, other: np.ndarray) -> None:
        """Adds targets [B, T, D]."""
        reference, other = (x.reshape(-1, x.shape[-1]).astype(float) for x in (reference, other))
        difference = other - reference
        norms = np.linalg.norm(reference, axis=1) * np.linalg.norm(other, axis=1)
        self.tokens += len(reference)
        self.sum = self.sum + reference.sum(axis=0)
        self.squares += np.sum(reference**2)
        self.differences += np.sum(difference**2)
        self.cosines += np.sum(np.sum(reference * other, axis=1) / norms)
        self.largest = max(self.largest, np.abs(difference).max())

    def summary(self) -> dict[str, float]:
        """What the tables show."""
        variance = self.squares - np.sum(self.sum**2) / self.tokens
        return {
            "relative_rms": float(np.sqrt(self.differences / self.squares)),
            "max": float(self.largest),
            "cosine": float(self.cosines / self.tokens),
            "r2": float(1 - self.differences / variance),
        }


def measure(data_dir: str, pictures: int) -> dict:
    """The differences of each of PAIRS: by the first name, the second, and the kind of token."""
    sums: dict[tuple[str, str], dict[str, Apart]] = {pair: {} for pair in PAIRS}
    made = {name: _target(*variant) for name, variant in TEACHERS.items()}
    for number, batch in enumerate(_batches(data_dir, pictures), start=1):
        rows = batch["weight"] > 0
        targets = {name: np.asarray(target(batch["image"]))[rows] for name, target in made.items()}
        for (one, other), kinds in sums.items():
            for kind, tokens in TOKENS.items():
                pair = (targets[name][:, tokens] for name in (one, other))
                kinds.setdefault(kind, Apart()).add(*pair)
        print(f"{number * BATCH} pictures", flush=True)
    found: dict[str, dict] = {}
    for (one, other), kinds in sums.items():
        found.setdefault(one, {})[other] = {kind: apart.summary() for kind, apart in kinds.items()}
    return found


def _target(dtype: str, matmuls: str):
    """A function from uint8 images [B, H, W, 3] to whitened tokens [B, T, D] of one teacher."""
    teacher = Teacher.of_folder(TEACHER, image_size=SIZE, dtype=dtype, matmuls=matmuls)
    weights = jax.device_put(teacher.load())

    @jax.jit
    def target(images):
        features = teacher.features(weights, images, final_norm=True, drops=None)
        return losses.whiten(features.full.astype("float32"))

    return target


def _batches(data_dir: str, pictures: int) -> Iterator[Batch]:
    whole = datasets.open_dataset(DATA, SPLIT, data_dir=data_dir)
    yield from pipeline.eval_batches(
        datasets.spread(whole, pictures),
        transforms.LabelledImage(transforms.EvalTransform(SIZE)),
        batch_size=BATCH,
        threads=2,
    )


def blocks(chip: str) -> dict[str, dict]:
    """Cycles and bytes of one block with 64 channels per head, by width and matmuls.

    It is that of CLIP ViT-B/16, with 197 tokens, of the other widths as well.
    """
    target = topology.describe(f"{chip}:1x1")
    own = experiment.define(distill_clip_vit_b16.get_config()).task.goal.teacher.spec
    found: dict[str, dict] = {}
    for width in WIDTHS:
        shape = {"width": width, "heads": width // 64, "mlp_width": 4 * width, "depth": 1}
        spec = dataclasses.replace(own, arch={**own.arch, **shape})
        found[str(width)] = {kind: _compiled(spec, target, kind) for kind in ("", "int8")}
        print(f"{chip}, {width} channels: {found[str(width)]}", flush=True)
    return found


def _compiled(spec: Any, target: topology.Slice, matmuls: str) -> dict[str, float]:
    """The estimated cycles of a block's forward pass, and its bytes outside VMEM."""
    dtype, place = jnp.dtype("bfloat16"), SingleDeviceSharding(target.devices[0])
    definition, shapes = spec.abstract(dtype=dtype, matmuls=matmuls)

    def struct(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def held(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        return struct(leaf.shape, quantized.held_dtype(path_name(path), leaf, dtype))

    @jax.jit
    def run(params, tokens):
        return nnx.merge(definition, params).blocks["0"](tokens, None, None, None)

    params = jax.tree_util.tree_map_with_path(held, shapes)
    tokens = struct((IMAGES, 197, spec.arch["width"]), dtype)
    executable = run.lower(params, tokens).compile()
    module, cost = hlo.Module(executable.as_text() or ""), executable.cost_analysis()
    assert cost is not None
    accessed = cost["bytes accessed"] - module.vmem_bytes()
    return {"cycles": module.cycles(), "hbm_bytes": accessed}


def block_table(results: dict) -> str:
    """The compiled blocks as Markdown."""
    lines = [
        "| chip | channels | M cycles: bfloat16, int8 | int8 / bfloat16 | MB per image: bfloat16, "
        "int8 |",
        "|---|---|---|---|---|",
    ]
    for chip in ("v5e", "v6e"):
        if chip not in results:
            lines.append(f"| {chip} | not yet run | | | |")
        for width, each in results.get(chip, {}).items():
            plain, narrow = each[""], each["int8"]
            cycles = f"{plain['cycles'] / 1e6:.2f}, {narrow['cycles'] / 1e6:.2f}"
            size = ", ".join(f"{one['hbm_bytes'] / IMAGES / 1e6:.1f}" for one in (plain, narrow))
            ratio = narrow["cycles"] / plain["cycles"]
            lines.append(f"| {chip} | {width} | {cycles} | {ratio:.2f} | {size} |")
    return "\n".join(lines)


def error_table(results: dict) -> str:
    """The differences as Markdown."""
    lines = [
        "| teacher | from that in | relative RMS: class, patches | R2: class, patches | cosine: "
        "class, patches | largest |",
        "|---|---|---|---|---|---|",
    ]
    for one, others in results["targets"].items():
        for other, kinds in others.items():
            each = [kinds[kind] for kind in ("cls", "patch")]
            cells = [
                ", ".join(format(found[field], form) for found in each)
                for field, form in (("relative_rms", ".1e"), ("r2", ".5f"), ("cosine", ".5f"))
            ]
            largest = max(found["max"] for found in each)
            lines.append(f"| {other} | {one} | {' | '.join(cells)} | {largest:.2g} |")
    return "\n".join(lines)


def step_table() -> str:
    """The compiled steps as Markdown; "not yet run" where there is no file."""
    lines = [
        "| run | slice | HBM GiB per device | MB per image | bounds ms: compute, HBM | compiler's "
        "estimate: ms per step, images/s per chip |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_step, STEPS)])


def _step(row: scale.Row) -> str:
    start = f"| {row.run} | {row.slice} |"
    if not row.file.exists():
        return f"{start} not yet run | | | |"
    plan = json.loads(row.file.read_text())
    memory, bound, estimate = plan["hbm_bytes_per_device"], plan["bounds"], plan["estimate"]
    times = ", ".join(f"{bound[f'{name}_seconds'] * 1e3:.1f}" for name in ("compute", "hbm"))
    return (
        f"{start} {memory['total'] / 2**30:.2f} | "
        f"{plan['compiler']['hbm_bytes_per_image'] / 1e6:.0f} | {times} | "
        f"{estimate['step_seconds'] * 1e3:.0f}, {estimate['images_per_second_per_chip']:.0f} |"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", default="data", help="folder of prepared TFDS data")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--blocks", choices=("v5e", "v6e"), help="compile blocks for this chip")
    parser.add_argument("--output", type=pathlib.Path, help="file of the results; default: none")
    parser.add_argument("--table", action="store_true", help="print the tables and run nothing")
    args = parser.parse_args()
    if args.table:
        stored = _read(RESULTS)
        errors = error_table(stored) if "targets" in stored else "not yet run"
        print(errors, block_table(stored.get("blocks", {})), step_table(), sep="\n\n")
        return
    if args.blocks:
        found = {args.blocks: blocks(args.blocks)}
        print(block_table(found))
    else:
        found = {
            "command": "python -m benchmarks.quantized_teacher",
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "teacher": TEACHER,
            "pictures": f"{args.pictures} of {DATA}, {SPLIT}, {SIZE} px",
            "targets": measure(args.data_dir, args.pictures),
        }
        print(error_table(found))
    if args.output is not None:
        before = _read(args.output)
        after = {"blocks": before.get("blocks", {}) | found} if args.blocks else found
        args.output.write_text(json.dumps({**before, **after}, indent=2) + "\n")


def _read(file: pathlib.Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


if __name__ == "__main__":
    main()
