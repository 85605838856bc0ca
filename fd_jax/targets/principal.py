"""The directions along which most of a teacher's tokens lie, for maps that are stored in them."""

import numpy as np

from fd_jax.normalization.kinds import SMALLEST_SHARE
from fd_jax.normalization.spectrum import Spectrum


def constants(spectrum: Spectrum, components: int) -> dict[str, np.ndarray]:
    """The constants of "pca_int8" for the tokens of a group, float32.

    Returns:
      "mean" [D] and "matrix" [C, D]: the first C principal directions, each times the deviation
      along it; 0 for those that are rounding noise.
    """
    values, vectors = spectrum.values[:components], spectrum.vectors[:, :components]
    kept = values > SMALLEST_SHARE * spectrum.values[0]
    deviations = np.sqrt(np.where(kept, values, 0.0))
    matrix = (vectors * deviations).T
    return {"mean": spectrum.mean.astype(np.float32), "matrix": matrix.astype(np.float32)}
