"""The device mesh, and the mesh axes over which arrays are split.

One table names the logical axes of each parameter, and another maps logical axes to mesh axes. A
parameter that does not match exactly one row of the first table is an error.
"""

from collections.abc import Callable, Sequence
import math
import re
from typing import Any

import jax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax

from fd_jax.errors import ConfigError, check_positive
from fd_jax.typing import PyTree

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axis.
RULES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor"}

# A teacher may have any name, and its projector is below projector/<name>.
_NO_TEACHER = "(?<!projector/)"

# Path pattern -> logical axes. Vectors, tables and tokens are small and are replicated.
PARAM_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"attn/qkv/kernel$", ("embed", None, "heads")),
    (r"attn/proj/kernel$", ("heads", "embed")),
    (r"mlp/(fc1|gate)/kernel$", ("embed", "mlp")),
    (r"mlp/fc2/kernel$", ("mlp", "embed")),
    # Low-rank updates, on the side where they meet what their layer meets.
    (r"(qkv|fc1|gate)/lora/a$", ("embed", None)),
    (r"qkv/lora/b$", (None, None, "heads")),
    (r"attn/proj/lora/a$", ("heads", None)),
    (r"mlp/(fc1|gate)/lora/b$", (None, "mlp")),
    (r"mlp/fc2/lora/a$", ("mlp", None)),
    (r"(proj|fc2)/lora/b$", (None, "embed")),
    (r"patch_embed/kernel$", (None, None, None, "embed")),
    (r"downsample/reduction/kernel$", ("embed", None)),
    (r"rel_pos_bias/fc[12]/kernel$", (None, None)),
    # One projector or one per teacher, of one layer or of several.
    (r"(^|/)(projector(/\w+)*|head|lift|widen)/kernel$", ("embed", None)),
    (r"(^|/)projector(/\w+)*/mixing$", ()),  # of a student's levels
    (rf"(^|/){_NO_TEACHER}projection/kernel$", ("embed", None)),  # of a pool
    # Of a segmenter, of a ResNet, and between the stages of a ConvNeXt. Inputs are split, because
    # numbers of classes have few divisors.
    (rf"(^|/){_NO_TEACHER}(conv|deconv\d?|classifier)/kernel$", (None, None, "embed", None)),
    (rf"(^|/){_NO_TEACHER}dwconv/kernel$", ()),  # 49 numbers per channel
    (
        r"(bias|scale|gamma|gamma_1|gamma_2|table|cls_token|pos_embed|register_tokens|latent)$",
        (),
    ),
    (r"norm/(mean|var)$", ()),  # of a ResNet's BatchNorms
    (r"(^|/)(statistics|decoder)/\w+/(mean|matrix)$", ()),  # of a teacher's tokens
)


