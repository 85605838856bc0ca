r"""Computes a teacher's maps of fixed views of every picture, for runs in which it does not run.

    python -m fd_jax.targets --teacher=teachers/clip_vit_b16 --data=imagenet2012 \
        --output=targets/clip_vit_b16
    python -m fd_jax.targets --teacher=teachers/dinov2 --image_size=196 --data=my/pictures \
        --views=4 --quantization=int8 --output=targets/dinov2

A run with teacher.targets=targets/clip_vit_b16 sees these views, learns these maps and loads no
teacher (docs/offline_targets.md). The crops and flips are those of a run with --seed in its first
epochs, one for each of --views. A command that was stopped goes on where it was if it is given
again. All devices of all processes share the work; each process writes shards of its own.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import json
from typing import Any

from etils import epath
import jax
from jax.sharding import Mesh

from fd_jax import sharding
from fd_jax.cli import processes, teacher_flags
from fd_jax.console import say
from fd_jax.data import datasets
from fd_jax.data.stored import codecs, description, replay
from fd_jax.data.stored.codecs import Codec
from fd_jax.data.stored.description import Description, Views
from fd_jax.errors import ConfigError
from fd_jax.normalization import statistics
from fd_jax.targets import flags, principal, shards
from fd_jax.tasks.teacher import Teacher
from fd_jax.training import lock

BATCH_PER_DEVICE = 32
# Flags that say how the command runs, and not what it makes.
_HOW = ("output", "distributed", "coordinator", "num_processes", "process_id")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; a mistake of the user gives one message and exit status 2."""
    args = flags.parser(__doc__).parse_args(argv)
    return processes.run(args, lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    folder = epath.Path(args.output)
    shards.check_output(folder)
    if args.held_out and args.views > 1:
        raise ConfigError(f"--views={args.views}: a held-out picture has one view; set it to 1")
    teacher = teacher_flags.teacher(args, matmuls=args.matmuls)
    name = datasets.name_of(args.data)
    skip = datasets.OFFICIAL_SKIPPED if args.skip_official else ()
    dataset = datasets.open_dataset(name, args.split, data_dir=args.data_dir, skip=skip)
    constants = _constants(args, teacher)
    planned = _planned(args, teacher, dataset, name, constants)
    mesh = sharding.make_mesh(devices=jax.local_devices())
    sharding.check_batch(_batch_size(args, mesh), 1, mesh)
    with lock.held(folder):
        content = _begin(folder, planned, constants)
        if content.error is None or _lacking(folder, content):
            _make(args, teacher, dataset, folder, content, constants, mesh)
            content = _complete(folder, content)
        if jax.process_index() == 0:
            shards.tidy(folder, content)
    say(_summary(folder, content))


def _begin(folder: epath.Path, planned: Description, constants: Any) -> Description:
    """The description in the folder, which the first process writes and all read."""
    if jax.process_index() == 0:
        shards.begin(folder, planned, constants)
    sharding.barrier("targets are described")
    return description.read(folder)


def _lacking(folder: epath.Path, content: Description) -> bool:
    """Whether a folder that was complete has lost a shard."""
    every = range(content.number_of_shards)
    return sharding.first_decides(not all(shards.is_whole(folder, content, n) for n in every))


def _make(
    args: argparse.Namespace,
    teacher: Teacher,
    dataset: Any,
    folder: epath.Path,
    content: Description,
    constants: Any,
    mesh: Mesh,
) -> None:
    """Writes the shards of this process that are not there yet."""
    from fd_jax.targets import making  # which needs the packages of the extra "train"

    own = range(jax.process_index(), content.number_of_shards, jax.process_count())
    missing = [number for number in own if not shards.is_whole(folder, content, number)]
    if len(missing) < len(own):
        say(f"{len(own) - len(missing)} of {len(own)} shards are there already")
    if not missing:
        return
    maker = making.Maker(
        teacher,
        content,
        constants,
        dataset,
        mesh=mesh,
        batch_size=_batch_size(args, mesh),
        threads=args.threads,
        max_broken=args.max_broken,
    )
    for number in missing:
        maker.write(folder, number)


def _batch_size(args: argparse.Namespace, mesh: Mesh) -> int:
    """Number of pictures at a time, over the devices of this process."""
    return args.batch_size or BATCH_PER_DEVICE * mesh.size


def _complete(folder: epath.Path, content: Description) -> Description:
    """The final description, which the first process writes when all are done."""
    sharding.barrier("shards are written")
    if jax.process_index() == 0:
        shards.complete(folder, content)
    sharding.barrier("targets are complete")
    return description.read(folder, complete=True)


def _constants(args: argparse.Namespace, teacher: Teacher) -> dict[str, Any]:
    """What maps are decoded with; {} for kinds that need nothing."""
    codec = _codec(args, teacher)
    if bool(codec.groups) != bool(args.statistics):
        raise ConfigError(
            f"--quantization={args.quantization} and --statistics={args.statistics!r}: the file of "
            "python -m fd_jax.target_stats has the principal directions of pca_int8, which needs "
            "it, and no other kind does"
        )
    if not codec.groups:
        return {}
    origin = teacher.origin(after_norm=not args.before_norm)
    spectra = statistics.load(args.statistics, origin)
    return {group: principal.constants(spectra[group], codec.components) for group in codec.groups}


def _codec(args: argparse.Namespace, teacher: Teacher) -> Codec:
    reduced = codecs.KINDS[args.quantization].reduced
    components = min(args.components, teacher.width) if reduced else 0
    return Codec(args.quantization, bool(teacher.cls), teacher.grid, teacher.width, components)


def _planned(
    args: argparse.Namespace, teacher: Teacher, dataset: Any, name: str, constants: Any
) -> Description:
    """What this command makes."""
    return Description(
        teacher=teacher_facts(teacher, after_norm=not args.before_norm),
        network=network_facts(teacher),
        codec=_codec(args, teacher),
        decoder=codecs.digests_of(constants),
        data={"name": name, "split": args.split, **replay.known_contents(dataset)},
        views=Views(
            number=args.views,
            seed=args.seed,
            image_size=args.data_size or teacher.image_size,
            min_area=args.min_area,
            interpolation=args.interpolation,
            crop=args.crop,
            flip=not args.no_flip,
            exif=args.exif,
            skip_official=args.skip_official,
            held_out=args.held_out,
            eval_resize=args.eval_resize,
            eval_crop=not args.no_eval_crop,
        ),
        shard_size=args.shard_size,
        arguments={name: value for name, value in vars(args).items() if name not in _HOW},
    )


def teacher_facts(teacher: Teacher, *, after_norm: bool) -> dict[str, Any]:
    """By which the teacher of targets is known."""
    origin = dataclasses.asdict(teacher.origin(after_norm=after_norm))
    # Left out where it says nothing, so that folders of earlier versions can be gone on with.
    matmuls = {"matmuls": teacher.matmuls} if teacher.matmuls else {}
    return {**origin, "dtype": str(jax.numpy.dtype(teacher.dtype)), **matmuls}


def network_facts(teacher: Teacher) -> dict[str, Any]:
    """The description of its network as it runs, without what only other commands need."""
    spec = dataclasses.replace(
        teacher.spec,
        classes=0,
        class_names=None,
        segmenter=None,
        pool=None,
        source_names={},
        source_dtypes={},
    )
    return json.loads(spec.to_json())


def _summary(folder: epath.Path, content: Description) -> str:
    """The lines with which the command ends."""
    assert content.shards is not None and content.error is not None
    total = sum(shard.bytes for shard in content.shards)
    pictures, views = content.data["examples"], content.views.number
    unreadable = sum(shard.unreadable for shard in content.shards)
    left_out = f", {unreadable} pictures could not be read" if unreadable else ""
    errors = "; ".join(
        f"{name}: relative RMS {error['relative_rms']:.2e}, at most {error['max']:.3g}, cosine "
        f"{error['cosine']:.6f}"
        for name, error in content.error.items()
    )
    field = "eval_targets" if content.views.held_out else "targets"
    return (
        f"targets of {content.teacher['source']} in {folder}: {pictures:,} pictures, {views} "
        f"views each, {content.codec.kind}, {total / 1e6:,.1f} MB, "
        f"{total / (pictures * views):,.0f} bytes per view{left_out}\n"
        f"error of {errors}\n"
        f"a run reads them with --config.teacher.{field}={folder}"
    )
