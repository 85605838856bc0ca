"""Saving and restoring arrays; the only module that uses Orbax.

The tree of a model folder is written synchronously. Checkpoints of a run are written while the
devices continue to work. Orbax commits a checkpoint when it is complete, and only committed
checkpoints are restored.
"""

from collections.abc import Callable, Collection, Iterator
import contextlib
import dataclasses
import json
import math
import os
import threading
from typing import Any, Self

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from fd_jax import digests, sharding, storage
from fd_jax.errors import (
    CheckpointError,
    DamagedCheckpointError,
    StorageError,
    UserError,
    differences,
    first_few,
)
from fd_jax.typing import PyTree

# What says nothing about files. Of damaged ones, Orbax raises whatever its parsers meet: errors of
# values, keys, attributes and kinds that are not implemented, and `Exception` itself.
_NOT_OF_FILES = (UserError, MemoryError, jax.errors.JaxRuntimeError)


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
    """Handler of numpy arrays that loads `LazyArray`s a few at a time and copies no array.

    Attributes:
      digests: of the arrays written so far, by "a/b" path.
    """

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self.digests: dict[str, int] = {}

    async def _background_serialize(self, values, infos, args=None):
        args = args or [ocp.SaveArgs()] * len(values)
        batch, pending = [], 0
        for index, (value, info, arg) in enumerate(zip(values, infos, args, strict=True), start=1):
            array = value.load() if isinstance(value, LazyArray) else value
            self.digests[info.name.replace(".", "/")] = digests.of_array(array)
            batch.append((array, info, arg))
            pending += array.nbytes
            if pending >= _BATCH_BYTES or index == len(values):
                await super()._background_serialize(*map(list, zip(*batch, strict=True)))
                batch, pending = [], 0


# Large enough to keep several cores busy compressing, and small compared with any model.
_BATCH_BYTES = 64 << 20


# Large enough that what several devices write together takes longer than compiling their slices.
_SLICE_BYTES = 1 << 20


def _handler(numpy: ocp.type_handlers.NumpyHandler | None = None) -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler of trees, which slices no small arrays.

    Of an array that several devices hold, Orbax lets each write a slice, and compiles a program for
    every slice of every shape: at the first checkpoint, hundreds of them for arrays of a kilobyte.
    """
    default: Any = ocp.type_handlers.get_type_handler(jax.Array)
    arrays = ocp.type_handlers.ArrayHandler(
        min_slice_bytes_for_replica_parallel=_SLICE_BYTES,
        array_metadata_store=default._array_metadata_store,  # which Orbax exports nowhere
    )
    on_host = numpy or ocp.type_handlers.NumpyHandler()
    handlers = [(jax.Array, arrays), (np.ndarray, on_host)]
    if numpy:
        handlers.append((LazyArray, numpy))
    registry = ocp.type_handlers.create_type_handler_registry(*handlers)
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def save_tree(path: epath.Path, tree: PyTree) -> dict[str, int]:
    """Writes a tree of arrays to the folder `path`, which must not exist. All processes call it.

    Leaves are numpy or jax arrays, or `LazyArray`s if the whole tree should never be in memory;
    a tree with `LazyArray`s has no jax arrays.

    Returns:
      The digests of the arrays by "a/b" path, see `digests`.

    Raises:
      OSError: the system cannot write the files, e.g. because the disk is full.
    """
    lazy = any(isinstance(leaf, LazyArray) for leaf in jax.tree.leaves(tree))
    host = _HostArrayHandler()
    handler = _handler(host if lazy else None)
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path.resolve(), tree)  # Orbax refuses relative paths
    except ValueError as error:
        # TensorStore reports errors of the system only in the text of its own error.
        code = storage.code_of(error)
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error
    return host.digests if lazy else digests.of_tree(tree)


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


Description = dict[str, tuple[tuple[int, ...], str]]  # by "a/b" path, shape and dtype


def describe_tree(path: epath.Path) -> Description:
    """Returns shape and dtype of every array of a saved tree by "a/b" path; reads no values."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        # A checkpointer would warn that part of a checkpoint is not a checkpoint of its own.
        tree = handler.metadata(path.resolve()).tree
    return {
        name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in digests.by_path(tree).items()
    }


