#!/usr/bin/env bash
# jax 0.10.2: multihost_utils.process_allgather and broadcast_one_to_all cut 64-bit numpy arrays to
# 32 bits, without a word.
#
# Both take numpy arrays of the host and return numpy arrays, but go through JAX arrays, which have
# 32 bits unless jax_enable_x64 is set. Counts of pixels, bytes or tokens that are exchanged between
# processes come back modulo 2^32, and float64 loses its digits. With a single process the same call
# returns the array as it is, so that a test on one machine does not show it. Two halves of 31 bits
# pass unharmed.
#
# Observed, with two processes: 5000000000 -> 705032704 int32 from both; 0.1 -> float32.
# With one process: 5000000000 int64. No warning in either case.
set -euo pipefail
PYTHON=${PYTHON:-python3.11}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$PYTHON" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2

cat > "$folder/exchange.py" <<'PY'
import sys
import warnings

import jax
from jax.experimental import multihost_utils
import numpy as np

warnings.simplefilter("error")
count, process, port = map(int, sys.argv[1:])
if count > 1:
    jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=process)
sent = np.array([5_000_000_000], np.int64)
gathered = multihost_utils.process_allgather(sent).ravel()
broadcast = multihost_utils.broadcast_one_to_all(sent).ravel()
floats = multihost_utils.process_allgather(np.array([0.1], np.float64)).ravel()
if process == 0:
    print(f"{count} processes: {gathered[0]} {gathered.dtype}, {broadcast[0]} {broadcast.dtype}, "
          f"{floats.dtype}")
    kept = (gathered[0], broadcast[0], floats.dtype) == (5_000_000_000, 5_000_000_000, np.float64)
    cut = (gathered[0], broadcast[0], floats.dtype) == (705032704, 705032704, np.float32)
    assert kept if count == 1 else cut
PY
export JAX_PLATFORMS=cpu
"$folder/venv/bin/python" "$folder/exchange.py" 1 0 0
port=$("$folder/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
"$folder/venv/bin/python" "$folder/exchange.py" 2 1 "$port" &
"$folder/venv/bin/python" "$folder/exchange.py" 2 0 "$port"
wait
