"""What the runs on your own pictures have in common: values that follow from data and networks.

configs/own_distill.py, configs/own_finetune.py and configs/own_probe.py start from the recipes of
configs/base.py, which are for a million pictures. The rules here fit them to any number; they are
ours, and docs/your_own_data.md#rules lists them.
"""

import math
from typing import Any, NamedTuple

from etils import epath

from configs import base
from fd_jax import model_folder
from fd_jax.data import datasets
from fd_jax.errors import ConfigError, DataError
from fd_jax.models import sizes
from fd_jax.models.spec import ModelSpec
from fd_jax.typing import Config

HELD_OUT = ("validation", "val", "valid", "test")  # names of held-out splits, the best one first
LARGEST_SIDE = 224  # pixels, unless `size` asks for more
RATE_BATCH = 256  # batch that base rates are for
FEW = 10_000  # pictures, below which a recipe with strong augmentation has no time to converge

# Shapes of ViT students; without one of these, the student has its teacher's shape.
STUDENTS = {
    "tiny": {"width": 192, "depth": 12, "heads": 3, "mlp_width": 768},
    "small": {"width": 384, "depth": 12, "heads": 6, "mlp_width": 1536},
    "base": base.VIT_B16,
    "large": base.VIT_L14,
}


class Pictures(NamedTuple):
    """The data of a run.

    Attributes:
      fields: name, split, eval_split and data_dir, as in `config.data`.
      count: number of training pictures.
      classes: number of classes; 0 without labels.
    """

    fields: dict[str, str]
    count: int
    classes: int


def arguments(text: str, **defaults: str) -> dict[str, Any]:
    """The arguments of a config on your own pictures, see `base.arguments`.

    Raises:
      ConfigError: `data` is missing, a value is no number, or a name is unknown.
    """
    common = dict.fromkeys(("data", "data_dir", "split", "eval_split"), "")
    numbers = dict.fromkeys(("size", "batch", "epochs"), "")
    given = base.arguments(text, **common, **numbers, **defaults)
    for name in ("data", *(name for name in ("teacher", "init_from") if name in defaults)):
        if given[name] in ("", True):
            raise ConfigError(f"the config needs {name}=..., as in {_example(defaults)}")
    return given | {name: _number(name, given[name]) for name in numbers}


def _example(defaults: dict[str, str]) -> str:
    network = "teacher=MODEL_FOLDER" if "teacher" in defaults else "init_from=MODEL_FOLDER"
    return f"--config=configs/NAME.py:data=FOLDER,{network}"


def _number(name: str, text: str) -> float:
    """The value of an argument; 0 where it is not given."""
    if not text:
        return 0.0
    try:
        value = float(str(text))  # a name without a value is True
    except ValueError:
        value = math.nan
    whole = name == "epochs" or value % 1 == 0
    if not 0 < value < math.inf or not whole:
        kind = "number" if name == "epochs" else "whole number"
        raise ConfigError(f"{name}={text}: expected a {kind} above 0")
    return value


def pictures(given: dict[str, Any]) -> Pictures:
    """Opens the data that the arguments name.

    Raises:
      DataError: there are no such pictures.
    """
    name, data_dir = datasets.name_of(given["data"]), given["data_dir"]
    if name.startswith(datasets.FOLDER_PREFIX):
        name, split, eval_split = _splits_of_folder(name)
    else:
        split, eval_split = _splits_of_tfds(name, data_dir)
    fields = {
        "name": name,
        "split": given["split"] or split,
        "eval_split": given["eval_split"] or eval_split,
        "data_dir": data_dir,
    }
    dataset = datasets.open_dataset(name, fields["split"], data_dir=data_dir or None)
    return Pictures(fields, len(dataset), dataset.num_classes or 0)


def labelled(given: dict[str, Any]) -> Pictures:
    """`pictures` with classes and with a held-out split, as fine-tuning and probes need them.

    Raises:
      DataError: there are no such pictures, no classes or only one, or nothing is held out.
    """
    found = pictures(given)
    name, split = found.fields["name"], found.fields["split"]
    if found.classes < 2:
        dataset = datasets.open_dataset(name, split, data_dir=found.fields["data_dir"] or None)
        raise DataError(
            f"{dataset.name} has {found.classes or 'no'} class{'es' * (not found.classes)}"
            f"{datasets.why_unlabelled(dataset)}, but a classifier needs two or more: make a "
            "sub-folder of pictures for each class"
        )
    if not found.fields["eval_split"]:
        folder = name.removeprefix(datasets.FOLDER_PREFIX)
        raise DataError(
            f"{name} has no held-out pictures, by which a classifier is measured. This makes "
            "folders of links that have them, for data=FOLDER_split:\n  python -m "
            f"fd_jax.data.hold_out --input={folder} --output={folder.rstrip('/')}_split"
        )
    return found


