"""RandAugment as timm 0.4.12 applies it for `rand-m9-mstd0.5-inc1`.

See docs/reference.md#rand-augment.

A few operations are drawn uniformly with replacement. Each is applied with probability one half, at
a magnitude of its own. As in timm, Pillow computes the pixels.
"""

from collections.abc import Callable
import dataclasses
import re
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from fd_jax.errors import ConfigError

FILL = (124, 116, 104)  # mean colour of ImageNet; fills the pixels that a warp uncovers
MAX_MAGNITUDE = 10.0
_EXAMPLE = "rand-m9-mstd0.5-inc1"


@dataclasses.dataclass(frozen=True)
class Operation:
    """One of the fifteen operations.

    Attributes:
      apply: function (image, amount) -> image.
      scale: amount at the maximum level; 0 if the operation has no amount.
      signed: whether the sign of the amount is random.
    """

    apply: Callable[[Image.Image, float], Image.Image]
    scale: float = 0.0
    signed: bool = False


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Samples each output pixel (x, y) at (a x + b y + c, d x + e y + f), bicubic."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL
    )


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=FILL)


def _posterize(image: Image.Image, amount: float) -> Image.Image:
    # At the maximum level no bit is left, which ImageOps.posterize refuses.
    return image.point([value & ~(2 ** (4 + int(amount)) - 1) & 255 for value in range(256)] * 3)


def _solarize(image: Image.Image, amount: float) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(amount))


def _solarize_add(image: Image.Image, amount: float) -> Image.Image:
    added = [min(255, value + int(amount)) if value < 128 else value for value in range(256)]
    return image.point(added * 3)


def _enhance(kind: Callable[[Image.Image], Any]) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, amount: kind(image).enhance(1.0 + amount)


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": Operation(lambda image, _: ImageOps.autocontrast(image)),
    "Equalize": Operation(lambda image, _: ImageOps.equalize(image)),
    "Invert": Operation(lambda image, _: ImageOps.invert(image)),
    "Rotate": Operation(_rotate, 30.0, signed=True),
    "PosterizeIncreasing": Operation(_posterize, 4.0),
    "SolarizeIncreasing": Operation(_solarize, 256.0),
    "SolarizeAdd": Operation(_solarize_add, 110.0),
    "ColorIncreasing": Operation(_enhance(ImageEnhance.Color), 0.9, signed=True),
    "ContrastIncreasing": Operation(_enhance(ImageEnhance.Contrast), 0.9, signed=True),
    "BrightnessIncreasing": Operation(_enhance(ImageEnhance.Brightness), 0.9, signed=True),
    "SharpnessIncreasing": Operation(_enhance(ImageEnhance.Sharpness), 0.9, signed=True),
    "ShearX": Operation(lambda im, k: _affine(im, 1, k, 0, 0, 1, 0), 0.3, signed=True),
    "ShearY": Operation(lambda im, k: _affine(im, 1, 0, 0, k, 1, 0), 0.3, signed=True),
    "TranslateXRel": Operation(
        lambda im, share: _affine(im, 1, 0, share * im.width, 0, 1, 0), 0.45, signed=True
    ),
    "TranslateYRel": Operation(
        lambda im, share: _affine(im, 1, 0, 0, 0, 1, share * im.height), 0.45, signed=True
    ),
}


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """A RandAugment policy.

    Attributes:
      magnitude: mean of the level, 0 to 10.
      spread: standard deviation of the level.
      count: number of operations drawn per image.
      probability: probability that a drawn operation is applied.
    """

    magnitude: float = 9.0
    spread: float = 0.0
    count: int = 2
    probability: float = 0.5

    @classmethod
    def parse(cls, policy: str) -> "RandAugment":
        """Reads timm's notation: "rand" and any of m9, mstd0.5, n2, p0.5 and inc1, with dashes.

        Raises:
          ConfigError: a part is unknown, a number is out of range, or the policy asks for the
            operations whose effect does not grow with the level (inc0), which are not implemented.
        """
        name, *parts = policy.split("-")
        if name != "rand":
            raise ConfigError(f"data.rand_augment={policy!r}: expected something like {_EXAMPLE!r}")
        fields = {"m": "magnitude", "mstd": "spread", "n": "count", "p": "probability"}
        values: dict[str, float] = {}
        increasing = False
        for part in parts:
            match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
            if match and match[1] == "inc":
                increasing = float(match[2]) > 0
            elif match and match[1] in fields:
                values[fields[match[1]]] = float(match[2])
            else:
                raise ConfigError(
                    f"data.rand_augment={policy!r}: part {part!r} is unknown; expected "
                    f"{', '.join(fields)} or inc with a number, such as {_EXAMPLE!r}"
                )
        if not increasing:
            raise ConfigError(
                f"data.rand_augment={policy!r}: only operations whose effect grows with the "
                f"magnitude are implemented; add inc1, as in {_EXAMPLE!r}"
            )
        augment = cls(**{**values, "count": int(values.get("count", 2))})  # type: ignore[arg-type]
        if not 0 <= augment.magnitude <= MAX_MAGNITUDE or not 0 <= augment.probability <= 1:
            raise ConfigError(
                f"data.rand_augment={policy!r}: magnitudes go from 0 to {MAX_MAGNITUDE:g}, "
                "probabilities from 0 to 1"
            )
        return augment

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Augments an image. uint8 [h, w, 3] -> uint8 [h, w, 3]"""
        image = Image.fromarray(pixels)
        for name in rng.choice(list(OPERATIONS), size=self.count):
            if rng.random() < self.probability:
                image = self.apply(image, OPERATIONS[str(name)], rng)
        return np.asarray(image)

    def apply(
        self, image: Image.Image, operation: Operation, rng: np.random.Generator
    ) -> Image.Image:
        """Applies one operation at a level and with a sign drawn from `rng`."""
        level = float(np.clip(rng.normal(self.magnitude, self.spread), 0.0, MAX_MAGNITUDE))
        amount = operation.scale * level / MAX_MAGNITUDE
        if operation.signed and rng.random() < 0.5:
            amount = -amount
        return operation.apply(image, amount)
