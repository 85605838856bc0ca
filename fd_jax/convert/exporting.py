"""A model folder in, a file or folder for other libraries out."""

import os
from pathlib import Path
import shutil

from etils import epath

from fd_jax import model_folder
from fd_jax.convert import trees
from fd_jax.convert.family import Written
from fd_jax.convert.formats import FORMATS
from fd_jax.errors import ConversionError


def export(
    format: str, folder: epath.PathLike, output: str | os.PathLike[str], *, overwrite: bool = False
) -> Written:
    """Writes a model folder in another format; complete or not at all.

    Args:
      format: a key of FORMATS.
      folder: model folder to read.
      output: file to write, or folder for "huggingface" and "timm".
      overwrite: whether what is there is replaced.

    Returns:
      What was left behind, and how the output is opened.

    Raises:
      ConversionError: the format cannot hold this network, or the output exists.
      ModelFolderError: there is no model folder to read.
    """
    if format not in FORMATS:
        raise ConversionError(f"format {format!r}; expected one of {', '.join(FORMATS)}")
    output = Path(output)
    _check_free(output, format, overwrite=overwrite)
    if Path(folder).is_file():
        raise ConversionError(
            f"{folder} is a file; `import` makes a model folder of it, which `export` then reads"
        )
    spec, params = model_folder.load(folder)
    staging, replaced = (output.parent / f".{output.name}.{x}" for x in ("incomplete", "replaced"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove(staging)
        written = FORMATS[format].write(spec, trees.flat(params), staging)
        if output.is_dir():  # steps aside whole: a kill never leaves half of it
            _remove(replaced)
            output.rename(replaced)
        staging.replace(output)
        _remove(replaced)
    except OSError as error:
        raise ConversionError(f"{output}: cannot be written ({error.strerror})") from error
    finally:
        _remove(staging)
    remarks = [remark.replace(str(staging), str(output)) for remark in written.remarks]
    return Written(written.left, remarks)


def _check_free(output: Path, format: str, *, overwrite: bool) -> None:
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise ConversionError(f"{output} exists and is not overwritten; pass --overwrite to do so")
    if FORMATS[format].folder:
        if not (output / "config.json").exists():
            raise ConversionError(
                f"{output} is no {FORMATS[format].folder} folder, so it is not overwritten"
            )
    elif not output.is_file():
        raise ConversionError(f"{output} is not a file, so it is not overwritten; name a file")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
