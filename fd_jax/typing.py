"""Names for what static types cannot see into."""

from typing import Any

import jax

Config = Any  # ml_collections.ConfigDict: the type of a field is known when it is read
PyTree = Any  # nested dicts of arrays, or of their shapes
Batch = dict[str, Any]  # image uint8 [B, H, W, 3], label int32 [B], weight float32 [B], ...
# Name -> (sum, count): metrics add up over steps, devices and hosts and are divided once.
Metrics = dict[str, tuple[jax.Array, jax.Array]]
