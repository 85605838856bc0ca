"""The files of a folder of targets: each is whole or not there, so a stopped command goes on.

A shard is written under another name. When it is whole, a small file beside it gets its numbers,
and then it is renamed: what has the name of a shard is whole and has its numbers. When all are
there, `targets.json` gets the numbers, and the small files go.
"""

from collections.abc import Mapping
import dataclasses
import json
from typing import Any
import zlib

from etils import epath
import numpy as np

from fd_jax import files
from fd_jax.data import shards
from fd_jax.data.stored import codecs, description, records
from fd_jax.data.stored.description import Description, Shard
from fd_jax.data.stored.records import View
from fd_jax.errors import ConfigError, DataError, StorageError, differences, first_few
from fd_jax.targets import measuring

# One record in each group, so that one is read without its neighbours. Exponents of floats and
# tokens with a large channel compress well, and no better at higher levels.
OPTIONS = "group_size:1,zstd:1"
_UNFINISHED = ".incomplete"
_OURS = ("maps-", "decoder-", description.FILE, "run.lock")  # beginnings of the names of our files


def check_output(folder: epath.Path) -> None:
    """Refuses a folder that cannot hold targets, or holds something else, before any work.

    Raises:
      ConfigError: it is no local folder, or has files that are not ours.
    """
    if "://" in str(folder):
        raise ConfigError(
            f"--output={folder}: ArrayRecord files are written to a local or mounted folder; name "
            "one, and copy the folder when it is complete"
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output={folder} is a file; name a folder")
    found = [path.name for path in folder.iterdir()] if folder.exists() else []
    if foreign := sorted(name for name in found if not name.startswith(_OURS)):
        raise ConfigError(
            f"--output={folder} holds other files ({first_few(foreign)}); name a new folder, or "
            "the one of a stopped command to go on with it"
        )


def begin(
    folder: epath.Path, planned: Description, constants: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """Writes the description of a new folder, or compares it with that of a folder to go on with.

    Args:
      folder: existing folder, held by this command.
      planned: what this command makes.
      constants: with which its maps are decoded, see `codecs.save_constants`.

    Raises:
      ConfigError: the folder holds other targets; the message has both sides.
      DataError: its description is damaged.
    """
    if not (folder / description.FILE).exists():
        codecs.save_constants(folder, constants)
        description.write(folder, planned)
        return
    found = description.read(folder)
    if changed := differences(found.identity(), planned.identity()):
        raise ConfigError(
            f"{folder} holds targets that were begun with other flags (there -> here):\n"
            + "\n".join(changed)
            + "\nuse the same flags to go on with it, or another --output"
        )


class Writer:
    """Writes the records of one shard, and adds up their numbers.

    Args:
      path: file of the shard, which appears when it is whole.
    """

    def __init__(self, path: epath.Path):
        from array_record.python import array_record_module  # type: ignore[attr-defined]

        self._path = path
        self._staging = path.with_name(path.name + _UNFINISHED)
        self._writer: Any = array_record_module.ArrayRecordWriter(str(self._staging), OPTIONS)
        self._records = self._digest = self._maps = self._unreadable = 0
        self._error = measuring.nothing()

    def add(self, view: View, content: bytes, error: np.ndarray | None) -> None:
        """Adds a view.

        Args:
          view: which one it is.
          content: its map; b"" where there is none.
          error: numbers of `measuring.apart` for this map; None where there is none. [2, 4]
        """
        record = records.pack(view, content)
        self._writer.write(record)
        self._records, self._digest = self._records + 1, zlib.crc32(record, self._digest)
        self._unreadable += view.state == records.UNREADABLE and view.number == 0
        if error is not None:
            self._maps += 1
            self._error = measuring.added(self._error, error.astype(np.float64))

    def finish(self) -> None:
        """Completes the shard.

        Raises:
          StorageError: not all of it has arrived on the disk.
        """
        self._writer.close()
        if _records_in(self._staging) != self._records:
            raise StorageError(
                f"{self._staging} is shorter than what was written to it; make room, or name "
                "another folder, and give the command again: shards that are whole stay"
            )
        numbers = Shard(
            self._records,
            self._staging.stat().length,
            self._digest,
            self._maps,
            self._unreadable,
            tuple(map(tuple, self._error.tolist())),
        )
        files.write_text(_beside(self._path), json.dumps(numbers._asdict()) + "\n")
        self._staging.replace(self._path)


def is_whole(folder: epath.Path, wanted: Description, number: int) -> bool:
    """Whether a shard is there with the length that it was written with."""
    path = folder / wanted.shard_name(number)
    known = _shard(folder, wanted, number)
    return known is not None and path.exists() and path.stat().length == known.bytes


def complete(folder: epath.Path, wanted: Description) -> Description:
    """Writes the final description, once all shards are there; returns it.

    Raises:
      DataError: shards are missing, which other processes should have written, or no picture could
        be read.
    """
    missing = [n for n in range(wanted.number_of_shards) if not is_whole(folder, wanted, n)]
    if missing:
        names = [wanted.shard_name(number) for number in missing]
        raise DataError(
            f"{len(names)} of {wanted.number_of_shards} shards are not in {folder} "
            f"({first_few(names)}): --output has to be one folder that all processes share"
        )
    known = (_shard(folder, wanted, number) for number in range(wanted.number_of_shards))
    found = [shard for shard in known if shard is not None]
    maps = sum(shard.maps for shard in found)
    if not maps:
        raise DataError(f"no picture of {wanted.data['name']} could be read; use another --data")
    error = measuring.summary([each.error for each in found], tokens=maps * wanted.codec.tokens)
    result = dataclasses.replace(wanted, shards=found, error=error)
    description.write(folder, result)
    return result


def tidy(folder: epath.Path, finished: Description) -> None:
    """Removes the small files of a complete folder."""
    for number in range(finished.number_of_shards):
        path = folder / finished.shard_name(number)
        _beside(path).unlink(missing_ok=True)
        path.with_name(path.name + _UNFINISHED).unlink(missing_ok=True)


def _shard(folder: epath.Path, wanted: Description, number: int) -> Shard | None:
    """The numbers of a shard; None if it was not finished."""
    path = folder / wanted.shard_name(number)
    if not _beside(path).exists():
        return None if wanted.shards is None else wanted.shards[number]
    try:
        return numbers_of(path)
    except (ValueError, TypeError):  # damaged: the shard is written again
        return None


def numbers_of(shard: epath.Path) -> Shard:
    """What `Writer` has counted, from the small file beside a shard.

    Raises:
      ValueError, TypeError: that file is damaged.
    """
    return Shard(**files.read_object(_beside(shard)))


def _beside(shard: epath.Path) -> epath.Path:
    return shard.with_name(f"{shard.name}.json")


def _records_in(path: epath.Path) -> int:
    """Number of records of a file; -1 if it is cut off."""
    try:
        return shards.count(path)
    except (RuntimeError, ValueError):
        return -1
