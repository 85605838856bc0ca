"""The fields of teachers in a config: their rules, and what has to hold between them.

A config names one teacher in `teacher`, `target` and `loss_beta`, or several in `teachers`, with a
section for each. `settings` joins these tables with its own.
"""

from collections.abc import Mapping
import dataclasses
import re

from fd_jax import losses
from fd_jax.fields import (
    DECAY,
    DROP_PATH,
    FLAG,
    Choice,
    Number,
    Relation,
    Rule,
    Several,
    Text,
    choice,
    whole,
)
from fd_jax.models import architectures
from fd_jax.models.narrow import KINDS
from fd_jax.normalization import kinds
from fd_jax.tasks import dropping, sections, target
from fd_jax.tasks.encoder import HELD
from fd_jax.typing import Config


def _below(section: str, rows: Mapping[str, Rule]) -> dict[str, Rule]:
    """The rows of the fields of a section, under their full names."""
    return {f"{section}.{name}": rule for name, rule in rows.items()}


_NETWORK: dict[str, Rule] = {
    "path": Text("the path of the teacher's model folder"),
    "source": Text("a converter source", optional=True),
    "image_size": whole(0, "pixels on a side; 0 takes the teacher's own"),
    "follow": FLAG,
    "drop_path": DROP_PATH,
    "stages": whole(0, "stages; 0 takes all"),
    "targets": Text("the path of a folder of stored targets", optional=True),
    "eval_targets": Text("the path of a folder of stored targets", optional=True),
    "matmuls": Choice(("", *KINDS)),
}
_TARGET: dict[str, Rule] = {
    "kind": choice(target.TargetKind),
    "normalize": choice(kinds.Kind),
    "after_norm": FLAG,
    "resample": choice(target.Resample),
    "statistics": Text("the path of a file of statistics", optional=True),
    "freeze_after": whole(1, "steps"),
    "blocks": Several(
        whole(0, "a block, counted from 0", most=architectures.MOST_BLOCKS - 1), optional=True
    ),
}
_BETA = Number(
    above=0,
    unit="difference at which the loss turns from square to linear",
    hint="for an L1 loss set a small one, such as 0.01",
)

# The fields of a single teacher.
SINGLE: dict[str, Rule] = {
    **_below(sections.ONE, _NETWORK),
    **_below("target", _TARGET),
    "loss_beta": _BETA,
}
# The fields of each section in `teachers`.
SECTION: dict[str, Rule] = {
    **_NETWORK,
    **_below("target", _TARGET),
    "weight": Number(above=0, unit="factor of its loss in the sum over the teachers"),
    "parts": whole(1, "parts of a batch, one after another"),
    **{f"loss.{name}": Number(least=0, unit="weight; 0 is off") for name in losses.DISTANCES},
    "loss.beta": _BETA,
    "loss.class_share": Number(
        least=0, below=1, unit="share of the class token; 0 is the mean over all tokens"
    ),
    "projector.kind": choice(sections.ProjectorKind),
    "projector.hidden": whole(0, "channels between two layers; 0 takes the teacher's width"),
    "projector.separate": FLAG,
}
# The fields that a config with `teachers` has besides.
_SHARED: dict[str, Rule] = {
    "dropping.rate": Number(least=0, below=1, unit="probability of leaving a teacher out"),
    "dropping.by": choice(dropping.By),
    "dropping.decay": DECAY,
}
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")

