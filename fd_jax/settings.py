"""The settings of a run: type, range and unit of every field of a config, and their relations.

A config of `configs/` is plain data. The tables here say which values of it make sense, and `check`
compares them, so that a wrong setting is refused before a run has read, built or written
anything. configs/base.py says what the fields mean. A new field needs a row here; those of teachers
are in `teacher_settings`.

What depends on more than the config is checked where it is known: the devices by `sharding`, a
network's sizes by its class, and the length of the data by `total_steps` and `check_neighbours`.
"""

from collections.abc import Mapping
import dataclasses
import difflib
import re
from typing import Any

from fd_jax import teacher_settings
from fd_jax.data.base import IGNORED, Crop, Interpolation
from fd_jax.data.class_names import Match
from fd_jax.errors import ConfigError
from fd_jax.evaluation import classification
from fd_jax.fields import (
    DECAY,
    DROP_PATH,
    FLAG,
    LARGEST_WHOLE,
    Choice,
    Number,
    Relation,
    Rule,
    Several,
    Text,
    choice,
    whole,
)
from fd_jax.models import architectures, heads, kernels, segmenter, vit
from fd_jax.models.architectures import ARCHITECTURES
from fd_jax.models.backbone import REMAT_POLICIES
from fd_jax.models.lora import TARGETS
from fd_jax.models.spec import FAMILIES
from fd_jax.optimizer import Moments, Optimizer, PolynomialVariant
from fd_jax.precision import DTYPES
from fd_jax.tasks import classify, masking, registry, sections, segment
from fd_jax.typing import Config

RATE = "learning rate for optim.lr_batch images"
SHARE = Number(least=0, most=1, unit="probability")
AXIS = whole(1, "devices", special=-1, hint="-1 takes all devices that remain")


def _figure(*names: str) -> Choice:
    """None, or a figure of a task's evaluations, of the weights or of their moving average."""
    return Choice(("", *names, *(f"ema_{name}" for name in names)))


_NEIGHBOURS = ("knn_top1", "knn_top5")
_OF_A_STUDENT = ("loss", "cosine", *_NEIGHBOURS)

# The fields of every run (configs/base.py, `common`).
COMMON: dict[str, Rule] = {
    "seed": whole(0, most=2**32 - 1),
    "epochs": Number(above=0, unit="epochs"),
    "steps": whole(0, "steps; 0 to train for `epochs`"),
    "batch_size": whole(1, "images, over all devices"),
    "accumulation": whole(1, "micro-batches per update"),
    "dtype": Choice(("auto", *DTYPES)),
    "grad_reduce_dtype": Choice(tuple(DTYPES)),
    "attention": Choice(("auto", *kernels.IMPLEMENTATIONS), kernels.REMOVED),
    "remat": Choice(("", *REMAT_POLICIES)),
    "mesh.data": AXIS,
    "mesh.fsdp": AXIS,
    "mesh.tensor": AXIS,
    "ema_decay": dataclasses.replace(DECAY, hint="0 keeps no average, 0.9998 is usual"),
    "init_from": Text("the path of a model folder", optional=True),
    "max_nonfinite": whole(1, "steps in a row"),
    "log_every": whole(1, "steps"),
    "profile_steps": whole(0, "steps; 0 is off"),
    "checkpoint.every": whole(0, "steps; 0 saves only when the run is stopped"),
    "checkpoint.keep": whole(1, "checkpoints", hint="a run cannot resume without one"),
    "checkpoint.keep_every": whole(0, "steps; 0 is off"),
    "eval.every": whole(0, "steps; 0 to count `eval.epochs`"),
    "eval.epochs": Number(least=0, unit="epochs; 0 is off"),
    "eval.batches": whole(0, "batches; 0 takes the whole split"),
    "data.split": Text("the name of a split, such as train"),
    "data.eval_split": Text("the name of a split, such as validation", optional=True),
    "data.data_dir": Text("the path of a folder", optional=True),
    "data.image_size": whole(1, "pixels on a side"),
    "data.flip": FLAG,
    "data.threads": whole(1, "threads per process", most=1024),
    "data.workers": whole(0, "processes; 0 decodes in this one", most=1024),
    "data.max_broken": whole(0, "images"),
    "optim.name": choice(Optimizer),
    "optim.peak_lr": Number(above=0, unit=RATE),
    "optim.lr_batch": whole(1, "images"),
    "optim.betas": Several(DECAY, length=2),
    "optim.eps": Number(above=0, unit="added to the root of the second moment"),
    "optim.momentum": DECAY,
    "optim.weight_decay": Number(least=0, unit="times the learning rate; 0 is off"),
    "optim.decay_vectors": FLAG,
    "optim.layer_decay": Number(above=0, most=1, unit="factor per layer; 1 is off"),
    "optim.clip_norm": Number(least=0, unit="norm of all gradients; 0 is off"),
    "optim.moments": choice(Moments),
}

