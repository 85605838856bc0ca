"""Small files that are whole at any time."""

from etils import epath


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file beside its place and moves it there: a kill leaves the old or the new one."""
    staging = path.with_name(f"{path.name}.new")
    staging.write_text(text)
    staging.replace(path)
