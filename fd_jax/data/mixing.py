"""Mixup, CutMix and random erasing of whole global batches, on the device.

See docs/reference.md#mixing and docs/reference.md#random-erasing.

All random numbers are drawn for the global batch from one key, so the result depends neither on the
mesh nor on the number of hosts.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from fd_jax.errors import ConfigError

ERASED_AREA = (0.02, 1 / 3)  # range, as a share of the image
ERASED_ASPECT = (0.3, 1 / 0.3)  # range of height / width
ERASE_TRIES = 10


def smooth_one_hot(label: jax.Array, classes: int, smoothing: float) -> jax.Array:
    """Label-smoothed targets: s / K for each class, plus 1 - s for the label.

    [B] -> [B, K] float32.
    """
    return jax.nn.one_hot(label, classes) * (1 - smoothing) + smoothing / classes


@dataclasses.dataclass(frozen=True)
class Mixing:
    """Mixes each image with the one at the mirrored position of the batch, using one lambda.

    Lambda is drawn once per global batch. The original draws it once for the batch of each device
    (docs/reference.md#quirk-mixup-per-rank).

    Attributes:
      mixup: alpha of the Beta distribution of lambda for mixup; 0 to turn mixup off.
      cutmix: alpha for CutMix; 0 to turn CutMix off.
      switch: probability of CutMix if both are on.
      batch_size: number of examples in the global batch.

    Raises:
      ConfigError: an alpha is negative, both are 0, or the batch size is odd.
    """

    mixup: float
    cutmix: float
    switch: float
    batch_size: int

    def __post_init__(self):
        if min(self.mixup, self.cutmix) < 0 or max(self.mixup, self.cutmix) == 0:
            raise ConfigError(
                f"mixing.mixup={self.mixup} and mixing.cutmix={self.cutmix}: alphas must be "
                "positive, or 0 for off, and at least one must be on"
            )
        if self.batch_size % 2:
            raise ConfigError(
                f"mixup and cutmix pair the images of a batch, and batch_size={self.batch_size} is "
                f"odd; use {self.batch_size + 1}, or set mixing.mixup=0 and mixing.cutmix=0"
            )

    def __call__(
        self, key: jax.Array, images: jax.Array, target: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Draws lambda and mixes the batch, before images are normalised.

        images [B, S, S, 3] uint8 or float, target [B, K] -> the same shapes, float32.
        """
        switch_key, mixup_key, cutmix_key, centre_key = jax.random.split(key, 4)
        size = images.shape[1]
        lam = jax.random.beta(mixup_key, self.mixup or 1.0, self.mixup or 1.0)
        weight = jnp.full((size, size), lam)  # share of the image itself in each mixed pixel
        if self.cutmix:
            cut_lam = jax.random.beta(cutmix_key, self.cutmix, self.cutmix)
            centre = jax.random.randint(centre_key, (2,), 0, size)
            cut = 1.0 - box_mask(size, cut_lam, centre)
            share = self.switch if self.mixup else 1.0
            weight = jnp.where(jax.random.uniform(switch_key) < share, cut, weight)
        return mix(images, target, weight)


def mix(images: jax.Array, target: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mixes the pixels and targets of each example i with those of example B - 1 - i.

    The weight of the targets is the mean weight of the pixels. For mixup this is lambda; for a box
    it is the share of the area that the box really leaves.

    Partners usually live on different devices. Images in uint8 cross between them at one byte per
    value.

    Args:
      images: images [B, S, S, 3], uint8 or float.
      target: class distributions [B, K].
      weight: weights [S, S] of each example's own pixels.

    Returns:
      The mixed images and targets, float32, with unchanged shapes.
    """
    w = weight[None, :, :, None]
    lam = jnp.mean(weight)
    mixed = w * images + (1 - w) * images[::-1]
    return mixed, lam * target + (1 - lam) * target[::-1]


def box_mask(size: int, lam: jax.Array, centre: jax.Array) -> jax.Array:
    """The box of CutMix as a mask, 1 inside. -> [S, S]

    Its side is int(S sqrt(1 - lambda)), and it is clipped at the border of the image.
    """
    half = jnp.floor(size * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
    low = jnp.clip(centre - half, 0, size)
    high = jnp.clip(centre + half, 0, size)
    position = jnp.arange(size)
    inside = (position[:, None] >= low) & (position[:, None] < high)  # [S, 2]: row and column
    return (inside[:, None, 0] & inside[None, :, 1]).astype(jnp.float32)


def erase(key: jax.Array, images: jax.Array, *, probability: float) -> jax.Array:
    """Random erasing in "pixel" mode: fills one box of each chosen image with normal noise.

    The noise is drawn for each pixel and channel, with the scale of normalised images.

    Args:
      key: key of all random numbers.
      images: normalised images [B, S, S, 3], float.
      probability: probability that an image is chosen.
    """
    batch, size = images.shape[:2]
    chosen_key, box_key, noise_key = jax.random.split(key, 3)
    chosen = jax.random.uniform(chosen_key, (batch,)) < probability
    uniform = jax.random.uniform(box_key, (batch, ERASE_TRIES, 4))
    top, left, height, width, fits = erased_box(uniform, size)
    position = jnp.arange(size)
    rows = (position >= top[:, None]) & (position < (top + height)[:, None])
    columns = (position >= left[:, None]) & (position < (left + width)[:, None])
    mask = (rows[:, :, None] & columns[:, None, :]) & (chosen & fits)[:, None, None]
    noise = jax.random.normal(noise_key, images.shape, images.dtype)
    return jnp.where(mask[..., None], noise, images)


def erased_box(uniform: jax.Array, size: int) -> tuple[jax.Array, ...]:
    """Chooses a box for each image: the first try that is smaller than the image in both sides.

    Args:
      uniform: random numbers [B, tries, 4] in [0, 1), for area, aspect, top and left.
      size: side S of the images.

    Returns:
      (top, left, height, width, fits), each [B]; `fits` is False for images without a fitting try.
    """
    low, high = ERASED_AREA
    area = size * size * (low + uniform[..., 0] * (high - low))
    log_low, log_high = (math.log(value) for value in ERASED_ASPECT)
    aspect = jnp.exp(log_low + uniform[..., 1] * (log_high - log_low))
    height = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    width = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (height < size) & (width < size)
    first = jnp.argmax(fits, axis=1)

    def pick(values):
        return jnp.take_along_axis(values, first[:, None], axis=1)[:, 0]

    height, width = pick(height), pick(width)
    # From 0 to S - side inclusive.
    top = jnp.floor(pick(uniform[..., 2]) * (size - height + 1)).astype(jnp.int32)
    left = jnp.floor(pick(uniform[..., 3]) * (size - width + 1)).astype(jnp.int32)
    return top, left, height, width, jnp.any(fits, axis=1)
