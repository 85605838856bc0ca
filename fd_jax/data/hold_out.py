"""Divides a folder of pictures into those to train on and those that are held out.

    python -m fd_jax.data.hold_out --input=pictures --output=pictures_split

The output has the folders `train` and `val`, with the sub-folders of the input. They hold links to
the pictures, which stay where they are. Of every class, each fifth picture in the order of names is
held out, and at least one of two. Neighbours that are nearly the same, such as frames of a film,
end up on both sides and flatter the figures: divide those by hand.
"""

from collections.abc import Sequence
import os
import shutil
import sys

from etils import epath

from fd_jax import console
from fd_jax.data import folders
from fd_jax.errors import DataError, UserError

SPLITS = ("train", "val")


def hold_out(source: epath.PathLike, output: epath.PathLike, *, every: int = 5) -> dict[str, int]:
    """Writes the two folders of links, or nothing if it fails.

    Args:
      source: folder of pictures, on a file system with links.
      output: folder to make.
      every: one of so many pictures of a class is held out.

    Returns:
      Number of pictures by split.

    Raises:
      DataError: there are no pictures, the output exists or is inside of the source, or no class
        has two pictures.
    """
    contents = folders.index(source)
    _check(contents.folder, os.fspath(output), every)
    splits = _divide(contents.files, every)
    if not splits["val"]:
        raise DataError(f"{source}: no class has two pictures, so none can be held out")
    staging = f"{os.fspath(output).rstrip('/')}.incomplete"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        for split, paths in splits.items():
            for path in paths:
                link = os.path.join(staging, split, os.path.relpath(path, contents.folder))
                os.makedirs(os.path.dirname(link), exist_ok=True)
                os.symlink(os.path.abspath(path), link)
        os.rename(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return {split: len(paths) for split, paths in splits.items()}


def _check(source: str, output: str, every: int) -> None:
    if every < 2:
        raise DataError(f"--every={every}: expected 2 or more, or no picture is left to train on")
    if "://" in source or "://" in output:
        raise DataError("links can only be made on a local disk; in a bucket, copy the pictures")
    if os.path.lexists(output):
        raise DataError(f"{output} exists and is not overwritten; name another folder")
    inside = os.path.realpath(output)
    if os.path.commonpath([inside, os.path.realpath(source)]) == os.path.realpath(source):
        raise DataError(
            f"{output} is inside of {source}, where its folders would become classes; name a "
            "folder beside it"
        )


def _divide(files: Sequence[tuple[str, int]], every: int) -> dict[str, list[str]]:
    """Paths by split; the files of a class come one after the other."""
    classes: dict[int, list[str]] = {}
    for path, label in files:
        classes.setdefault(label, []).append(path)
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for paths in classes.values():
        held = set(paths[every - 1 :: every] or paths[1:][-1:])
        for path in paths:
            splits["val" if path in held else "train"].append(path)
    return splits


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = console.parser("python -m fd_jax.data.hold_out", __doc__)
    parser.add_argument("--input", required=True, help="folder of pictures")
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument(
        "--every", type=int, default=5, help="one of so many is held out; default: 5"
    )
    args = parser.parse_args(argv)
    try:
        counts = hold_out(args.input, args.output, every=args.every)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    listed = ", ".join(f"{count} in {args.output}/{split}" for split, count in counts.items())
    print(f"links to pictures: {listed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
