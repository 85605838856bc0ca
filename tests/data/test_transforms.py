"""Transforms against Pillow, which torchvision calls; random crops against their distribution."""

import io

import numpy as np
from PIL import Image
import pytest
from scipy import stats

from fd_jax.data import transforms
from fd_jax.data.builders.photos import load_photo
from fd_jax.data.datasets import BrokenImageError
from fd_jax.errors import ConfigError

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def encode(pixels, kind="JPEG", mode=None, **options):
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def pillow(data):
    """Decodes as torchvision's loader does."""
    return Image.open(io.BytesIO(data)).convert("RGB")


@pytest.fixture(scope="module")
def photo():
    return load_photo("coffee")[:375, :500]


@pytest.fixture(scope="module")
def jpegs():
    """JPEGs of realistic size: smooth images, fine textures and a grey image."""
    names = ("coffee", "china", "chelsea", "motorcycle_left", "brick")
    colour = [encode(load_photo(name)[:375, :500], quality=92) for name in names]
    return [*colour, encode(load_photo("grass")[:375, :500], mode="L", quality=92)]


# --- decoding --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 95},
        {"quality": 95, "subsampling": 0},
        {"progressive": True},
        {"mode": "L"},
        {"mode": "CMYK"},
        {"kind": "PNG"},
        {"kind": "PNG", "mode": "RGBA"},
        {"kind": "PNG", "mode": "P"},
        {"kind": "PNG", "mode": "1"},
        {"kind": "WEBP"},
        {"kind": "BMP"},
    ],
    ids=str,
)
def test_decoded_pixels_are_those_of_pillow(photo, options):
    data = encode(photo, **options)
    error = np.abs(transforms.decode(data).astype(int) - np.asarray(pillow(data)))
    assert error.max() <= 1 and error.mean() < 1e-3


def test_the_exif_orientation_is_not_applied(photo):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn
    data = encode(photo, quality=95, exif=exif.tobytes())
    assert transforms.decode(data).shape == photo.shape


def test_bytes_after_the_end_of_a_jpeg_are_ignored(photo):
    data = encode(photo)
    np.testing.assert_array_equal(transforms.decode(data + bytes(1000)), transforms.decode(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_a_truncated_image_raises_broken_image_error(photo, kind, share):
    data = encode(photo, kind)
    with pytest.raises(BrokenImageError, match="cannot decode"):
        transforms.decode(data[: int(len(data) * share)])


@pytest.mark.parametrize("data", [b"", b"no picture", b"\xff\xd8\xff\xd9", bytes(5000)])
def test_bytes_that_are_not_an_image_raise_broken_image_error(data):
    with pytest.raises(BrokenImageError):
        transforms.decode(data)


def test_decoded_pixels_are_returned_and_grey_ones_become_rgb():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert transforms.decode(pixels) is pixels
    np.testing.assert_array_equal(
        transforms.decode(pixels[..., :1]), np.repeat(pixels[..., :1], 3, axis=-1)
    )


# --- the crop --------------------------------------------------------------------------------


def boxes(count, height, width, **options):
    rng = np.random.default_rng(0)
    drawn = [
        transforms.random_resized_crop_box(rng, height, width, **options) for _ in range(count)
    ]
    return np.array(drawn)


def test_crop_area_aspect_and_position_are_uniform_if_every_draw_fits():
    top, left, h, w = boxes(4000, 4000, 4000, min_area=0.08, max_area=0.5).T
    uniform = {
        "area": ((h * w) / 4000**2, 0.08, 0.5),
        "log aspect": (np.log(w / h), np.log(3 / 4), np.log(4 / 3)),
        "top": (top / (4000 - h), 0, 1),
        "left": (left / (4000 - w), 0, 1),
    }
    for name, (values, low, high) in uniform.items():
        assert stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-3, name
    assert abs(np.corrcoef(h * w, w / h)[0, 1]) < 0.05


def test_crops_that_do_not_fit_are_drawn_again():
    """Expected values given that the crop fits come from quadrature over the uniform square."""
    height, width, low = 375, 500, 0.08
    area, aspect = np.meshgrid(
        np.linspace(low, 1, 2001), np.exp(np.linspace(np.log(3 / 4), np.log(4 / 3), 2001))
    )
    pixels = area * height * width
    fits = (np.sqrt(pixels * aspect) <= width + 0.5) & (np.sqrt(pixels / aspect) <= height + 0.5)
    _, _, h, w = boxes(20000, height, width, min_area=low).T
    for drawn, wanted in (
        (h * w / (height * width), area[fits]),
        (np.log(w / h), np.log(aspect[fits])),
    ):
        assert abs(drawn.mean() - wanted.mean()) < 4 * wanted.std() / np.sqrt(len(drawn))
        assert drawn.std() == pytest.approx(wanted.std(), rel=0.03)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((10, 1000), (0, 493, 10, 13)),  # 4/3 of the height, centred
        ((1000, 10), (493, 0, 13, 10)),
        ((12, 15), (0, 0, 12, 15)),  # its own aspect is allowed: the whole image
    ],
)
def test_after_ten_draws_that_do_not_fit_the_largest_centred_crop_is_taken(size, wanted):
    miss = {"min_area": 4.0, "max_area": 4.0}  # larger than the image
    np.testing.assert_array_equal(boxes(20, *size, **miss), [wanted] * 20)