# The further fields of the tasks that see whole pictures, with a cosine schedule.
_PICTURES: dict[str, Rule] = {
    "eval.knn": whole(0, "neighbours; 0 is off"),
    "data.name": Text("the name of a TFDS dataset, or folder:/path"),
    "data.min_area": Number(above=0, most=1, unit="share of the picture"),
    "data.interpolation": choice(Interpolation),
    "data.crop": choice(Crop),
    "data.rand_augment": Text("a policy such as rand-m9-mstd0.5-inc1", optional=True),
    "data.eval_resize": Number(least=1, most=4, unit="side of the picture / side of its crop"),
    "data.eval_crop": FLAG,
    "data.exif": FLAG,
    "data.match_classes": choice(Match),
    "data.skip_official": FLAG,
    "optim.start_lr": Number(least=0, unit=RATE),
    "optim.min_lr": Number(least=0, unit=RATE),
    "optim.warmup_epochs": Number(least=0, unit="epochs"),
    "optim.lag": whole(0, "steps", most=1),
    "optim.scale_floors": FLAG,
}

# The further fields of tasks that train an encoder from a folder, or at several sizes.
_SIZE = whole(1, "pixels on a side", most=8192)
_STARTS: dict[str, Rule] = {
    "lora.rank": whole(0, "rank of the updates; 0 is off"),
    "lora.alpha": Number(above=0, unit="factor of the updates, times 1 / rank"),
    "lora.targets": Several(Choice(TARGETS), most=len(TARGETS)),
    "data.sizes": Several(_SIZE, optional=True),
    "data.phases": Several(Several(whole(0, "step, then pixels"), length=2), optional=True),
}
_FREEZE = whole(0, "blocks; 0 trains all", most=architectures.MOST_BLOCKS)

