"""What an implementation of attention answers for, and how kernels run on a mesh."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import contextvars
import dataclasses

import jax
from jax import shard_map
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

# (q, k, v, *, bias, scale): [B, N, A, d] x 3, bias [A, N, N] or [G, A, N, N] float32 or None
# -> [B, N, A, d]; see `fd_jax.models.attention.attend`.
Attend = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute attention.

    Attributes:
      name: as `config.attention` has it.
      attend: computes it.
      refuses: (platform, dtype, head widths) -> why it cannot do that, as the end of a sentence
        that begins with its name; None where it can.
      padding: (number of tokens, is there a bias) -> how many tokens it adds to compute. A caller
        that adds them earlier, see `mask_keys`, spares copies of queries, keys, values and result.
      sums_gradients: whether `attend` takes `added`, for each of q, k and v: a float32 vector
        [A * d] that is in it already, at every row and token, or None. Its gradient is a sum over
        rows and tokens, which a kernel takes while it has the numbers at hand. Whoever passes a
        vector here has to stop its gradient where it was added.
    """

    name: str
    attend: Attend
    refuses: Callable[[str, jnp.dtype, Sequence[int]], str | None]
    padding: Callable[[int, bool], int] = lambda tokens, biased: 0
    sums_gradients: bool = False


MASKED = -1e9  # bias of an added key: its weight is zero in float32, and so is its gradient


def mask_keys(bias: jax.Array, count: int) -> jax.Array:
    """The bias after `count` tokens are added whose keys no query can see.

    Args:
      bias: [..., N, N].
      count: number of tokens added.

    Returns:
      [..., N + count, N + count].
    """
    rest = [(0, 0)] * (bias.ndim - 2)
    bias = jnp.pad(bias, (*rest, (0, count), (0, 0)))
    return jnp.pad(bias, (*rest, (0, 0), (0, count)), constant_values=MASKED)


@dataclasses.dataclass(frozen=True)
class Split:
    """How attention is split over a mesh: examples over some axes, heads over another."""

    mesh: Mesh
    batch: tuple[str, ...]
    heads: str


_SPLIT: contextvars.ContextVar[Split | None] = contextvars.ContextVar("split", default=None)


_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Networks that are built inside are for "cpu", "gpu" or "tpu" chips of another machine."""
    token = _PLATFORM.set(platform)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def platform() -> str:
    """The chips that networks are built for: those of this process, if no others are named."""
    return _PLATFORM.get() or jax.default_backend()


def device_kind() -> str | None:
    """The kind of chip that networks are built for; None if it is one of another machine."""
    return None if _PLATFORM.get() else jax.devices()[0].device_kind


@contextlib.contextmanager
def split_over(mesh: Mesh, *, batch: tuple[str, ...], heads: str) -> Iterator[None]:
    """Kernels that are traced inside run on each device's part of the examples and heads.

    The compiler does not look into a kernel: without this it would gather all examples on every
    device. Models know no mesh, so whoever traces a step on one says so here.
    """
    token = _SPLIT.set(Split(mesh, batch, heads))
    try:
        yield
    finally:
        _SPLIT.reset(token)


def per_device(attend: Attend) -> Attend:
    """The same attention, computed by each device on what it holds, see `split_over`.

    Heads may be an axis of their own, or lie side by side in the last one. Gradients of the bias,
    and of what was added to queries, keys and values, are summed over the devices that share it.
    """

    def attend_on_mesh(q, k, v, *, bias, scale, **sums):
        split = _SPLIT.get()
        if split is None or split.mesh.size == 1:
            return attend(q, k, v, bias=bias, scale=scale, **sums)
        tokens = PartitionSpec(split.batch, None, split.heads)
        pairs = PartitionSpec(split.heads)
        if bias is not None:
            # A bias for each row lies with its row; one for each window of an image, or for all
            # rows, is needed by every device.
            rows = (split.batch if bias.shape[0] == q.shape[0] else None,) * (bias.ndim - 3)
            pairs = PartitionSpec(*rows, split.heads)

        def local(q, k, v, bias, sums):
            return attend(q, k, v, bias=bias, scale=scale, **sums)

        mapped = shard_map(
            local,
            mesh=split.mesh,
            in_specs=(tokens, tokens, tokens, pairs, PartitionSpec(split.heads)),
            out_specs=tokens,
            check_vma=False,
        )
        return mapped(q, k, v, bias, sums)

    return attend_on_mesh


def fold_groups(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Makes groups of examples with a bias of their own into heads, which kernels can broadcast.

    Args:
      q: [B, N, A, d]; `k` and `v` have the same shape.
      k: keys.
      v: values.
      bias: [A, N, N], or [G, A, N, N] where bias g belongs to the rows g, g + G, g + 2G, ...

    Returns:
      q, k and v as [B/G, N, G*A, d], and bias as [1, G*A, N, N] in the dtype of `q`; or None.
    """
    if bias is None:
        return q, k, v, None
    if bias.ndim == 4 and bias.shape[0] > 1:
        groups = bias.shape[0]
        q, k, v = (_groups_to_heads(x, groups) for x in (q, k, v))
    bias = jnp.asarray(bias, q.dtype)
    return q, k, v, bias.reshape(1, -1, *bias.shape[-2:])


def unfold_groups(out: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `fold_groups` for what attention returns. -> `shape`, [B, N, A, d]."""
    batch, tokens, heads, width = shape
    groups = out.shape[2] // heads
    if groups == 1:
        return out
    out = out.reshape(batch // groups, tokens, groups, heads, width)
    return out.transpose(0, 2, 1, 3, 4).reshape(shape)


def _groups_to_heads(x: jax.Array, groups: int) -> jax.Array:
    batch, tokens, heads, width = x.shape
    x = x.reshape(batch // groups, groups, tokens, heads, width).transpose(0, 2, 1, 3, 4)
    return x.reshape(batch // groups, tokens, groups * heads, width)
