#!/usr/bin/env bash
# tokamax 0.0.12 (fused attention for GPUs): three properties that its metadata does not mention.
#
# 1. It declares jax>=0.9.2. With jax 0.11.2 its Triton attention does not trace, because it calls
#    pl.dot, which jax 0.11 has removed from jax.experimental.pallas (AttributeError).
# 2. With jax 0.10.2 the same kernel traces and lowers for CUDA, without a GPU.
# 3. It reads its settings from absl's flags at the first call. If the program has not parsed them,
#    tokamax parses sys.argv itself, so a program with command-line options of its own fails with
#    UnrecognizedFlagError inside the call to attention. flags.FLAGS.mark_as_parsed() avoids that.
#
# Observed: 1. AttributeError ... pl.dot   2. __gpu$xla.gpu.triton   3. UnrecognizedFlagError
# Needs CPython 3.12 or later (for jax 0.11); set PYTHON to it.
set -euo pipefail
PYTHON=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/lower.py" <<'PY'
import re

from absl import flags
import jax
import jax.numpy as jnp
import tokamax
from tokamax._src import config

flags.FLAGS.mark_as_parsed()
q = jax.ShapeDtypeStruct((2, 197, 4, 64), jnp.bfloat16)
bias = jax.ShapeDtypeStruct((1, 4, 197, 197), jnp.bfloat16)


def attend(q, bias):
    return tokamax.dot_product_attention(q, q, q, bias=bias, implementation="triton")


try:
    with config.cross_compile(True):
        text = jax.jit(attend).trace(q, bias).lower(lowering_platforms=("cuda",)).as_text()
    print(jax.__version__, *set(re.findall(r"custom_call @([\w$.]+)", text)))
except AttributeError as error:
    print(jax.__version__, "AttributeError", str(error).split(" was")[0])
PY

cat > "$folder/flags.py" <<'PY'
import jax.numpy as jnp
import tokamax

q = jnp.ones((1, 8, 1, 16))
try:
    tokamax.dot_product_attention(q, q, q, implementation="xla")
    print("no error")
except Exception as error:
    print(type(error).__name__)
PY

export JAX_PLATFORMS=cpu
install_and_lower() {  # version of jax, of flax
  "$PYTHON" -m venv "$folder/$1"
  "$folder/$1/bin/pip" install --quiet --disable-pip-version-check \
    "jax==$1" "jaxlib==$1" "flax==$2" tokamax==0.0.12 qwix==0.1.8 numpy==2.4.6
  "$folder/$1/bin/python" "$folder/lower.py" 2>/dev/null | tee "$folder/$1.txt"
}
install_and_lower 0.11.2 0.12.12
install_and_lower 0.10.2 0.12.8
"$folder/0.10.2/bin/python" "$folder/flags.py" --my_option=1 2>/dev/null | tee "$folder/flags.txt"

grep -qx '0.11.2 AttributeError pl.dot' "$folder/0.11.2.txt"
grep -qx '0.10.2 __gpu$xla.gpu.triton' "$folder/0.10.2.txt"
grep -qx 'UnrecognizedFlagError' "$folder/flags.txt"
echo "as described"
