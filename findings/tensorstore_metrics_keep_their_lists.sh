#!/usr/bin/env bash
# tensorstore 0.1.86: every call of experimental_collect_matching_metrics leaves the lists that it made
# behind, for ever.
#
# A metric is a dict whose "values" are a list; that list has one reference more than it has owners, so
# that deleting the result frees the dict and not the list. Orbax 0.12.8 asks twice for each checkpoint
# that it saves and once for each that it restores, to report bytes per second, at every logging level:
# 24 lists for each save, about 16 kB, in a training process that never asked for metrics. It is small,
# but it is not flat, and a search for a leak finds it in no Python object's owner.
#
# Seen with CPython 3.11:
#   1,000 calls: 12,999 lists stay (13 metrics in each result)
#   400 checkpoints of orbax: 9,600 lists stay, and the process grows by 40 kB for each
set -euo pipefail
PYTHON=${PYTHON:-python3.11}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$PYTHON" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  tensorstore==0.1.86 orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 2>/dev/null

cat > "$folder/calls.py" <<'PY'
import gc

import tensorstore


def lists():
    gc.collect()
    return sum(type(thing) is list for thing in gc.get_objects())


store = {"driver": "zarr", "kvstore": "memory://a", "metadata": {"dtype": "<f4", "shape": [4]}}
tensorstore.open(store, create=True).result()[...] = 1
# The first calls register metrics that later ones return as well.
metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/")
before = lists()
for _ in range(1000):
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/")
count = len(metrics)
del metrics
kept = lists() - before
print(f"1,000 calls: {kept:,} lists stay ({count} metrics in each result)")
assert kept > 900 * count, kept
PY
cat > "$folder/saves.py" <<'PY'
import gc
import pathlib
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp


def values():
    gc.collect()
    things = (thing for thing in gc.get_objects() if type(thing) is list and len(thing) == 1)
    return sum(type(thing[0]) is dict and not {"value", "count"}.isdisjoint(thing[0]) for thing in things)


def resident():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


tree = {f"weights{i}": jnp.ones((32, 32)) for i in range(60)}
with ocp.CheckpointManager(
    pathlib.Path(sys.argv[1]), options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
) as manager:
    for step in range(600):
        manager.save(step, args=ocp.args.PyTreeSave(tree))
        manager.wait_until_finished()
        if step == 199:
            before, small = values(), resident()
    kept, grown = values() - before, (resident() - small) / 400
print(f"400 checkpoints of orbax: {kept:,} lists stay, and the process grows by {grown:.0f} kB for each")
assert kept >= 400, kept
assert grown > 10, grown
PY
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/calls.py" 2>/dev/null
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/saves.py" "$folder/checkpoints" 2>/dev/null