def make_mesh(
    *, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Makes a (data, fsdp, tensor) mesh over all devices.

    With several TPU slices, the data axis spans the slices, so that only gradients cross them.

    Args:
      data: size of the data axis. Any one of the three sizes may be -1, for all remaining devices.
      fsdp: size of the fsdp axis.
      tensor: size of the tensor axis.
      devices: devices of the mesh; None for all devices.

    Raises:
      ConfigError: the product of the sizes is not the number of devices, or the data axis cannot
        span the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = resolve_mesh({"data": data, "fsdp": fsdp, "tensor": tensor}, len(devices))
    is_tpu = devices[0].platform == "tpu"
    # On GPUs every machine has its own slice_index, but there fsdp may span machines.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if is_tpu else 1
    if slices > 1:
        if shape[0] % slices:
            raise ConfigError(
                f"mesh.data={shape[0]} is not divisible by the {slices} slices it has to span"
            )
        within = (shape[0] // slices, *shape[1:])
        grid = _on_torus(
            mesh_utils.create_hybrid_device_mesh, within, (slices, 1, 1), devices=devices
        )
    elif is_tpu and not any(getattr(device, "core_on_chip", 0) for device in devices):
        grid = _on_torus(mesh_utils.create_device_mesh, shape, devices=devices)
    else:
        # Elsewhere the topology is flat, and the order of the devices keeps the rows of a host
        # together. This branch also handles two devices per chip, which is how the compiler
        # describes a v4 without hardware: jax places mesh axes over whole chips only.
        grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, AXES)


def _on_torus(create: Callable[..., np.ndarray], *shapes: tuple[int, ...], devices: Any):
    """Places each mesh axis over whole axes of the torus or, if impossible, over parts of them.

    For example, fsdp=16 on 8 x 8 chips is not a product of whole sides.
    """
    try:
        return create(*shapes, devices=devices)
    except NotImplementedError:
        return create(*shapes, devices=devices, allow_split_physical_axes=True)


def resolve_mesh(sizes: dict[str, int], devices: int) -> tuple[int, int, int]:
    """Replaces -1 by the number of remaining devices and checks the sizes.

    Args:
      sizes: sizes by name of the axis: data, fsdp and tensor.
      devices: number of devices.

    Returns:
      The sizes (data, fsdp, tensor).

    Raises:
      ConfigError: a size is invalid, or the product is not the number of devices.
    """
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    unknown = [axis for axis, size in sizes.items() if size == -1]
    wanted = " x ".join(f"{axis}={sizes[axis]}" for axis in AXES)
    if len(unknown) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"mesh {wanted}: sizes must be positive, and at most one may be -1")
    if devices % fixed or (not unknown and fixed != devices):
        raise ConfigError(
            f"mesh {wanted} does not fit {devices} devices; the product must be {devices}"
        )
    data, fsdp, tensor = (devices // fixed if sizes[axis] == -1 else sizes[axis] for axis in AXES)
    return data, fsdp, tensor


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Refuses a global batch that does not split evenly over devices and micro-batches.

    Args:
      batch_size: number of examples in the global batch.
      accumulation: number of micro-batches.
      mesh: device mesh.

    Raises:
      ConfigError: a number is below 1, or the batch does not split evenly; the message suggests
        sizes that do.
    """
    check_positive("batch_size", batch_size)
    check_positive("accumulation", accumulation)
    shards = batch_parts(mesh)
    if batch_size % (shards * accumulation):
        multiple = shards * accumulation
        lower = batch_size // multiple * multiple
        suggestion = f"{lower} or {lower + multiple}" if lower else multiple
        raise ConfigError(
            f"batch_size {batch_size} is not divisible by {shards} batch shards "
            f"(mesh data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}) x {accumulation} "
            f"micro-batches; use {suggestion}"
        )


def check_examples(examples: int, mesh: Mesh) -> None:
    """Refuses data of which not every device gets an example.

    Raises:
      ConfigError: a batch has more parts than there are examples.
    """
    parts = batch_parts(mesh)
    if examples < parts:
        raise ConfigError(
            f"there are {examples} training pictures, fewer than the {parts} devices over which a "
            "batch is split; use more pictures, or fewer devices (CUDA_VISIBLE_DEVICES=0)"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: examples are split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts `batch_sharding` splits a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place(host: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Puts an array that all processes hold onto the devices of all of them."""
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def param_shardings(params: PyTree, mesh: Mesh) -> PyTree:
    """Returns the sharding of every parameter in a tree of arrays or shapes.

    Raises:
      ValueError: a parameter does not match exactly one row of PARAM_AXES.
      ConfigError: a dimension is not divisible by its mesh axis.
    """

    def sharding_of(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, _partition(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding_of, params)


def optimizer_shardings(
    tx: optax.GradientTransformation, opt_state: PyTree, params: PyTree, mesh: Mesh
) -> PyTree:
    """Returns the shardings of an optimizer state.

    State with the shape of a parameter is sharded like it; counters and factored moments are
    replicated.
    """
    whole = replicated(mesh)

    def like_param(leaf, param, sharding):
        return sharding if leaf.shape == param.shape else whole

    return optax.tree_map_params(
        tx,
        like_param,
        opt_state,
        params,
        param_shardings(params, mesh),
        transform_non_params=lambda _: whole,
    )


def barrier(name: str) -> None:
    """Waits until all processes have reached this point; does nothing in a single process."""
    if jax.process_count() > 1:  # otherwise one process would compile an exchange with itself
        multihost_utils.sync_global_devices(name)


def gathered(value: PyTree) -> np.ndarray:
    """The values of all processes, along a new first axis; all of them call this."""
    if jax.process_count() == 1:
        return np.asarray(value)[None]
    return np.asarray(multihost_utils.process_allgather(value))


def anywhere(flag: bool) -> bool:
    """Whether a flag is set in any process; all of them call this."""
    return bool(gathered(np.int32(flag)).any())


def first_decides(flag: bool) -> bool:
    """The flag of the first process; all of them call this."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.int32(flag)))


def _partition(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    rows = [axes for pattern, axes in PARAM_AXES if re.search(pattern, name)]
    if len(rows) != 1:
        raise ValueError(
            f"parameter {name} {shape} matches {len(rows)} rows of PARAM_AXES; expected exactly one"
        )
    axes = [None if axis is None else RULES[axis] for axis in rows[0]]
    if axes and len(axes) != len(shape):
        raise ValueError(f"parameter {name} has shape {shape}, but its row has {len(axes)} axes")
    for size, axis in zip(shape, axes, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise ConfigError(
                f"{name} {shape}: {size} is not divisible by mesh.{axis}={mesh.shape[axis]}"
            )
    return PartitionSpec(*axes)
