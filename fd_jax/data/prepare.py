"""Prepares a TFDS dataset in the format that training reads.

    python -m fd_jax.data.prepare --name=photos --data_dir=data
    python -m fd_jax.data.prepare --name=imagenet2012 --manual_dir=/path/to/the/tar/files

TFDS's own default is TFRecord, which has no random access, and its command line needs a package
that clashes with the rest; hence this. What is prepared already is left as it is.
"""

import argparse
from collections.abc import Sequence
import sys

from etils import epath

from fd_jax.data import datasets
from fd_jax.errors import DataError, UserError


def prepare(name: str, *, data_dir: str | None = None, manual_dir: str | None = None) -> str:
    """Downloads where needed, and writes ArrayRecord files.

    Args:
      name: of the dataset.
      data_dir: where to; None for TFDS's default.
      manual_dir: folder with files that cannot be downloaded (ImageNet's tar files).

    Returns:
      A line that says what is there now.

    Raises:
      DataError: there is no such dataset, or its files are missing.
    """
    import tensorflow_datasets as tfds

    builder = datasets.find_builder(name, data_dir)
    if not builder.is_prepared():
        _check_manual_files(name, manual_dir)
    config = tfds.download.DownloadConfig(manual_dir=manual_dir)
    try:
        builder.download_and_prepare(download_config=config, file_format="array_record")
    except (AssertionError, FileNotFoundError) as error:  # what TFDS raises for missing files
        raise DataError(f"{name} cannot be prepared: {error}") from error
    splits = ", ".join(f"{s.num_examples} {n}" for n, s in builder.info.splits.items())
    return f"{name}: {splits} examples in {builder.data_dir}"


def _check_manual_files(name: str, manual_dir: str | None) -> None:
    """TFDS would go on without the splits whose files are missing."""
    files = datasets.MANUAL_FILES.get(name, ())
    missing = [
        file for file in files if not (manual_dir and (epath.Path(manual_dir) / file).exists())
    ]
    if missing:
        where = f"is not in {manual_dir}" if manual_dir else "needs a --manual_dir"
        raise DataError(f"{name} cannot be prepared: {', '.join(missing)} {where}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="TFDS name")
    parser.add_argument("--data_dir", help="where to; TFDS's default if not given")
    parser.add_argument("--manual_dir", help="folder with files that cannot be downloaded")
    args = parser.parse_args(argv)
    try:
        print(prepare(args.name, data_dir=args.data_dir, manual_dir=args.manual_dir))
    except (UserError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