# The further fields of each task, by the section that selects it (`registry.KINDS`).
TASKS: dict[str, dict[str, Rule]] = {
    registry.DISTILLATION.section: {
        **_PICTURES,
        **_STARTS,
        **teacher_settings.SINGLE,
        "eval.keep_best": _figure(*_OF_A_STUDENT),
        "student.family": Choice(("", *FAMILIES)),
        "student.init_from": Text("the path of a model folder", optional=True),
        "student.freeze_blocks": _FREEZE,
        "student.drop_path": DROP_PATH,
        "student.mask.keep": Number(above=0, most=1, unit="share of the patches; 1 is all"),
        "student.mask.by": choice(masking.By),
        "student.mask.teacher": Text("the name of one of the teachers", optional=True),
        "student.keep_projector": FLAG,
    },
    registry.CLASSIFICATION.section: {
        **_PICTURES,
        **_STARTS,
        "eval.keep_best": _figure("loss", "top1", "top5", *_NEIGHBOURS),
        "model.family": Choice(("", *FAMILIES)),
        "model.freeze_blocks": _FREEZE,
        "model.classes": whole(2, "classes"),
        "model.trains": choice(classify.Trains),
        "model.head": choice(classify.Head),
        "model.head_scale": Number(least=0, unit="factor of the head's initial weights"),
        "model.pooling": choice(heads.Pooling),
        "model.final_norm": FLAG,
        "model.untie_positions": FLAG,
        "model.drop_path": DROP_PATH,
        "mixing.mixup": Number(least=0, unit="alpha of a Beta distribution; 0 is off"),
        "mixing.cutmix": Number(least=0, unit="alpha of a Beta distribution; 0 is off"),
        "mixing.switch": SHARE,
        "mixing.smoothing": Number(least=0, below=1, unit="share of the target"),
        "mixing.erasing": SHARE,
        "reference_quirks": FLAG,
    },
    registry.SEGMENTATION.section: {
        "segment.family": Choice(("", *FAMILIES)),
        "segment.classes": whole(2, "classes", most=IGNORED),
        "segment.patch_size": whole(0, "pixels on a side; 0 keeps the encoder's"),
        "segment.window": whole(0, "tokens on a side; 0 keeps the encoder's"),
        "segment.untie_positions": FLAG,
        "segment.drop_path": DROP_PATH,
        "segment.decoder": choice(segmenter.Decoder),
        "segment.channels": whole(1, "channels"),
        "segment.auxiliary_channels": whole(0, "channels; 0 for no auxiliary head"),
        "segment.auxiliary_weight": Number(least=0, unit="weight of the auxiliary loss"),
        "segment.dropout": Number(least=0, below=1, unit="probability of dropping a channel"),
        "segment.trains": choice(segment.Trains),
        "data.name": Text("ade20k, folders, or the name of a TFDS dataset"),
        "data.root": Text("the path of a folder", optional=True),
        "data.images": Text("a pattern such as images/{split}"),
        "data.labels": Text("a pattern such as annotations/{split}"),
        "data.class_names": Text("the name of a file below data.root", optional=True),
        "data.ignore": whole(0, "stored label", most=2**16 - 1),
        "data.reduce_zero_label": FLAG,
        "data.scale": Several(whole(1, "pixels"), length=2),
        "data.ratio": Several(Number(above=0, unit="factor of data.scale"), length=2),
        "data.max_share": Number(above=0, most=1, unit="share of a crop"),
        "data.distort": FLAG,
        "eval.keep_best": _figure("miou", "macc", "aacc"),
        "eval.mode": Choice(("slide", "whole")),
        "eval.stride": whole(1, "pixels"),
        "eval.scales": Several(Number(above=0, unit="factor of data.scale")),
        "eval.flip": FLAG,
        "optim.warmup_steps": whole(0, "steps"),
        "optim.warmup_factor": Number(above=0, most=1, unit="share of the rate at the start"),
        "optim.polynomial": choice(PolynomialVariant),
        "optim.decay_positions": FLAG,
    },
    registry.CONTRAST.section: {
        **_PICTURES,
        "eval.keep_best": _figure("loss", *_NEIGHBOURS),
        "contrast.family": Choice(tuple(FAMILIES)),
        "contrast.width": whole(1, "channels of the vectors that are compared"),
        "contrast.temperature": Number(above=0, unit="divisor of the cosines"),
        "contrast.min_area": Number(above=0, most=1, unit="share of the image that a view covers"),
        "contrast.jitter": SHARE,
    },
}

# The sections that have a family and an architecture.
NETWORKS = ("student", "model", "segment", "contrast")