# What has to hold for each teacher. Fields that begin with a dot are those of its section.
_OF_EACH = (
    Relation(
        (".target.blocks",),
        lambda blocks: list(blocks) == sorted(set(blocks)),
        "name each block once, and in their order, such as (7, 8, 9, 10, 11)",
    ),
    Relation(
        (".target.blocks", ".target.after_norm"),
        lambda blocks, after_norm: not blocks or not after_norm,
        "the final norm belongs to the teacher's last map, and not to those after single blocks; "
        "set after_norm=False, or blocks=()",
    ),
    Relation(
        (".target.blocks", ".target.kind"),
        lambda blocks, kind: not blocks or kind != "logits",
        "logits are those of the teacher's last map; set blocks=(), or another kind",
    ),
    Relation(
        (".target.blocks", ".target.normalize"),
        lambda blocks, normalize: not blocks or kinds.KINDS[normalize].constants == "none",
        "its statistics are those of one map; choose 'whiten', 'l2' or 'none', or blocks=()",
    ),
    Relation(
        (".target.normalize", "accumulation"),
        lambda kind, parts: kinds.KINDS[kind].constants != "running" or parts == 1,
        "it measures the tokens of whole batches, and micro-batches would each be normalised by "
        "statistics of their own; set accumulation=1, or choose a fitted normalisation",
    ),
    Relation(
        (".follow", ".target.normalize", ".target.kind"),
        lambda follows, normalize, kind: (
            not follows or kind == "logits" or kinds.KINDS[normalize].constants != "fitted"
        ),
        "its statistics are of tokens at one input size; set follow=False, or choose a "
        "normalisation without statistics of its own",
    ),
    Relation(
        (".targets", ".target.kind"),
        lambda folder, kind: not folder or kind != "logits",
        "stored targets are maps, from which no logits follow without the teacher's head; choose "
        "the kind 'full', 'cls' or 'gap', or targets='' for a teacher that runs",
    ),
    Relation(
        (".targets", ".drop_path", ".follow"),
        lambda folder, rate, follows: not folder or not (rate or follows),
        "the maps are stored, and the teacher does not run; set its drop_path=0 and follow=False",
    ),
    Relation(
        (".eval_targets", ".targets", "data.eval_split"),
        lambda held_out, folder, split: not held_out or bool(folder and split),
        "they are the maps of the pictures in data.eval_split, of a teacher that does not run; set "
        "the other two, or eval_targets=''",
    ),
    Relation(
        (".targets", "data.rand_augment"),
        lambda folder, policy: not folder or not policy,
        "RandAugment also turns and shifts pictures, and the stored maps are those of pictures "
        "that stay where they are; set rand_augment=''",
    ),
    Relation(
        (".targets", "data.sizes", "data.phases"),
        lambda folder, sizes, phases: not folder or not (sizes or phases),
        "the stored views have one size; set data.sizes=() and data.phases=()",
    ),
    Relation(
        (".parts", "batch_size", "accumulation"),
        lambda parts, batch, accumulation: batch % (parts * accumulation) == 0,
        "the parts of a batch have to be equal; choose a number of parts that divides it",
    ),
    Relation(
        tuple(f".loss.{name}" for name in losses.DISTANCES),
        lambda *weights: any(weights),
        "the student would learn nothing from this teacher; give one of them a weight, such as 1",
    ),
    Relation(
        (".loss.relation", ".target.kind"),
        lambda weight, kind: weight == 0 or kind == "full",
        "the relation loss compares tokens of an image with each other, and this target is a "
        "single one; set the weight to 0, or the kind to 'full'",
    ),
    Relation(
        (".loss.class_share", ".target.kind"),
        lambda share, kind: share == 0 or kind == "full",
        "the target is a single token; set class_share=0, or the kind to 'full'",
    ),
    Relation(
        (".projector.separate", ".target.kind"),
        lambda separate, kind: not separate or kind == "full",
        "the target is a single token, for which one projector serves; set separate=False, or the "
        "kind to 'full'",
    ),
)
# What has to hold for all of them together.
_OF_ALL = Relation(
    ("dropping.rate", "accumulation"),
    lambda rate, parts: rate == 0 or parts == 1,
    "the mean is over the teachers that the whole batch keeps; set accumulation=1, or rate=0",
)


def replace_single(rows: Mapping[str, Rule], names: list[str]) -> dict[str, Rule]:
    """The rows of a distillation, with those of named teachers in place of a single one's."""
    shared = {name: rule for name, rule in rows.items() if name not in SINGLE}
    named = [_below(_section_of(name), SECTION) for name in names]
    return {**shared, **_SHARED, **{n: rule for each in named for n, rule in each.items()}}


def figures(names: list[str]) -> list[str]:
    """The figures of an evaluation that several teachers have each of their own."""
    return [f"{figure}/{name}" for name in names for figure in ("loss", "cosine")]


def relations(config: Config) -> list[Relation]:
    """What has to hold for the teachers of a config."""
    prefixes = [_section_of(name) for name in config.get(sections.SEVERAL, {})] or [""]
    of_each = [
        dataclasses.replace(
            relation, fields=tuple(_full_name(prefix, name) for name in relation.fields)
        )
        for prefix in prefixes
        for relation in _OF_EACH
    ]
    return [*of_each, _OF_ALL]


def problems(config: Config) -> list[str]:
    """What is wrong with the names of several teachers, and with their number; a line for each."""
    if sections.SEVERAL not in config:
        return []
    teachers = config[sections.SEVERAL].to_dict()
    if not teachers:
        return ["teachers has no teacher; `base.teacher` makes the section of one"]
    lines = [
        f"{_section_of(name)}: a name consists of letters, digits and _, and begins with a letter"
        for name in teachers
        if not _NAME.fullmatch(name)
    ]
    if HELD in teachers:
        lines.append(
            f"{_section_of(HELD)}: this name is taken, since the frozen weights of a run have the "
            "student's beside the teachers'; rename the teacher"
        )
    names = sorted(teachers)
    for index, name in enumerate(names):
        for other in names[:index]:
            pair = f"{_section_of(other)} and {_section_of(name)}"
            if name.lower() == other.lower():
                lines.append(f"{pair} have one name but for capital letters; rename one of them")
            elif teachers[name] == teachers[other]:
                lines.append(f"{pair} are the same teacher with the same target; remove one")
    if len(teachers) == 1 and config.get("dropping", {}).get("rate"):
        lines.append(
            f"dropping.rate={config.dropping.rate}, but {_section_of(names[0])} is the only "
            "teacher; set it to 0"
        )
    return lines


def _section_of(teacher: str) -> str:
    return f"{sections.SEVERAL}.{teacher}"


def _full_name(prefix: str, name: str) -> str:
    """The name of a field of a relation; `prefix` is the section, "" for a single teacher."""
    if not name.startswith("."):
        return name
    if prefix:
        return f"{prefix}{name}"
    own = name.removeprefix(".")
    return f"{sections.ONE}.{own}" if own in _NETWORK else own
