"""What a folder of pictures holds: its pictures, its classes, and what is not read."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import os
from typing import NamedTuple

from etils import epath

from fd_jax.data import decoding
from fd_jax.errors import DataError, first_few, printable

# Names of folders that hold a split and not a class.
SPLITS = frozenset({"train", "training", "validation", "val", "valid", "test", "testing"})


@dataclasses.dataclass(frozen=True)
class Contents:
    """The pictures under a folder, and what is not read.

    Attributes:
      folder: the folder.
      files: (path, label) of each picture; the label is -1 without classes.
      class_names: names of the sub-folders that hold pictures, sorted; None if there are none.
      empty: names of the sub-folders that hold none.
      unread: number of files that look like pictures and are not read, by suffix or kind.
    """

    folder: str
    files: list[tuple[str, int]]
    class_names: tuple[str, ...] | None
    empty: tuple[str, ...]
    unread: dict[str, int]

    def __str__(self) -> str:
        """One line for people."""
        classes = len(self.class_names or ())
        parts = [
            f"{len(self.files):,} pictures",
            f"{classes:,} classes" if classes else "no classes",
        ]
        if self.unread:
            counts = [f"{kind} ({count:,})" for kind, count in sorted(self.unread.items())]
            parts.append(f"not read: {', '.join(counts)}")
        if self.empty:
            parts.append(f"without a picture: {first_few(self.empty, 10)}")
        parts += filter(None, [self.doubt])
        return printable(f"{self.folder}: {'; '.join(parts)}")

    @property
    def doubt(self) -> str:
        """What to do where the classes have the names of splits, so that all of these are read."""
        if len(self.class_names or ()) < 2 or not SPLITS.issuperset(self.class_names or ()):
            return ""
        names = first_few(self.class_names or (), len(SPLITS))
        return (
            f"note: these classes look like splits ({names}), and all of them are read; name the "
            "folder of one, or in a config {split} in its place"
        )


class _Listing(NamedTuple):
    """What is in a folder itself, without what is hidden.

    Attributes:
      path: the folder.
      files: names of its files.
      folders: names of its folders, and whether each is a link.
      others: kind of each picture that is no file.
    """

    path: str
    files: list[str]
    folders: dict[str, bool]
    others: list[str]


def index(folder: epath.PathLike, *, skip: Sequence[str] = ()) -> Contents:
    """Lists the pictures under a folder, at any depth and through links.

    Hidden files and folders, and what macOS adds to archives, are nowhere part of the data. Within
    a class every folder is read once, whatever links lead to it.

    Args:
      folder: the folder, local or in a bucket.
      skip: endings of the names of files to leave out.

    Raises:
      DataError: it is no folder, it holds no picture, a folder cannot be listed, or there are
        pictures beside class folders.
    """
    root = epath.Path(folder)
    if not root.is_dir():
        found = ", which is a file: name the folder it is in" if root.exists() else ""
        raise DataError(f"no folder of images at {folder}{found}")
    top = _list(str(root))
    unread: Counter[str] = Counter()
    loose = _pictures([top], unread)
    parents = _with_parents(os.path.realpath(root))
    pictures = {
        name: _pictures(_walk(top, name, set(parents)), unread) for name in sorted(top.folders)
    }
    classes = tuple(name for name, paths in pictures.items() if paths)
    _check_loose(root, loose, classes)
    groups = [pictures[name] for name in classes] or [loose]
    contents = Contents(
        folder=str(root),
        files=[
            (path, label if classes else -1)
            for label, paths in enumerate(groups)
            for path in paths
            if not path.endswith(tuple(skip))
        ],
        class_names=classes or None,
        empty=tuple(name for name, paths in pictures.items() if not paths),
        unread=dict(unread),
    )
    if not contents.files:
        details = f"; {contents}" if unread else ""
        raise DataError(f"no images ({', '.join(decoding.SUFFIXES)}) under {folder}{details}")
    return contents


def _check_loose(root: epath.Path, loose: Sequence[str], classes: Sequence[str]) -> None:
    if classes and loose:
        raise DataError(
            f"{root} has {len(loose)} images ({epath.Path(loose[0]).name}...) next to its "
            f"{len(classes)} class folders; move each image into a class folder, or name a folder "
            "without sub-folders"
        )


def _with_parents(path: str) -> set[str]:
    """A folder and all that it is in: a link to one of them would lead round in a loop."""
    found = {path}
    while (parent := os.path.dirname(path)) != path:
        found.add(parent)
        path = parent
    return found


def _walk(parent: _Listing, name: str, seen: set[str]) -> Iterator[_Listing]:
    """The listings of a folder and of all below it, each real folder once.

    Args:
      parent: listing of the folder that this one is in.
      name: name of the folder.
      seen: real paths of folders that are not to be read, to which those that are read are added.
    """
    path = f"{parent.path}/{name}"
    real = os.path.realpath(path)
    if real in seen:
        return
    seen.add(real)
    listing = _list(path)
    yield listing
    # Links come last, so that the pictures of a folder that is there anyway keep its path.
    for child in sorted(listing.folders, key=lambda child: (listing.folders[child], child)):
        yield from _walk(listing, child, seen)


def _list(path: str) -> _Listing:
    if "://" in path:  # a bucket, which has no links
        _, folders, files = next(epath.Path(path).walk())
        visible = {name: False for name in folders if not _is_hidden(name)}
        return _Listing(path, [name for name in files if not _is_hidden(name)], visible, [])
    listing = _Listing(path, [], {}, [])
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if not _is_hidden(entry.name):
                    _sort_in(entry, listing)
    except OSError as error:
        raise DataError(f"the folder {path} cannot be listed: {error.strerror}") from error
    return listing


def _sort_in(entry: os.DirEntry[str], listing: _Listing) -> None:
    try:
        is_folder, is_file = entry.is_dir(), entry.is_file()
    except OSError:  # a link to itself
        is_folder = is_file = False
    if is_folder:
        listing.folders[entry.name] = entry.is_symlink()
    elif is_file:
        listing.files.append(entry.name)
    elif entry.name.lower().endswith(decoding.SUFFIXES):
        listing.others.append("broken link" if entry.is_symlink() else "special file")


def _is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the data."""
    return name.startswith(".") or name == "__MACOSX"  # the latter comes from archives of macOS


def _pictures(listings: Iterable[_Listing], unread: Counter[str]) -> list[str]:
    """The sorted paths of the files that are read.

    What looks like a picture and is not read is added to `unread`, by suffix or kind.
    """
    paths = []
    for listing in listings:
        unread.update(listing.others)
        for name in listing.files:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in decoding.SUFFIXES:
                paths.append(f"{listing.path}/{name}")
            elif suffix in decoding.UNREAD_SUFFIXES:
                unread[suffix] += 1
    return sorted(paths)
