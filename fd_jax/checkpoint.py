"""Saving and restoring: the only file that knows Orbax.

Trees of a model folder are written once and whole. Checkpoints of a run are written while the
device works on, committed by Orbax when they are complete, and never restored from before that.
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
    """An array that is made when its turn to be written comes, and dropped after that.

    Attributes:
      shape, dtype: of the array.
      load: makes it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class _HostArrayHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler of numpy arrays, which makes `LazyArray`s a few at a time and copies none."""

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


# Enough to keep several cores compressing, little beside any model.
_BATCH_BYTES = 64 << 20


def save_tree(path: epath.Path, tree: PyTree) -> None:
    """Writes a tree of arrays to the folder `path`, which must not exist. All processes call it.

    Leaves are numpy or jax arrays, or `LazyArray`s where the tree should never be in memory whole.

    Raises:
      OSError: the disk is full, or whatever else the system says.
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
        # TensorStore words the system's errors as text.
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise


def load_tree(path: epath.Path) -> PyTree:
    """Reads a tree written by `save_tree` as numpy arrays, whatever devices wrote it."""
    path = path.resolve()
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = _description(checkpointer, path)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, restore_args=as_numpy)


def _description(checkpointer: ocp.Checkpointer, path: epath.Path) -> PyTree:
    found = checkpointer.metadata(path).item_metadata
    if found is None:
        raise ValueError(f"what describes the arrays in {path} is missing or damaged")
    return found.tree


def describe_tree(path: epath.Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every array below `save_tree`'s folder by "a/b" path; reads no values."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = _description(checkpointer, path.resolve())
    return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in _by_path(tree).items()}


def _by_path(tree: PyTree) -> dict[str, Any]:
    """Every leaf by its "a/b" path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


class Checkpoints:
    """The numbered checkpoints of one workdir.

    Each holds the train state and a small JSON record (data position, configuration). Keeps the
    last `keep` and every `keep_every`-th step.
    """

    def __init__(self, folder: epath.Path, *, keep: int, keep_every: int | None):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every, create=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)
        self._folder = folder

    def latest_step(self) -> int | None:
        """The newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree, record: dict[str, Any]) -> None:
        """Starts writing; returns before it is done. All processes call it with the same step."""
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(record)
            ),
        )

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Reads one checkpoint onto the shardings of `like`, a tree of `jax.ShapeDtypeStruct`.

        Raises:
          CheckpointError: the files of this step are damaged or are not those of this state.
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
                "Delete that folder to continue from the one before it."
            ) from error
        return restored["state"], restored["record"]

    def _refuse_another_state(self, step: int, like: PyTree) -> None:
        path = self._folder / str(step)
        try:
            saved = {name: shape for name, (shape, _) in describe_tree(path / "state").items()}
        except (ValueError, KeyError, OSError):
            return  # damaged: reading it will say so
        wanted = {name: tuple(leaf.shape) for name, leaf in _by_path(like).items()}
        differing = differences(saved, wanted)
        if differing:
            shown = "\n".join(differing[:10] + ["  ..."] * (len(differing) > 10))
            raise CheckpointError(
                f"checkpoint {path} holds another state than this config trains, in "
                f"{len(differing)} arrays:\n{shown}\n"
                "Go back to the config that the workdir was begun with, or use another workdir."
            )

    def wait(self) -> None:
        """Returns when every started write is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the writer threads."""
        self._manager.wait_until_finished()
        self._manager.close()