def _splits_of_folder(name: str) -> tuple[str, str, str]:
    """Name, training split and held-out split of a folder, which may have a sub-folder for each."""
    is_one = datasets.is_one_folder(name)
    template = f"{name.rstrip('/')}/{{split}}" if is_one else name

    def exists(split: str) -> bool:
        path = template.removeprefix(datasets.FOLDER_PREFIX).replace("{split}", split)
        return epath.Path(path).is_dir()

    held_out = next(filter(exists, HELD_OUT), "")
    if is_one and not (held_out and exists("train")):  # a class may be called "train"
        return name, "train", ""
    return template, "train", held_out


def _splits_of_tfds(name: str, data_dir: str) -> tuple[str, str]:
    """The splits of a TFDS dataset; the last tenth is held out where nothing else is."""
    splits = datasets.find_builder(name, data_dir or None).info.splits or {}
    held_out = next((split for split in HELD_OUT if split in splits), "")
    return ("train", held_out) if held_out else ("train[:90%]", "train[90%:]")


def network(given: dict[str, Any], name: str) -> tuple[ModelSpec, int]:
    """The network in the model folder of an argument, and the side of its images in this run.

    Raises:
      ModelFolderError: there is no such folder.
      ConfigError: the network takes images that are not square.
    """
    spec = model_folder.load_spec(epath.Path(given[name]))
    side = sizes.square_side(spec.arch["image_size"], network="a network in training")
    # A side that the student's patches fill: those of some teachers leave a rest of theirs unread.
    tokens = min(side, max(LARGEST_SIDE, spec.stride)) // spec.stride
    return spec, int(given["size"]) or tokens * spec.stride


def is_folder(name: str) -> bool:
    """Whether the argument `student` names a model folder, which the student starts from."""
    return (epath.Path(name) / "model.json").exists()


def is_swin(spec: ModelSpec) -> bool:
    """Whether a network is a Swin, whose norm and pooling differ from a ViT's."""
    return spec.family.startswith("swin")


def student(name: str, teacher: ModelSpec, size: int) -> tuple[str, dict[str, Any]]:
    """Family and architecture of a student on the grid of its teacher.

    Args:
      name: "same" for the teacher's shape, or one of STUDENTS.
      teacher: its teacher.
      size: side of the images in pixels.

    Raises:
      ConfigError: there is no such student.
    """
    if name != "same" and name not in STUDENTS:
        raise ConfigError(
            f"student={name}: expected one of {['same', *STUDENTS]}, or a model folder"
        )
    if name == "same" and not teacher.has_attention:
        raise ConfigError(
            f"student=same: {teacher.source!r} is of the family {teacher.family!r}, for which "
            f"there is no recipe of a student; name one of {[*STUDENTS]}, on the teacher's grid"
        )
    if name == "same" and is_swin(teacher):
        shape = {key: teacher.arch[key] for key in base.SWIN_B_W14}
        return "swin_v2", base.swin_v2(shape, image_size=size)
    shape = STUDENTS.get(name) or {key: teacher.arch[key] for key in base.VIT_B16}
    return "vit", base.student({**shape, "patch_size": teacher.stride}, image_size=size)


def fit(
    config: Config,
    given: dict[str, Any],
    found: Pictures,
    *,
    size: int,
    rate: float,
    epochs: float,
    steps: int,
    batch: int = RATE_BATCH,
) -> Config:
    """Fits a recipe to the number of pictures.

    Args:
      config: the recipe.
      given: the arguments.
      found: the data.
      size: side of the images in pixels.
      rate: peak learning rate for a batch of RATE_BATCH pictures.
      epochs: epochs of the recipe, of which no more than `steps` updates are made.
      steps: most updates.
      batch: largest batch.
    """
    config.batch_size = int(given["batch"]) or batch_size(found.count, batch)
    per_epoch = max(1, found.count // config.batch_size)
    config.epochs = given["epochs"] or round(min(float(epochs), steps / per_epoch), 2)
    total = max(1, round(config.epochs * per_epoch))
    peak = _rounded(rate * math.sqrt(config.batch_size / RATE_BATCH))
    config.optim.update(peak_lr=peak, start_lr=_rounded(peak / 100), min_lr=_rounded(peak / 100))
    config.optim.update(lr_batch=config.batch_size, warmup_epochs=config.epochs / 10)
    config.data.update(**found.fields, image_size=size)
    config.eval.update(every=max(per_epoch, total // 20), epochs=0.0)
    config.checkpoint.every = max(1, min(1000, total // 10))
    config.log_every = max(1, min(50, total // 50))
    return _smoke(config) if given["smoke"] else config


def batch_size(count: int, largest: int) -> int:
    """The largest power of two up to an eighth of the pictures, from 8 to `largest`."""
    return 2 ** int(math.log2(max(1, min(largest, max(8, count // 8), count))))


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")


def _smoke(config: Config) -> Config:
    """Four steps, and one batch of each evaluation."""
    config.steps = 4
    config.log_every = 1
    config.eval.update(every=4, batches=1)
    config.optim.warmup_epochs = 0.0
    return config