# Fields that configs of earlier versions do not have, with the values that change nothing.
NEUTRAL: dict[str, Any] = {
    "eval.keep_best": "",
    "data.exif": False,
    "data.match_classes": "name",
    "data.class_names": "",
    "data.sizes": [],
    "data.phases": [],
    "student.init_from": "",
    "student.freeze_blocks": 0,
    "student.mask.keep": 1.0,
    "student.mask.by": "random",
    "student.mask.teacher": "",
    "student.keep_projector": False,
    "model.freeze_blocks": 0,
    "teacher.follow": False,
    "teacher.targets": "",
    "teacher.eval_targets": "",
    "teacher.matmuls": "",
    "target.blocks": [],
    "lora.rank": 0,
    "lora.alpha": 16.0,
    "lora.targets": ["qkv", "proj", "fc1", "fc2"],
}

# Fields that need not be there. The size of `model.arch` and `segment.arch` is that of the data.
OPTIONAL = (
    "model.arch.image_size",
    "segment.arch.image_size",
    *(
        f"{name}.arch.{field}"
        for name in NETWORKS
        for fields in architectures.OPTIONAL.values()
        for field in fields
    ),
    *NEUTRAL,
    # What few targets need.
    "target.statistics",
    "target.freeze_after",
)


def changes_nothing(name: str, value: Any) -> bool:
    """Whether a config with this value means the same as one of an earlier version without it.

    Args:
      name: dotted name of the field.
      value: as JSON has it.
    """
    field = re.sub(r"^teachers\.\w+\.", "teacher.", name)
    field = field.removeprefix("teacher.") if field.startswith("teacher.target.") else field
    return field in NEUTRAL and value == NEUTRAL[field]


# What a student of any family in `student.init_from` is adapted to.
_ADAPTED: dict[str, Rule] = {
    "student.arch.image_size": _SIZE,
    "student.arch.position": choice(vit.Position),
}
_ARCHITECTURE_NAMES = frozenset(f"student.arch.{n}" for row in ARCHITECTURES.values() for n in row)


def _is_schedule(phases: tuple[tuple[int, int], ...]) -> bool:
    """Whether phases begin at step 0, follow each other, and have sizes."""
    steps = [step for step, _ in phases]
    in_order = steps == sorted(set(steps)) and steps[:1] in ([], [0])
    return in_order and all(_SIZE.problem(size) is None for _, size in phases)


