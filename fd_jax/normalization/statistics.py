"""The file of a teacher's statistics that `python -m fd_jax.target_stats` writes."""

from collections.abc import Mapping
import dataclasses
import io
import json
from typing import Any
import zipfile

from etils import epath
import numpy as np

from fd_jax import files, model_folder
from fd_jax.errors import ConfigError
from fd_jax.models.spec import ModelSpec
from fd_jax.normalization.spectrum import Spectrum

ABOUT = "about"
_ARRAYS = ("tokens", "mean", "values", "vectors")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Of which tokens the statistics are. Statistics of one origin do not fit another.

    Attributes:
      source: where the teacher's weights come from, see `ModelSpec.source`.
      weights: digest of its weights.
      image_size: side of its input in pixels.
      stages: number of its first stages that ran; 0 for all.
      after_norm: whether its final norm was applied.
    """

    source: str
    weights: int
    image_size: int
    stages: int
    after_norm: bool

    @classmethod
    def of(cls, folder: str, spec: ModelSpec, *, stages: int, after_norm: bool) -> "Origin":
        """That of the teacher in a model folder, which runs as `spec` says."""
        size, weights = spec.arch["image_size"], model_folder.digest_of_weights(folder)
        return cls(spec.source, weights, size, stages, after_norm)


def save(
    path: epath.Path, origin: Origin, spectra: Mapping[str, Spectrum], *, data: Mapping[str, Any]
) -> None:
    """Writes a file of statistics, completely or not at all.

    Args:
      path: file whose name ends in .npz.
      origin: of which teacher they are.
      spectra: by group of tokens: "cls" the class tokens, "patch" the patches, "gap" their means.
      data: which pictures were measured, as plain values; for information only.
    """
    about = {"version": 1, "origin": dataclasses.asdict(origin), "data": dict(data)}
    arrays = {
        f"{group}/{name}": np.asarray(getattr(spectrum, name))
        for group, spectrum in spectra.items()
        for name in _ARRAYS
    }
    content = io.BytesIO()
    np.savez(content, **{ABOUT: np.array(json.dumps(about)), **arrays})  # type: ignore[arg-type]
    files.write_bytes(path, content.getvalue())


def load(path: epath.PathLike, wanted: Origin) -> dict[str, Spectrum]:
    """Reads the statistics of a teacher, by group of tokens.

    Raises:
      ConfigError: there is no such file, it is damaged, or it holds those of another teacher.
    """
    origin, spectra = _read(epath.Path(path))
    found, expected = dataclasses.asdict(origin), dataclasses.asdict(wanted)
    differ = [name for name in expected if found[name] != expected[name]]
    if differ:
        lines = [f"  {name}: measured {found[name]!r}, here {expected[name]!r}" for name in differ]
        raise ConfigError(
            f"the statistics in {path} are of other tokens than this run's teacher has:\n"
            + "\n".join(lines)
            + "\nmeasure this teacher with python -m fd_jax.target_stats"
        )
    return spectra


def _read(path: epath.Path) -> tuple[Origin, dict[str, Spectrum]]:
    if not path.exists():
        raise ConfigError(
            f"there are no statistics at {path}; python -m fd_jax.target_stats --teacher=DIR "
            f"--data=NAME --output={path} measures them"
        )
    try:
        with np.load(io.BytesIO(files.read_bytes(path, any_size=True))) as found:
            arrays = {name: found[name] for name in found.files}
        origin = Origin(**json.loads(str(arrays.pop(ABOUT)))["origin"])
        groups = {name.partition("/")[0] for name in arrays}
        return origin, {group: _spectrum(arrays, group) for group in sorted(groups)}
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{path} is no file of statistics, or is damaged ({error}); write it again with "
            "python -m fd_jax.target_stats"
        ) from error


def _spectrum(arrays: Mapping[str, np.ndarray], group: str) -> Spectrum:
    tokens, *rest = (arrays[f"{group}/{name}"] for name in _ARRAYS)
    mean, values, vectors = (np.asarray(value, np.float64) for value in rest)
    width = len(mean)
    if values.shape != (width,) or vectors.shape != (width, width):
        raise ValueError(f"{group} has the shapes {mean.shape}, {values.shape}, {vectors.shape}")
    return Spectrum(int(tokens), mean, values, vectors)