def _kind(dtype: str, shape: tuple[int, ...]) -> str:
    """The kind of an array's numbers and its shape; floats of any width are one kind."""
    return f"{'float' if 'float' in dtype else dtype} {list(shape)}"


_DIGESTS = "digests"  # in the record of a checkpoint
_REST = ""  # among the digests: that of the rest of the record, under a name that no array has
PATIENCE = 8.0  # seconds for a checkpoint that is being written when the storage fails elsewhere


# How Orbax and TensorStore report that what they have written is no longer there.
_MOVED = ("No ArrayMetadata found", "NOT_FOUND: ")


def _of_moved_files(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError) or str(error).startswith(_MOVED)


def _reader() -> ocp.Checkpointer:
    """Reads without waiting for the other processes, for one of which the files may be damaged."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(), record=ocp.JsonCheckpointHandler()
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _is_as_written(record: dict[str, Any], expected: dict[str, int]) -> bool:
    """Whether the digest of a record is the one among `expected`, if there is one."""
    # A flipped bit in the key "digests" leaves the digests in the record, under another name.
    if any(isinstance(value, dict) and _REST in value for value in record.values()):
        return False
    found = digests.of_text(_canonical(record))
    return expected.get(_REST, found) == found


def _canonical(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)


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
        handlers = {"state": _handler(), "record": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            folder.resolve(), options=options, item_handlers=handlers
        )
        self._folder = folder

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, in their order."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: PyTree,
        record: dict[str, Any],
        *,
        known: dict[str, int] | None = None,
    ) -> None:
        """Starts to write a checkpoint and returns before it is complete.

        All processes call this with the same step. A step that is already saved is left as it is.
        An error while it is written is raised by the next `save`, `wait` or `close`.

        Args:
          step: number of the checkpoint.
          state: tree of arrays.
          record: JSON-serializable values.
          known: digests of `state`, see `digests.of_tree`; None to compute them.

        Raises:
          StorageError: this checkpoint or the one before cannot be written.
        """
        if step in self._manager.all_steps():
            return
        known = digests.of_tree(state) if known is None else known
        record = {**record, _DIGESTS: {**known, _REST: digests.of_text(_canonical(record))}}
        with self._writing():
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
          DamagedCheckpointError: some process cannot read the files, or an array is not what was
            written.
          CheckpointError: the checkpoint has arrays other than `like`.
          StorageError: the system does not let this process read the files.
        """
        saved = self._described(step)
        self._refuse_another_state(step, saved, like)
        found = self._read(step, like, saved)
        # Digests are exchanged between processes, so all of them have to go on from here.
        damaged = sharding.anywhere(isinstance(found, DamagedCheckpointError))
        if isinstance(found, DamagedCheckpointError):
            raise found
        if damaged:
            raise self._damaged(step, "cannot be read by another process")
        state, record, expected = found
        self._refuse_damage(step, saved, state, expected)
        return state, record

    def _read(
        self, step: int, like: PyTree, saved: Description
    ) -> tuple[PyTree, dict[str, Any], dict[str, int]] | DamagedCheckpointError:
        """The state, the record and the digests, or what is damaged for this process."""
        restore_args = jax.tree.map(
            lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape), like
        )
        try:
            with _reader() as reader:
                restored = reader.restore(
                    (self._folder / str(step)).resolve(),
                    args=ocp.args.Composite(
                        state=ocp.args.PyTreeRestore(like, restore_args=restore_args),
                        record=ocp.args.JsonRestore(),
                    ),
                )
        except Exception as error:
            self._refuse_other_reasons(error)
            reason = f"{error}".partition("\n")[0]  # some go on with every setting of TensorStore
            damage = self._damaged(step, f"cannot be read: {type(error).__name__}: {reason:.300}")
            damage.__cause__ = error
            return damage
        if not saved:
            return self._damaged(step, "is damaged: the metadata of its arrays cannot be read")
        record = restored["record"]
        expected = record.pop(_DIGESTS, {})
        if not _is_as_written(record, expected):
            return self._damaged(step, "is damaged: its record is not what was written")
        return restored["state"], record, expected

    def _refuse_other_reasons(self, error: Exception) -> None:
        """Raises what is no sign of damage: files that the system keeps closed may be whole."""
        if isinstance(error, _NOT_OF_FILES):
            raise error
        if storage.code_of(error) in storage.NOT_DAMAGE:
            raise storage.explained(error, self._folder) or error from error

    def set_aside(self, steps: Collection[int]) -> None:
        """Moves checkpoints out of the way of those that will be saved; all processes call this.

        They go to the folder `damaged_checkpoints` beside the others.
        """
        if steps and jax.process_index() == 0:
            aside = self._folder.parent / "damaged_checkpoints"
            aside.mkdir(exist_ok=True)
            for step in steps:
                if (aside / str(step)).exists():
                    (aside / str(step)).rmtree()
                (self._folder / str(step)).rename(aside / str(step))
        sharding.barrier("checkpoints_set_aside")
        self._manager.reload()

    def _refuse_damage(
        self, step: int, saved: Description, state: PyTree, expected: dict[str, int]
    ) -> None:
        # An array that is restored in another dtype has other bits.
        same = {n for n, leaf in digests.by_path(state).items() if str(leaf.dtype) == saved[n][1]}
        found = digests.of_tree(state)
        damaged = digests.damaged({name: found[name] for name in sorted(same)}, expected)
        if damaged:
            shown = first_few(damaged)
            raise self._damaged(
                step, f"is damaged: {len(damaged)} arrays are not what was written ({shown})"
            )

    def _described(self, step: int) -> Description:
        """Shape and dtype of every array of a checkpoint; {} if its metadata is damaged."""
        try:
            (self._folder / str(step)).stat()  # Orbax takes any error for a missing folder
            return describe_tree(self._folder / str(step) / "state")
        except Exception as error:
            self._refuse_other_reasons(error)
            return {}  # `_read` finds out what is damaged

    def _damaged(self, step: int, what: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(
            f"checkpoint {self._folder / str(step)} {what}\n"
            "Add --fall_back to continue from the newest whole checkpoint, or delete that folder."
        )

    def _refuse_another_state(self, step: int, described: Description, like: PyTree) -> None:
        if not described:
            return
        # Orbax casts to the expected dtype without a word, from floats to integers too.
        saved = {name: _kind(dtype, shape) for name, (shape, dtype) in described.items()}
        expected = {
            name: _kind(str(leaf.dtype), tuple(leaf.shape))
            for name, leaf in digests.by_path(like).items()
        }
        differing = differences(saved, expected)
        if differing:
            shown = "\n".join(differing[:10] + ["  ..."] * (len(differing) > 10))
            raise CheckpointError(
                f"checkpoint {self._folder / str(step)} does not hold the state that this config "
                f"trains; {len(differing)} arrays differ:\n{shown}\n"
                "Go back to the config that the workdir was started with, or use another workdir."
            )

    def wait(self) -> None:
        """Waits until all checkpoints are complete.

        Raises:
          StorageError: one of them cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until all checkpoints are complete, and releases the writer threads."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Closes; after an error of the storage without waiting for what may never be complete.

        Orbax's threads wait for each other, for minutes after one of them has failed.
        """
        if error is None or storage.explained(error) is None:
            self.close()
            return
        closing = threading.Thread(target=self._close_quietly, daemon=True)
        closing.start()
        closing.join(PATIENCE)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what Orbax raises about files into a `StorageError`."""
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            found = storage.explained(error, self._folder)
            if found is None and _of_moved_files(error):
                found = StorageError(
                    f"{self._folder}: a checkpoint cannot be written ({str(error)[:100]}), since "
                    f"its files were moved or deleted meanwhile. {storage.AGAIN}"
                )
            if found is None:
                raise
            raise found from error

    def _close_quietly(self) -> None:
        with contextlib.suppress(Exception):
            self.close()
