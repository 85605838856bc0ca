"""Atomic writes of small files."""

from etils import epath


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file under another name and renames it, so a kill leaves the old or the new one."""
    staging = path.with_name(f"{path.name}.new")
    staging.write_text(text)
    staging.replace(path)