RELATIONS = (
    Relation(
        ("data.phases",),
        _is_schedule,
        "expected pairs of a step and the side in pixels from it on, the first of step 0 and each "
        "later than the one before, such as ((0, 112), (1000, 224))",
    ),
    Relation(
        ("data.sizes", "data.phases"),
        lambda sizes, phases: not (sizes and phases),
        "sizes are drawn at every step, and phases say which one comes when; set one of them to ()",
    ),
    Relation(
        ("model.trains", "data.sizes", "data.phases"),
        lambda trains, sizes, phases: trains != "head" or not (sizes or phases),
        "a probe measures an encoder at one size; set data.sizes=() and data.phases=()",
    ),
    Relation(
        ("model.trains", "model.freeze_blocks"),
        lambda trains, blocks: trains != "head" or not blocks,
        "the whole encoder of a probe is frozen; set freeze_blocks=0, or trains='all'",
    ),
    Relation(
        ("model.trains", "lora.rank"),
        lambda trains, rank: trains != "head" or not rank,
        "the encoder of a probe does not train; set lora.rank=0, or trains='all'",
    ),
    Relation(
        ("model.freeze_blocks", "model.family", "init_from"),
        lambda blocks, family, folder: not blocks or bool(folder) or not family,
        "blocks with random weights would never train; set init_from to a model folder, or "
        "freeze_blocks=0",
    ),
    Relation(
        ("lora.rank", "model.family", "init_from"),
        lambda rank, family, folder: not rank or bool(folder) or not family,
        "low-rank updates are for trained weights; set init_from to a model folder, or lora.rank=0",
    ),
    *(
        Relation(
            (f"{section}.family", "init_from"),
            lambda family, folder: family != "resnet" or bool(folder),
            "a ResNet learns from random weights as a student only: in other runs its BatchNorms "
            "keep the statistics of the folder that they start from; set init_from to one",
        )
        for section in ("model", "segment")
    ),
    Relation(
        ("student.family", "student.init_from"),
        lambda family, folder: bool(family) or bool(folder),
        "set student.family and student.arch, or student.init_from to a model folder that has both",
    ),
    Relation(
        ("student.init_from", "init_from"),
        lambda student, whole_run: not (student and whole_run),
        "init_from goes on with a distilled student and its projector, and student.init_from "
        "begins with another network as the student; set one of them to ''",
    ),
    Relation(
        ("student.freeze_blocks", "student.init_from", "init_from"),
        lambda blocks, student, whole_run: not blocks or bool(student or whole_run),
        "blocks with random weights would never train; set student.init_from to a model folder, or "
        "freeze_blocks=0",
    ),
    Relation(
        ("lora.rank", "student.init_from", "init_from"),
        lambda rank, student, whole_run: not rank or bool(student or whole_run),
        "low-rank updates are for trained weights; set student.init_from to a model folder, or "
        "lora.rank=0",
    ),
    Relation(
        ("student.mask.teacher", "student.mask.by"),
        lambda teacher, by: not teacher or by == "attention",
        "random patches follow no teacher; set student.mask.teacher='', or by='attention'",
    ),
    Relation(
        ("optim.start_lr", "optim.peak_lr"),
        lambda start, peak: start <= peak,
        "the warm-up rises from start_lr to peak_lr; lower start_lr",
    ),
    Relation(
        ("optim.min_lr", "optim.peak_lr"),
        lambda minimum, peak: minimum <= peak,
        "the rate falls from peak_lr to min_lr; lower min_lr",
    ),
    Relation(
        ("optim.warmup_epochs", "epochs", "steps"),
        lambda warmup, epochs, steps: steps > 0 or warmup < epochs,
        "the warm-up has to end before the run does; lower warmup_epochs",
    ),
    Relation(
        ("optim.name", "optim.decay_vectors"),
        lambda name, vectors: name != "lars" or not vectors,
        "LARS leaves biases and other vectors without weight decay by definition; set "
        "decay_vectors=False, or name='adamw'",
    ),
    Relation(
        ("optim.name", "optim.layer_decay"),
        lambda name, decay: name != "lars" or decay == 1,
        "LARS has one learning rate for all layers; set layer_decay=1, or name='adamw'",
    ),
    Relation(
        ("optim.name", "optim.weight_decay", "optim.peak_lr", "batch_size", "optim.lr_batch"),
        lambda name, decay, peak, batch, per: name != "adamw" or decay * peak * batch / per < 1,
        "weight_decay times the peak rate of this batch has to be below 1, or every step would "
        "change the sign of the weights; lower one of them",
    ),
    Relation(
        ("eval.knn", "data.eval_split"),
        lambda knn, split: not knn or bool(split),
        "nearest neighbours are measured on a held-out split; set data.eval_split, or eval.knn=0",
    ),
    Relation(
        ("eval.keep_best", "data.eval_split", "eval.knn", "ema_decay"),
        lambda name, split, knn, decay: (
            not name
            or bool(split)
            and (bool(knn) or "knn" not in name)
            and (decay > 0 or name[:4] != "ema_")
        ),
        "it names a figure that this run does not measure; it needs data.eval_split, and eval.knn "
        "or ema_decay for a figure of neighbours or of the average",
    ),
    Relation(
        ("eval.keep_best", "model.classes"),
        lambda name, classes: (
            name.removeprefix("ema_") != "top5" or 5 in classification.reported(classes)
        ),
        "there is no top-5 accuracy of five classes or fewer; set eval.keep_best='top1'",
    ),
    Relation(
        ("optim.layer_decay",),
        lambda decay: decay == 1,
        "a student has one learning rate for all layers; set it to 1",
        section=registry.DISTILLATION.section,
    ),
    Relation(
        ("model.trains", "accumulation"),
        lambda trains, parts: trains != "head" or parts == 1,
        "the probe's BatchNorm is over the whole batch; set accumulation=1 (the frozen encoder has "
        "no backward pass, so that the whole batch needs little memory)",
    ),
    Relation(
        ("model.trains", "model.head"),
        lambda trains, head: trains != "head" or head == "fresh",
        "a probe trains a fresh head; set model.head='fresh'",
    ),
    Relation(
        ("accumulation",),
        lambda parts: parts == 1,
        "the BatchNorms of a segmenter are over the whole batch, and micro-batches would each have "
        "statistics of their own; set accumulation=1, and remat='full' or a larger mesh if memory "
        "is short",
        section=registry.SEGMENTATION.section,
    ),
    Relation(
        ("segment.decoder", "segment.auxiliary_channels"),
        lambda decoder, channels: decoder != "linear" or channels == 0,
        "a linear decoder reads one map, and the auxiliary head another; set auxiliary_channels=0",
    ),
    Relation(
        ("data.name", "data.root"),
        lambda name, root: name not in ("ade20k", "folders") or bool(root),
        "set data.root to the folder that the pictures are in (ADEChallengeData2016 for ade20k)",
        section=registry.SEGMENTATION.section,
    ),
    Relation(
        ("data.scale",),
        lambda scale: scale[0] >= scale[1],
        "the long side comes first; swap the two",
    ),
    Relation(
        ("data.ratio",),
        lambda ratio: ratio[0] <= ratio[1],
        "the smallest factor comes first; swap the two",
    ),
    Relation(
        ("eval.stride", "data.image_size"),
        lambda stride, size: stride <= size,
        "windows of image_size pixels would leave gaps; lower stride",
    ),
    Relation(
        ("optim.warmup_steps", "steps"),
        lambda warmup, steps: not steps or warmup < steps,
        "the warm-up has to end before the run does; lower warmup_steps",
    ),
)


