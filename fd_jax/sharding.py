"""The device mesh, and which axis of it every array is split over.

One table gives each parameter's axes names; one table says where a name lands on the mesh. A
parameter that matches no row, or more than one, is an error.
"""

from collections.abc import Callable, Sequence
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

# Path pattern -> logical axes. Vectors, tables and tokens are small and stay whole.
PARAM_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"attn/qkv/kernel$", ("embed", None, "heads")),
    (r"attn/proj/kernel$", ("heads", "embed")),
    (r"mlp/fc1/kernel$", ("embed", "mlp")),
    (r"mlp/fc2/kernel$", ("mlp", "embed")),
    (r"patch_embed/kernel$", (None, None, None, "embed")),
    (r"downsample/reduction/kernel$", ("embed", None)),
    (r"rel_pos_bias/fc[12]/kernel$", (None, None)),
    (r"(^|/)(projector(/\w+)?|head)/kernel$", ("embed", None)),  # or a projector per teacher
    (r"(bias|scale|gamma_1|gamma_2|table|cls_token|pos_embed|register_tokens)$", ()),
)


def make_mesh(
    *, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices; one axis may be -1, the rest of them.

    With several TPU slices the data axis spans the slices, so that only gradients cross them.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = resolve_mesh({"data": data, "fsdp": fsdp, "tensor": tensor}, len(devices))
    is_tpu = devices[0].platform == "tpu"
    # On GPUs every machine has a slice_index of its own; fsdp may span them all the same.
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
        # Elsewhere the topology is flat: the order of the devices keeps a host's rows together. So
        # it is with two devices on a chip, which is how the compiler describes a v4 without
        # one; jax lays the axes of a mesh over whole chips only.
        grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, AXES)


def _on_torus(create: Callable[..., np.ndarray], *shapes: tuple[int, ...], devices: Any):
    """Whole axes of the torus for each axis of the mesh; parts where that cannot be.

    fsdp=16 on 8 x 8 chips, say, is no product of sides.
    """
    try:
        return create(*shapes, devices=devices)
    except NotImplementedError:
        return create(*shapes, devices=devices, allow_split_physical_axes=True)


def resolve_mesh(sizes: dict[str, int], devices: int) -> tuple[int, int, int]:
    """Replaces a -1 by what is left, and checks that the product is the number of devices."""
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    unknown = [axis for axis, size in sizes.items() if size == -1]
    wanted = " x ".join(f"{axis}={sizes[axis]}" for axis in AXES)
    if len(unknown) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"mesh {wanted}: sizes are positive, and at most one may be -1")
    if devices % fixed or (not unknown and fixed != devices):
        raise ConfigError(f"mesh {wanted} does not fit {devices} devices; the product must be that")
    data, fsdp, tensor = (devices // fixed if sizes[axis] == -1 else sizes[axis] for axis in AXES)
    return data, fsdp, tensor


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Refuses a global batch that does not split evenly over devices and micro-batches."""
    check_positive("batch_size", batch_size)
    check_positive("accumulation", accumulation)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (ways * accumulation):
        step = ways * accumulation
        lower = batch_size // step * step
        fitting = f"{lower} or {lower + step}" if lower else step
        raise ConfigError(
            f"batch_size {batch_size} is not divisible by {ways} batch shards "
            f"(mesh data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}) x {accumulation} "
            f"micro-batches; use {fitting}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(params: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of every parameter of a tree of arrays or shapes."""

    def sharding_of(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, _partition(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding_of, params)


def optimizer_shardings(
    tx: optax.GradientTransformation, opt_state: PyTree, params: PyTree, mesh: Mesh
) -> PyTree:
    """Optimizer state like the parameter it belongs to; counters and factored moments whole."""
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
    """Waits for the other processes, where there are any."""
    if jax.process_count() > 1:  # one process would compile an exchange with itself
        multihost_utils.sync_global_devices(name)


def _partition(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    rows = [axes for pattern, axes in PARAM_AXES if re.search(pattern, name)]
    if len(rows) != 1:
        raise ValueError(
            f"parameter {name} {shape} matches {len(rows)} rows of PARAM_AXES; expected one"
        )
    axes = [None if axis is None else RULES[axis] for axis in rows[0]]
    if axes and len(axes) != len(shape):
        raise ValueError(f"parameter {name} has shape {shape}, its row names {len(axes)} axes")
    for size, axis in zip(shape, axes, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise ConfigError(
                f"{name} {shape}: {size} is not divisible by mesh.{axis}={mesh.shape[axis]}"
            )
    return PartitionSpec(*axes)
