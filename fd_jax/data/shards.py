"""The files of a prepared TFDS dataset: whether all are there, whole, and of the right length."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from fd_jax.errors import DataError, first_few

_THREADS = 16  # a bucket answers slowly, and ImageNet has a thousand shards


def check(name: str, instructions: Sequence[Any], *, remedy: str) -> None:
    """Opens every ArrayRecord file of a split, which reads its end, and compares its length.

    Args:
      name: of the dataset and split, for messages.
      instructions: `file_instructions` of a split of TFDS.
      remedy: what to do about a file that is damaged.

    Raises:
      DataError: a file is missing, cut off, or holds another number of examples.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        problems = list(filter(None, pool.map(_problem, instructions)))
    if problems:
        raise DataError(
            f"{name}: {len(problems)} of its {len(instructions)} shards cannot be used: "
            f"{first_few(problems)}. Copy them again from where they are whole, or {remedy}"
        )


def count(path: epath.Path) -> int:
    """Number of records of an ArrayRecord file, of which the end is read.

    Raises:
      RuntimeError, ValueError: it is no whole file.
    """
    # A compiled module, which the type checker does not see.
    from array_record.python import array_record_module  # type: ignore[attr-defined]

    reader = array_record_module.ArrayRecordReader(
        str(path), options="readahead_buffer_size:0", file_reader_buffer_size=32768
    )
    found = reader.num_records()
    reader.close()
    return found


def _problem(instruction: Any) -> str | None:
    """What is wrong with a shard; None if nothing is."""
    path = epath.Path(instruction.filename)
    if not path.exists():
        return f"{path} is missing"
    try:
        found = count(path)
    except (RuntimeError, ValueError) as error:
        return f"{path} is cut off or damaged ({str(error)[:80] or 'no end'})"
    expected = instruction.examples_in_shard
    if found != expected:
        return f"{path} holds {found} examples, and dataset_info.json says {expected}"
    return None