def check(config: Config) -> None:
    """Refuses a config with a wrong value, an unknown field, or without a field.

    Raises:
      ConfigError: the message has one line for each problem.
    """
    found = problems(config)
    if len(found) == 1:
        raise ConfigError(found[0])
    if found:
        listed = "\n".join(f"  {line}" for line in found)
        raise ConfigError(f"{len(found)} settings are wrong:\n{listed}")


def problems(config: Config) -> list[str]:
    """One line for each problem of a config: the fields, their values, and what was expected."""
    if clash := sections.conflict(config):
        return [clash]
    rows = rules(config)
    values = {n: v for n, v in flat(config.to_dict()).items() if n in rows or _has_rules(n, config)}
    found = {}
    for name in rows.keys() | values.keys():
        if name not in values:
            found[name] = f"{name} is missing; configs/base.py has a value for it"
        elif name not in rows:
            found[name] = f"{name}: there is no such field{_suggestion(name, rows)}"
        elif problem := rows[name].problem(values[name]):
            found[name] = f"{name}={values[name]!r}{problem}"
    lines = [found[name] for name in sorted(found)]
    section = registry.kind_of(config).section
    for relation in (*RELATIONS, *teacher_settings.relations(config)):
        compared = {name: values[name] for name in relation.fields if name in values}
        comparable = len(compared) == len(relation.fields) and not compared.keys() & found.keys()
        applies = comparable and relation.section in ("", section)
        if applies and not relation.holds(*compared.values()):
            shown = ", ".join(f"{name}={value!r}" for name, value in compared.items())
            lines.append(f"{shown}: {relation.remedy}")
    return lines + teacher_settings.problems(config)


