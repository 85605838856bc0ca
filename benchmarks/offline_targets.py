r"""What stored targets cost: bytes and error on photographs, and chip-hours in closed form.

    make quickstart-data
    python -m benchmarks.offline_targets --output=benchmarks/offline_targets.json
    python -m benchmarks.offline_targets --table       # the tables of docs/offline_targets.md
    python -m benchmarks.offline_targets --describe=benchmarks/scale/targets_clip_b

The second command makes targets of the quickstart's teacher, DINOv2 ViT-S/14 at 224 pixels, for 256
of its photographs, and stores the same maps in every kind. The tables have its results, and those
of the closed form of FLOPs (fd_jax/cost/flops.py) and of the shapes of maps, which need no weights.
--describe writes a description without maps, from which the row of benchmarks/scale is planned.
"""

import argparse
import dataclasses
import json
import pathlib

from etils import epath
import jax
import numpy as np

from configs import distill_clip_vit_b16, distill_clip_vit_l14
from fd_jax import target_stats
from fd_jax.cost.hardware import CHIPS
from fd_jax.data.stored import codecs, description, replay
from fd_jax.data.stored.codecs import Codec
from fd_jax.normalization.spectrum import Spectrum
from fd_jax.normalization.statistics import Origin, load
from fd_jax.plan import experiment
from fd_jax.targets import cli, flags, measuring, principal, shards

RESULTS = pathlib.Path(__file__).with_name("offline_targets.json")
TEACHER, SPLIT, SIZE = "teachers/dinov2_vits14_onnx", "train[:256]", 224
COMPONENTS = (64, 128, 256)
CHIP, EXAMPLES, EPOCHS = "v5e", experiment.EXAMPLES["imagenet2012", "train"], 300
RUNS = {"CLIP ViT-B/16": distill_clip_vit_b16, "CLIP ViT-L/14": distill_clip_vit_l14}


def measure(folder: pathlib.Path) -> dict[str, dict]:
    """Makes float32 targets, and stores the same maps in every kind; returns its bytes and error.

    What is finished in the folder is not repeated.
    """
    common = [f"--teacher={TEACHER}", "--data=photos", "--data_dir=data", f"--image_size={SIZE}"]
    statistics = folder / "statistics.npz"
    if not statistics.exists():
        _succeed(target_stats.main([*common, "--split=test", f"--output={statistics}"]))
    output = folder / "float32"
    own = (f"--split={SPLIT}", "--quantization=float32", f"--output={output}")
    _succeed(cli.main([*common, *own]))
    store = replay.Store(output)
    known = store.description.teacher
    origin = Origin(**{field.name: known[field.name] for field in dataclasses.fields(Origin)})
    spectra = load(statistics, origin)
    shape = (store.description.codec.cls, store.description.codec.grid, spectra["cls"].mean.size)
    made = {kind: Codec(kind, *shape) for kind in ("float32", "bfloat16", "int8")}
    made |= {f"pca_int8, {n}": Codec("pca_int8", *shape, components=n) for n in COMPONENTS}
    return {name: stored_as(store, codec, spectra, folder) for name, codec in made.items()}


def stored_as(
    store: replay.Store, codec: Codec, spectra: dict[str, Spectrum], folder: pathlib.Path
) -> dict:
    """Bytes per view and error of float32 maps that are stored in another kind.

    The steps and the file are those of python -m fd_jax.targets, without the teacher.
    """
    constants = {
        group: principal.constants(spectra[group], codec.components) for group in codec.groups
    }

    @jax.jit
    def encode(tokens):
        arrays = codec.encode(tokens, constants)
        return {**arrays, "error": measuring.apart(tokens, codec.decode(arrays, constants))}

    examples, path = store.description.data["examples"], epath.Path(folder / "encoded")
    writer = shards.Writer(path)
    for index in range(examples):
        view, arrays = store.read(index, 0)
        found = {n: np.asarray(v)[0] for n, v in encode(arrays[codecs.VALUES][None]).items()}
        writer.add(view, codec.pack(found), found["error"])
    writer.finish()
    numbers = shards.numbers_of(path)
    error = measuring.summary([numbers.error], tokens=examples * codec.tokens)
    return {"bytes_per_view": round(numbers.bytes / examples), "error": error}


def _succeed(status: int) -> None:
    if status:
        raise SystemExit(f"error: a command ended with status {status}; see its message above")


