"""Every source, shrunk: a file of the real structure gives the features of the torch model."""

import functools

import jax
import numpy as np
import pytest

from fd_jax.convert import importing, sources
from flax import nnx
from tests.convert import oracles, synthetic

# The oracle of a source's default part, and where its tensors stand in the file.
ORACLES = {
    "openai_clip": oracles.clip_openai,
    "open_clip": oracles.clip_openai,
    "hf_clip": oracles.clip,
    "dino_vit": oracles.vit,
    "deit": oracles.vit,
    "mae": oracles.vit,
}