def rules(config: Config) -> dict[str, Rule]:
    """The rule of each field that a config has to have, and of the optional fields that it has.

    Raises:
      ConfigError: the config selects no task.
    """
    values = flat(config.to_dict())
    rows = {**COMMON, **TASKS[registry.kind_of(config).section]}
    if sections.SEVERAL in config:
        rows = teacher_settings.replace_single(rows, list(config[sections.SEVERAL]))
        figures = teacher_settings.figures(list(config[sections.SEVERAL]))
        rows["eval.keep_best"] = _figure(*_OF_A_STUDENT, *figures)
    # What a student's folder says itself need not be in the config.
    folder = values.get("student.init_from", "")
    optional = {*OPTIONAL, *(_ARCHITECTURE_NAMES if folder else ())}
    for network in NETWORKS:
        family = values.get(f"{network}.family")
        for name, rule in ARCHITECTURES.get(str(family), {}).items():
            rows[f"{network}.arch.{name}"] = rule
    if folder and not values.get("student.family"):
        rows |= _ADAPTED
    return {name: rule for name, rule in rows.items() if name in values or name not in optional}


def _has_rules(name: str, config: Config) -> bool:
    """Whether the rules of a field are known: those of an architecture depend on its family."""
    network, _, rest = name.partition(".")
    if network not in NETWORKS or not rest.startswith("arch."):
        return True
    return config[network].get("family") in ("", *ARCHITECTURES)


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Number of updates of a run on data of a known length.

    Raises:
      ConfigError: there is none, or there are too many; or the warm-up does not end within them;
        or evaluations are less than a step apart.
    """
    total = config.steps or round(config.epochs * steps_per_epoch)
    warmup, length = _warmup(config, steps_per_epoch)
    epoch = f"an epoch has {steps_per_epoch} steps"
    if not 1 <= total <= LARGEST_WHOLE:
        raise ConfigError(
            f"epochs={config.epochs} are {total} steps, since {epoch}; expected 1 to "
            f"{LARGEST_WHOLE}: change epochs, or set steps"
        )
    if warmup >= total:
        raise ConfigError(
            f"{length}, but the run has {total}; the warm-up has to end before the run does: lower "
            "it, or train for longer"
        )
    if not config.eval.every and config.eval.epochs and not eval_every(config, steps_per_epoch):
        raise ConfigError(
            f"eval.epochs={config.eval.epochs} is less than a step, since {epoch}; set eval.every "
            "to a number of steps, or eval.epochs=0 for no evaluation"
        )
    return total


def _warmup(config: Config, steps_per_epoch: int) -> tuple[int, str]:
    """The number of warm-up steps, and what says so."""
    optim = config.optim
    if "warmup_steps" in optim:
        return optim.warmup_steps, f"optim.warmup_steps={optim.warmup_steps}"
    steps = round(optim.warmup_epochs * steps_per_epoch)
    epoch = f"an epoch has {steps_per_epoch} steps"
    return steps, f"optim.warmup_epochs={optim.warmup_epochs} are {steps} steps, since {epoch}"


def eval_every(config: Config, steps_per_epoch: int) -> int:
    """Number of updates between evaluations; 0 for none."""
    return config.eval.every or round(config.eval.epochs * steps_per_epoch)


def check_neighbours(config: Config, examples: int) -> None:
    """Refuses more nearest neighbours than there are training images.

    Raises:
      ConfigError: `eval.knn` is above `examples`.
    """
    if config.eval.get("knn", 0) > examples:
        raise ConfigError(
            f"eval.knn={config.eval.knn}, but {config.data.name}/{config.data.split} has only "
            f"{examples} images; expected at most {examples} (neighbours), or 0 for off"
        )


def _suggestion(name: str, rows: Mapping[str, Rule]) -> str:
    close = difflib.get_close_matches(name, rows, n=1, cutoff=0.8)
    return f"; did you mean {close[0]}?" if close else "; configs/base.py lists all fields"


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested dicts by their dotted names."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    values: dict[str, Any] = {}
    for name, value in tree.items():
        values |= flat(value, f"{prefix}.{name}" if prefix else name)
    return values
