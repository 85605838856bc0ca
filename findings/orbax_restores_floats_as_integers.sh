#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: restoring into another kind of numbers casts without a word.
#
# A tree is saved with a float32 array and an int32 counter, and restored with abstract arrays whose
# dtypes are int32 and int8, as happens when the state that a program expects has changed. Neither
# an error nor a warning appears: fractions are cut off, and 70000 wraps to 112. A program has to
# compare dtypes itself, with the metadata of the checkpoint, before it restores.
#
# Observed: [0 0 1] int32 and 112 int8, no warning.
set -euo pipefail
PYTHON=${PYTHON:-python3.11}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$PYTHON" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 orbax-checkpoint==0.12.8

cat > "$folder/cast.py" <<'PY'
import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

path = pathlib.Path(sys.argv[1]) / "saved"
with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(path, {"weight": jnp.array([0.25, 0.75, 1.5]), "count": jnp.int32(70000)})
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        "weight": jax.ShapeDtypeStruct((3,), jnp.int32, sharding=sharding),
        "count": jax.ShapeDtypeStruct((), jnp.int8, sharding=sharding),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = checkpointer.restore(
            path, item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)
        )
print(found["weight"], found["weight"].dtype, found["count"], found["count"].dtype)
PY

output=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/cast.py" "$folder" 2>/dev/null)
echo "$output"
[ "$output" = "[0 0 1] int32 112 int8" ]
