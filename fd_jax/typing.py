"""Names for types whose contents cannot be checked statically."""

from typing import Any

import jax

Config = Any  # ml_collections.ConfigDict; the types of its fields are only known at run time
PyTree = Any  # nested dicts of arrays, or of their shapes
Batch = dict[str, Any]  # image uint8 [B, H, W, 3], label int32 [B], weight float32 [B], ...
# Name -> (sum, count); both are added up over steps, devices and hosts, and divided once.
Metrics = dict[str, tuple[jax.Array, jax.Array]]
