"""Reads zip archives (torch zip files, TorchScript, npz) without unpacking them."""

from pathlib import Path
import struct
import zipfile
import zlib

from fd_jax.convert.containers.tensors import MappedFile, damaged
from fd_jax.errors import ConversionError

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")

# What a damaged archive makes `zipfile` and `zlib` raise.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    LookupError,
    ValueError,  # covers Unicode errors
    OverflowError,
    RuntimeError,  # encrypted entries; covers NotImplementedError
)


class MappedZip:
    """A zip archive whose stored (not compressed) entries are read in place."""

    def __init__(self, path: Path):
        self.path = path
        self.file = MappedFile(path)
        try:
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
        except DAMAGE as error:
            raise damaged(path, f"the zip directory cannot be read ({error!s:.80})") from error
        self.entries = {info.filename: info for info in infos}
        self._sound: set[str] = set()  # entries whose checksum was right
        if len(self.entries) != len(infos):
            raise damaged(path, "an entry occurs twice in the zip directory")

    def stored(self, name: str) -> tuple[int, int]:
        """Position and length of a stored entry's bytes in the file."""
        info = self.entries.get(name)
        if info is None:
            raise damaged(self.path, f"the zip entry {name!r} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ConversionError(f"{self.path}: the zip entry {name!r} is compressed or encrypted")
        what = f"the zip entry {name!r}"
        header = self.file.bytes(info.header_offset, _LOCAL_HEADER.size, what)
        magic, *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        if magic != b"PK\x03\x04":
            raise damaged(self.path, f"{what} has no local header")
        start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if start + info.file_size > self.file.size:
            raise damaged(self.path, f"{what} reaches past the end of the file")
        return start, info.file_size

    def read(self, name: str) -> bytes:
        """All bytes of a stored entry, checked against its checksum."""
        start, length = self.stored(name)
        data = self.file.bytes(start, length, f"the zip entry {name!r}")
        self.check(name, data)
        return data

    def check(self, name: str, data: bytes | memoryview) -> None:
        """Compares an entry's bytes with its CRC-32, once; writers that skip the sum leave it 0."""
        expected = self.entries[name].CRC
        if expected and name not in self._sound and zlib.crc32(data) != expected:
            raise damaged(self.path, f"the zip entry {name!r} does not match its checksum")
        self._sound.add(name)

    def open(self, name: str):
        """A stream of an entry that may be compressed."""
        try:
            return zipfile.ZipFile(self.path).open(self.entries[name])
        except DAMAGE as error:
            raise damaged(self.path, f"the zip entry {name!r} cannot be read ({error})") from error
