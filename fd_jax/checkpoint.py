"""Saving and restoring arrays; the only module that uses Orbax.

The tree of a model folder is written synchronously. Checkpoints of a run are written while the
devices continue to work. Orbax commits a checkpoint when it is complete, and only committed
checkpoints are restored.
"""

from collections.abc import Callable
import dataclasses
import json
import math
import os
import re
from typing import Any

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from fd_jax.errors import CheckpointError, differences
from fd_jax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that is loaded just before it is written, and released afterwards.

    Attributes:
      shape: shape of the array.
      dtype: dtype of the array.
      load: function that returns the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class _HostArrayHandler(ocp.type_handlers.NumpyHandler):
    """Handler of numpy arrays that loads `LazyArray`s a few at a time and copies no array."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def _background_serialize(self, values, infos, args=None):
        args = args or [ocp.SaveArgs()] * len(values)
        batch, pending = [], 0
        for index, (value, info, arg) in enumerate(zip(values, infos, args, strict=True), start=1):
            array = value.load() if isinstance(value, LazyArray) else value
            batch.append((array, info, arg))
            pending += array.nbytes
            if pending >= _BATCH_BYTES or index == len(values):
                await super()._background_serialize(*map(list, zip(*batch, strict=True)))
                batch, pending = [], 0


# Large enough to keep several cores busy compressing, and small compared with any model.
_BATCH_BYTES = 64 << 20


def save_tree(path: epath.Path, tree: PyTree) -> None:
    """Writes a tree of arrays to the folder `path`, which must not exist. All processes call it.

    Leaves are numpy or jax arrays, or `LazyArray`s if the whole tree should never be in memory.

    Raises:
      OSError: the system cannot write the files, e.g. because the disk is full.
    """
    if any(isinstance(leaf, LazyArray) for leaf in jax.tree.leaves(tree)):
        host, device = _HostArrayHandler(), ocp.type_handlers.ArrayHandler()
        registry = ocp.type_handlers.create_type_handler_registry(
            (jax.Array, device), (np.ndarray, host), (LazyArray, host)
        )
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    else:
        handler = ocp.PyTreeCheckpointHandler()
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path.resolve(), tree)  # Orbax refuses relative paths
    except ValueError as error:
        # TensorStore reports errors of the system only in the text of its own error.
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise


def load_tree(path: epath.Path) -> PyTree:
    """Reads a tree of `save_tree` as numpy arrays, regardless of the devices that wrote it."""
    path = path.resolve()
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = _description(checkpointer, path)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, restore_args=as_numpy)


def _description(checkpointer: ocp.Checkpointer, path: epath.Path) -> PyTree:
    metadata = checkpointer.metadata(path).item_metadata
    if metadata is None:
        raise ValueError(f"the metadata of the arrays in {path} is missing or damaged")
    return metadata.tree


def describe_tree(path: epath.Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns shape and dtype of every array of a saved tree by "a/b" path; reads no values."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = _description(checkpointer, path.resolve())
    return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in _by_path(tree).items()}


def _by_path(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree by their "a/b" paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def _kind(dtype: str, shape: tuple[int, ...]) -> str:
    """The kind of an array's numbers and its shape; floats of any width are one kind."""
    return f"{'float' if 'float' in dtype else dtype} {list(shape)}"


class Checkpoints:
    """The numbered checkpoints of one workdir.

    Each checkpoint holds the train state and a small JSON record (data position, config).

    Args:
      folder: folder of the checkpoints; created if necessary.
      keep: number of latest checkpoints to keep.
      keep_every: checkpoints at multiples of this step are kept forever; None for none.
    """

    def __init__(self, folder: epath.Path, *, keep: int, keep_every: int | None):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every, create=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)
        self._folder = folder

    def latest_step(self) -> int | None:
        """Returns the step of the latest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree, record: dict[str, Any]) -> None:
        """Starts to write a checkpoint and returns before it is complete.

        All processes call this with the same step. A step that is already saved is left as it is.
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(record)
            ),
        )

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Reads one checkpoint.

        Args:
          step: step of the checkpoint.
          like: tree of `jax.ShapeDtypeStruct` with the expected shapes and shardings.

        Returns:
          The state, sharded like `like`, and the record.

        Raises:
          CheckpointError: the files are damaged, or the checkpoint has arrays other than `like`.
        """
        self._refuse_another_state(step, like)
        restore_args = jax.tree.map(
            lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape), like
        )
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(like, restore_args=restore_args),
                    record=ocp.args.JsonRestore(),
                ),
            )
        except (ValueError, KeyError, OSError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"checkpoint {self._folder / str(step)} cannot be read: {error}\n"
                "Delete that folder to continue from the checkpoint before it."
            ) from error
        return restored["state"], restored["record"]

    def _refuse_another_state(self, step: int, like: PyTree) -> None:
        path = self._folder / str(step)
        try:
            described = describe_tree(path / "state")
        except (ValueError, KeyError, OSError):
            return  # damaged: `restore` will raise
        # Orbax casts to the expected dtype without a word, from floats to integers too.
        saved = {name: _kind(dtype, shape) for name, (shape, dtype) in described.items()}
        expected = {
            name: _kind(str(leaf.dtype), tuple(leaf.shape)) for name, leaf in _by_path(like).items()
        }
        differing = differences(saved, expected)
        if differing:
            shown = "\n".join(differing[:10] + ["  ..."] * (len(differing) > 10))
            raise CheckpointError(
                f"checkpoint {path} does not hold the state that this config trains; "
                f"{len(differing)} arrays differ:\n{shown}\n"
                "Go back to the config that the workdir was started with, or use another workdir."
            )

    def wait(self) -> None:
        """Waits until all checkpoints are complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until all checkpoints are complete, and releases the writer threads."""
        self._manager.wait_until_finished()
        self._manager.close()