def measured_table(results: dict) -> str:
    """Bytes and errors as Markdown."""
    lines = [
        "| storage | bytes per view | of float32 | relative RMS: map, whitened | largest: map, "
        "whitened | cosine: map, whitened |",
        "|---|---|---|---|---|---|",
    ]
    whole = results["kinds"]["float32"]["bytes_per_view"]
    for name, found in results["kinds"].items():
        errors = [found["error"][part] for part in ("map", "whitened")]
        cells = [
            ", ".join(format(error[field], form) for error in errors)
            for field, form in (("relative_rms", ".1e"), ("max", ".2g"), ("cosine", ".5f"))
        ]
        size = found["bytes_per_view"]
        lines.append(f"| {name} | {size:,} | {size / whole:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cost_table() -> str:
    """Bytes of ImageNet's maps, and chip-hours in closed form, as Markdown."""
    lines = [
        "| teacher and student | KB per view: float32, bfloat16, int8, PCA 256 + int8 | TB of "
        "ImageNet in bfloat16, per view | teacher's share of a step's FLOPs | chip-hours of an "
        f"epoch on {CHIP}: live, stored | chip-hours of making a view | saved in {EPOCHS} epochs "
        "with 1 view, with 4 |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_cost(name, module) for name, module in RUNS.items())])


def _cost(name: str, module) -> str:
    task = experiment.define(module.get_config()).task
    teacher = task.goal.teacher
    made = [
        Codec(kind, teacher.cls, teacher.grid, teacher.width) for kind in list(codecs.KINDS)[:3]
    ]
    made.append(Codec("pca_int8", teacher.cls, teacher.grid, teacher.width, 256))
    sizes = [codec.bytes_per_map for codec in made]
    step = task.flops().executed
    forward = teacher.flops(task.config.data.image_size).forward
    hours = EXAMPLES / CHIPS[CHIP].bf16_flops / 3600
    saved = [forward * hours * (EPOCHS - views) for views in (1, 4)]
    return (
        f"| {name} | {', '.join(f'{size / 1e3:.0f}' for size in sizes)} | "
        f"{sizes[1] * EXAMPLES / 1e12:.2f} | {forward / step:.2f} | "
        f"{step * hours:.3f}, {(step - forward) * hours:.3f} | {forward * hours:.3f} | "
        f"{saved[0]:.0f}, {saved[1]:.0f} |"
    )


def describe(folder: pathlib.Path) -> None:
    """Writes the description of CLIP ViT-B/16's targets for ImageNet, of which no map exists."""
    teacher = experiment.define(distill_clip_vit_b16.get_config()).task.goal.teacher
    facts = {"source": teacher.spec.source, "weights": 0, "image_size": teacher.image_size}
    views = description.Views(
        number=1,
        seed=0,
        image_size=224,
        min_area=0.08,
        interpolation="bilinear",
        crop="retried",
        flip=True,
        exif=False,
        skip_official=False,
    )
    content = description.Description(
        teacher={**facts, "stages": 0, "after_norm": True, "dtype": "bfloat16"},
        network=cli.network_facts(teacher),
        codec=Codec("bfloat16", teacher.cls, teacher.grid, teacher.width),
        decoder={},
        data={"name": "imagenet2012", "split": "train", "examples": EXAMPLES},
        views=views,
        shard_size=flags.SHARD_SIZE,
        arguments={"command": f"python -m benchmarks.offline_targets --describe={folder}"},
    )
    folder.mkdir(parents=True, exist_ok=True)
    description.write(epath.Path(folder), content)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workdir", type=pathlib.Path, default=pathlib.Path("runs/offline_targets")
    )
    parser.add_argument("--output", type=pathlib.Path, help="file of the results; default: none")
    parser.add_argument("--table", action="store_true", help="print the tables and make nothing")
    parser.add_argument("--describe", type=pathlib.Path, help="folder of a description to write")
    args = parser.parse_args()
    if args.describe is not None:
        describe(args.describe)
        return
    if args.table:
        stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else None
        print(measured_table(stored) if stored else "not yet run", "", cost_table(), sep="\n")
        return
    args.workdir.mkdir(parents=True, exist_ok=True)
    kinds = measure(args.workdir)
    results = {
        "command": "python -m benchmarks.offline_targets",
        "jax": jax.__version__,
        "teacher": TEACHER,
        "pictures": f"photos, {SPLIT}, {SIZE} px",
        "kinds": kinds,
    }
    print(measured_table(results))
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
