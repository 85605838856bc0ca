#!/usr/bin/env bash
# XLA can compile ahead of time for an NVIDIA GPU without the GPU. jax documents this for TPUs only,
# and the error message does not lead to the right options (jax 0.11.2, jax-cuda13-plugin 0.11.2).
#
# 1. get_topology_desc(platform="cuda", ...) reports "No visible GPU devices", even with some of the
#    obvious ways to give a target_config. It works with two options: `topology` ("slices x hosts x
#    GPUs" without spaces) and `target_config`, the text of XLA's GpuTargetConfigProto with the
#    numbers that the CUDA runtime reports for the GPU.
# 2. A program with cuDNN attention compiles and contains __cudnn$fmha calls; memory_analysis() works.
# 3. cost_analysis() returns None here; on the CPU and on TPUs it returns FLOPs and bytes.
# 4. Matmuls stay with Triton: without a GPU nothing is timed, so no alternative is chosen.
#
# Observed: 1. FAILED_PRECONDITION: No visible GPU devices.   2. __cudnn$fmhaSoftmax, temporaries > 0
# 3. None
# Needs CPython 3.12 or later (set PYTHON to it) and downloads about 2 GB.
set -euo pipefail
PYTHON=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.11.2 jaxlib==0.11.2 numpy==2.5.5 'jax-cuda13-plugin[with-cuda]==0.11.2'

cat > "$folder/compile.py" <<'PY'
import re

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 patch: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  device_memory_size: 84942979072 memory_bandwidth: 3352320000000
}
"""
try:
    topologies.get_topology_desc(platform="cuda", topology_name="1x1x1")
except Exception as error:
    print(str(error).splitlines()[0])
target = topologies.get_topology_desc(
    platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100
)
print(target.devices[0].device_kind)
sharding = SingleDeviceSharding(target.devices[0])
q = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16, sharding=sharding)


def attend(q):
    return jax.nn.dot_product_attention(q, q, q, implementation="cudnn")


compiled = jax.jit(attend).lower(q).compile()
print(*set(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text())))
print("temporaries", compiled.memory_analysis().temp_size_in_bytes >= 0)
print("cost_analysis", compiled.cost_analysis())
PY
JAX_PLATFORMS=cpu "$folder/env/bin/python" "$folder/compile.py" 2>/dev/null | tee "$folder/seen.txt"
grep -qx 'FAILED_PRECONDITION: No visible GPU devices.' "$folder/seen.txt"
grep -qx 'NVIDIA H100 80GB HBM3' "$folder/seen.txt"
grep -qx '__cudnn$fmhaSoftmax' "$folder/seen.txt"
grep -qx 'cost_analysis None' "$folder/seen.txt"
echo "as described"
