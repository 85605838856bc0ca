"""Prepares a TFDS dataset in the format that training reads.

    python -m fd_jax.data.prepare --name=photos --data_dir=data
    python -m fd_jax.data.prepare --name=imagenet2012 --manual_dir=/path/to/the/tar/files

TFDS writes TFRecord by default, which has no random access, and its own command line needs a
package that conflicts with the other dependencies. A dataset that is already prepared is left as
it is. Any folder of pictures can be used without this, as folder:/path/to/it.
"""

from collections.abc import Sequence
import sys

from absl import logging
from etils import epath

from fd_jax import console, storage
from fd_jax.data import datasets
from fd_jax.errors import DataError, UserError


def prepare(name: str, *, data_dir: str | None = None, manual_dir: str | None = None) -> str:
    """Downloads a dataset if necessary and writes it as ArrayRecord files.

    Args:
      name: TFDS name of the dataset.
      data_dir: destination folder; None for the default of TFDS.
      manual_dir: folder with the files that cannot be downloaded (the tar files of ImageNet).

    Returns:
      A line with the number of examples in each split and the folder.

    Raises:
      DataError: the dataset does not exist, or its files are missing.
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
    """Refuses missing files: TFDS would silently leave out the splits that need them."""
    files = datasets.MANUAL_FILES.get(name, ())
    missing = [
        file for file in files if not (manual_dir and (epath.Path(manual_dir) / file).exists())
    ]
    if missing:
        reason = (
            f"{manual_dir} does not hold" if manual_dir else "--manual_dir must name a folder with"
        )
        raise DataError(f"{name} cannot be prepared: {reason} {', '.join(missing)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = console.parser("python -m fd_jax.data.prepare", __doc__)
    parser.add_argument("--name", required=True, help="TFDS name")
    parser.add_argument("--data_dir", help="destination; by default that of TFDS")
    parser.add_argument("--manual_dir", help="folder with files that cannot be downloaded")
    args = parser.parse_args(argv)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # TFDS warns of the folder that it is about to fill
    try:
        if not sys.stderr.isatty():
            _hide_bars()
        with storage.one_message(args.data_dir or "the data folder of TFDS"):
            print(prepare(args.name, data_dir=args.data_dir, manual_dir=args.manual_dir))
    except (UserError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        logging.set_verbosity(verbosity)
    return 0


def _hide_bars() -> None:
    """In a file, bars are hundreds of torn lines."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