# --- distillation ----------------------------------------------------------------------------


def torchvision_crop(data, size, method, *, seed, min_area):
    image = pillow(data)
    rng = np.random.default_rng(seed)
    top, left, h, w = transforms.random_resized_crop_box(
        rng, image.height, image.width, min_area=min_area
    )
    crop = image.crop((left, top, left + w, top + h)).resize((size, size), FILTERS[method])
    return np.asarray(crop), rng.random() < 0.5


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [98, 224])
def test_crops_match_torchvisions_pil_path(jpegs, method, size):
    transform = transforms.TrainTransform(size, min_area=0.08, interpolation=method, flip=True)
    flips = []
    for seed, data in enumerate(jpegs * 3):
        got = transform(data, np.random.default_rng(seed))
        wanted, flipped = torchvision_crop(data, size, method, seed=seed, min_area=0.08)
        error = np.abs(got.astype(int) - (wanted[:, ::-1] if flipped else wanted))
        assert got.shape == (size, size, 3) and got.dtype == np.uint8
        assert error.mean() <= 2 and np.percentile(error, 99) <= 6  # the documented bounds
        assert error.max() <= 2  # measured: same arithmetic, decoders differ by rounding only
        flips.append(flipped)
    assert len(set(flips)) == 2


def test_a_resize_without_antialiasing_would_not_match(jpegs):
    import cv2

    rng = np.random.default_rng(1)
    worst = 0.0
    for data in jpegs:
        image = pillow(data)
        top, left, h, w = transforms.random_resized_crop_box(rng, 375, 500, min_area=0.5)
        crop = np.asarray(image)[top : top + h, left : left + w]
        plain = cv2.resize(crop, (98, 98), interpolation=cv2.INTER_LINEAR)
        good = np.asarray(Image.fromarray(crop).resize((98, 98), Image.Resampling.BILINEAR))
        worst = max(worst, np.percentile(np.abs(plain.astype(int) - good), 99))
    assert worst > 12


def test_without_flip_no_image_is_mirrored(photo):
    transform = transforms.TrainTransform(32, min_area=1.0, interpolation="bilinear", flip=False)
    results = {transform(photo, np.random.default_rng(seed)).tobytes() for seed in range(8)}
    assert len(results) == 1


@pytest.mark.parametrize(
    ("field", "value"), [("interpolation", "cubic"), ("min_area", 0.0), ("min_area", 1.5)]
)
def test_invalid_settings_of_the_training_transform_are_refused(field, value):
    options = {"min_area": 0.5, "interpolation": "bilinear", "flip": True, field: value}
    with pytest.raises(ConfigError, match=f"data.{field}="):
        transforms.TrainTransform(32, **options)


# --- evaluation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "short"), [(224, 256), (336, 384), (384, 438), (448, 512), (512, 585)]
)
def test_the_evaluation_transform_resizes_to_the_short_side_of_the_reference(size, short):
    assert transforms.EvalTransform(size).short_side == short


@pytest.mark.parametrize(
    ("height", "width", "resized", "corner"),
    [
        (375, 500, (256, 341), (16, 58)),  # 58.5 rounds to even
        (500, 375, (341, 256), (58, 16)),
        (300, 451, (256, 384), (16, 80)),
        (451, 300, (384, 256), (80, 16)),
        (97, 131, (256, 345), (16, 60)),  # 60.5 rounds to even; the picture is enlarged
        (375, 375, (256, 256), (16, 16)),
    ],
)
def test_evaluation_resizes_the_short_side_and_crops_the_centre(height, width, resized, corner):
    picture = load_photo("astronaut")[:height, :width]
    picture = np.asarray(Image.fromarray(picture).resize((width, height)))
    whole = Image.fromarray(picture).resize(resized[::-1], Image.Resampling.BICUBIC)
    top, left = corner
    wanted = np.asarray(whole)[top : top + 224, left : left + 224]
    np.testing.assert_array_equal(transforms.EvalTransform(224)(picture), wanted)


@pytest.mark.parametrize(
    ("height", "width", "resized", "corner"),
    [
        (375, 500, (288, 384), (60, 24)),  # less wide than the result: its width is what counts
        (200, 800, (192, 768), (12, 216)),
        (500, 375, (512, 384), (172, 24)),
    ],
)
def test_evaluation_at_another_shape_covers_it_and_crops_the_centre(height, width, resized, corner):
    """Of 168 x 336: 192 x 384 pixels have to be covered."""
    picture = np.asarray(Image.fromarray(load_photo("astronaut")).resize((width, height)))
    whole = Image.fromarray(picture).resize(resized[::-1], Image.Resampling.BICUBIC)
    top, left = corner
    wanted = np.asarray(whole)[top : top + 168, left : left + 336]
    transform = transforms.EvalTransform((168, 336))
    np.testing.assert_array_equal(transform(picture), wanted)
    squashed = transforms.EvalTransform((168, 336), crop=False)(picture)
    assert squashed.shape == (168, 336, 3)
    elements = transforms.LabelledImage(transform).elements
    assert elements["image"].shape == (168, 336, 3)
