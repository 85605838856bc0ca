"""A teacher whose maps were computed before the run: it has a network's facts, and no weights."""

import dataclasses
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import ml_collections

from fd_jax import model_folder
from fd_jax.cost import flops
from fd_jax.data.elements import Element
from fd_jax.data.stored import codecs, description
from fd_jax.errors import ConfigError
from fd_jax.models.features import FeatureMap
from fd_jax.normalization.statistics import Origin
from fd_jax.tasks import sections
from fd_jax.tasks.sections import Section
from fd_jax.tasks.teacher import Teacher
from fd_jax.typing import Batch, Config, PyTree

DECODER = "decoder"  # part of the frozen arrays: constants with which maps are decoded
# Fields of a teacher with the folders of its maps of training pictures, and of held-out ones.
TRAINING, HELD_OUT = "targets", "eval_targets"


def folder_of(section: Section, field: str = TRAINING) -> str:
    """The folder of stored targets of a teacher; "" for one that runs."""
    return section.network.get(field, "")


def folders(config: Config, field: str = TRAINING) -> dict[str, str]:
    """The folders of stored targets of a run, by the name of the teacher."""
    named = {name: folder_of(section, field) for name, section in sections.of(config).items()}
    return {name: folder for name, folder in named.items() if folder}


def elements(config: Config) -> dict[str, Element]:
    """The elements of training batches that hold stored maps; reads no maps.

    Raises:
      DataError: there is no such folder, or it is damaged.
    """
    found: dict[str, Element] = {}
    for name, folder in folders(config).items():
        found |= description.elements(description.read(folder).codec, name)
    return found


class StoredTeacher(Teacher):
    """The facts of a teacher that does not run, from the description of its stored targets.

    Attributes:
      folder: folder of targets.
      targets: what it holds.
      held_out: whether there are targets of held-out pictures as well.
    """

    def __init__(self, section: Section, *, dtype: jnp.dtype):
        """Checks that the targets are those of the teacher of a config; reads no maps.

        Args:
          section: what the config says about the teacher.
          dtype: compute dtype of the run.

        Raises:
          DataError: the folder does not exist, is damaged, or of another version.
          ConfigError: the targets are of another teacher, or of other features of it.
        """
        self.folder = epath.Path(folder_of(section))
        self.targets = description.read(self.folder)
        self._check(section)
        self.held_out = bool(folder_of(section, HELD_OUT))
        if self.held_out:
            self._check_held_out(section)
        network = ml_collections.ConfigDict(section.network.to_dict())
        network.update(image_size=0, stages=0, matmuls="")  # as described, and it does not run
        super().__init__(network, dtype=dtype, head=False, spec=self.targets.spec())

    def origin(self, *, after_norm: bool) -> Origin:
        """By which statistics of its tokens are known; `after_norm` is that of the targets."""
        known = {field.name: self.targets.teacher[field.name] for field in _FACTS}
        return Origin(**{**known, "after_norm": after_norm})

    def load(self) -> PyTree:
        """The constants with which its maps are decoded; {} for kinds that have none.

        Raises:
          DataError: their files are missing or damaged.
        """
        codec = self.targets.codec
        found = codecs.load_constants(self.folder, codec, self.targets.decoder)
        return {DECODER: found} if found else {}

    def abstract(self) -> PyTree:
        """Shapes and dtypes of `load`, without reading anything."""
        shapes = self.targets.codec.shapes()
        return {DECODER: shapes} if shapes else {}

    def features(self, *args: Any, **kwargs: Any) -> FeatureMap:
        """Refuses: it has no weights.

        Raises:
          ConfigError: always.
        """
        raise ConfigError(
            f"the teacher of the targets in {self.folder} does not run, so that it has no features "
            "of other pictures or views; set targets='' and path to its model folder"
        )

    def stored_features(self, weights: PyTree, batch: Batch, name: str) -> FeatureMap:
        """Its map of each image of a batch, float32, from the stored arrays.

        Args:
          weights: result of `load`, on the devices.
          batch: with the elements of `description.elements`.
          name: of the teacher; "" for the only one.
        """
        codec, names = self.targets.codec, description.element_names(name)
        arrays = {array: batch[names[array]] for array in codec.elements}
        tokens = jax.lax.stop_gradient(codec.decode(arrays, weights.get(DECODER, {})))
        return FeatureMap(tokens, cls=int(codec.cls), registers=0, grid=codec.grid)

    def flops(
        self,
        image_size: int,
        own_size: int | None = None,
        *,
        until: int | None = None,
        attends: bool = False,
    ) -> flops.Flops:
        """FLOPs of decoding the map of one image."""
        del image_size, own_size, until, attends
        return flops.Flops(self.targets.codec.decoding_flops())

    def _check(self, section: Section) -> None:
        """Refuses targets of another teacher than the config names, with both sides."""
        network, target = section.network, section.target
        if target.blocks:
            raise ConfigError(
                f"{section.field('target.blocks')}={tuple(target.blocks)} are maps after several "
                f"blocks of the {section.role}, and {self.folder} holds that of its last one: set "
                f"target.blocks=(), or {section.field('targets')}='' for a teacher that runs"
            )
        here = {"after_norm": target.after_norm, "stages": network.stages}
        here |= {"image_size": network.image_size} if network.image_size else {}
        here |= {"source": network.source} if network.source else {}
        here |= _weights_of(network.path)
        here["matmuls"] = network.get("matmuls", "")
        if lines := description.unlike(_of_teacher(self.targets), here):
            raise ConfigError(
                f"the targets in {self.folder} are not those of the {section.role} of this "
                "config:\n"
                + "\n".join(lines)
                + f"\nset {section.field('targets')} to its own targets, change these settings, or "
                "make targets of this teacher with python -m fd_jax.targets"
            )

    def _check_held_out(self, section: Section) -> None:
        """Refuses targets of held-out pictures whose maps are not like those of training."""
        folder = folder_of(section, HELD_OUT)
        other = description.read(folder)
        stored, here = (
            {**_of_teacher(each), **dataclasses.asdict(each.codec), "decoder": dict(each.decoder)}
            for each in (other, self.targets)
        )
        if lines := description.unlike(stored, here):
            raise ConfigError(
                f"the targets in {folder} (stored) are not of the same maps as those in "
                f"{self.folder} (here):\n"
                + "\n".join(lines)
                + f"\nmake {section.field(HELD_OUT)} with the same flags and --held_out"
            )


_FACTS = dataclasses.fields(Origin)


def _of_teacher(targets: description.Description) -> dict[str, Any]:
    """What targets know of their teacher; matmuls are there only if they are quantised."""
    return {"matmuls": "", **targets.teacher}


def _weights_of(path: str) -> dict[str, int]:
    """The digest of a teacher's weights, if its folder is there and has it; none are read."""
    if not (epath.Path(path) / model_folder.DIGESTS).exists():
        return {}
    return {"weights": model_folder.digest_of_weights(path)}
