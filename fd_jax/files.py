"""Atomic writes of small files."""

from etils import epath


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file under another name and renames it, so a kill leaves the old or the new one."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Writes a binary file in the same way as `write_text`."""
    staging = path.with_name(f"{path.name}.new")
    staging.write_bytes(content)
    staging.replace(path)
