"""The training transform against references in plain NumPy and OpenCV, step by step and whole."""

import colorsys

import cv2
import numpy as np
from PIL import Image
import pytest
from scipy import stats

from fd_jax.data.builders.photos import load_photo
from fd_jax.data.segmentation import Labels, Scene, transforms
from fd_jax.errors import ConfigError
from tests.data.segmentation.scenes import blocks, encode

FILL = np.array([124, 116, 104], np.uint8)
ADE20K = Labels(150, 255, True)
SETTINGS = {
    "scale": (512, 128),
    "ratio": (0.5, 2.0),
    "max_share": 0.75,
    "flip": True,
    "distort": True,
}


@pytest.fixture(scope="module")
def photo():
    return load_photo("coffee")[:150, :200]


def make(size=96, **changes):
    fields = {**SETTINGS, **changes}
    return transforms.TrainTransform(size, labels=ADE20K, fill=tuple(FILL), **fields)


def scene(photo, stored):
    return Scene(photo, stored, "one", "one.png")


# --- resizing --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "wanted"),
    [
        (480, 640, (512, 683)),  # 682.67
        (512, 512, (512, 512)),
        (256, 683, (512, 1366)),
        (683, 256, (1366, 512)),
        (200, 1000, (410, 2048)),  # the long side is what limits it
        (3, 4096, (2, 2048)),  # 1.5, rounded upwards
        (1024, 1537, (512, 769)),  # 768.5, rounded upwards
    ],
)
def test_pictures_are_resized_within_a_long_and_a_short_side(height, width, wanted):
    assert transforms.test_size(height, width, (2048, 512)) == wanted
    assert transforms.test_size(height, width, (512, 2048)) == wanted


def test_the_aspect_is_kept_within_half_a_pixel_and_one_limit_is_reached():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(40, 3000, (500, 2)).tolist():
        h, w = transforms.test_size(height, width, (2048, 512))
        assert (min(h, w) == 512 and max(h, w) <= 2048) or max(h, w) == 2048
        shrunk = 512 / min(height, width) if min(h, w) == 512 else 2048 / max(height, width)
        assert max(abs(h - height * shrunk), abs(w - width * shrunk)) <= 0.5 + 1e-9


def bilinear(pixels, height, width):
    """Without antialiasing, pixel centres at one half, edges repeated."""
    out = pixels.astype(np.float64)
    for axis, size in enumerate((height, width)):
        length = pixels.shape[axis]
        place = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, length - 1)
        share = (place - low).reshape([-1 if i == axis else 1 for i in range(3)])
        out = (1 - share) * out.take(low, axis) + share * out.take(high, axis)
    return out


SIZES = [(300, 400), (75, 100), (128, 171), (201, 90)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pictures_are_resized_bilinearly_without_antialiasing(photo, height, width):
    resized = transforms.resize_image(photo, height, width)
    error = np.abs(resized - bilinear(photo, height, width))
    assert resized.dtype == np.uint8 and error.max() <= 1
    if height < 150:
        antialiased = np.asarray(
            Image.fromarray(photo).resize((width, height), Image.Resampling.BILINEAR)
        )
        assert np.abs(antialiased - bilinear(photo, height, width)).max() > 10


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_masks_take_the_label_at_the_cut_position(height, width):
    mask = blocks(0, 150, 200, (3, 90, 255), side=7)
    rows = np.arange(height) * 150 // height
    columns = np.arange(width) * 200 // width
    wanted = mask[rows][:, columns]
    np.testing.assert_array_equal(transforms.resize_mask(mask, height, width), wanted)
    mixed = transforms.resize_image(np.repeat(mask[..., None], 3, axis=-1), height, width)
    assert not np.isin(mixed, (3, 90, 255)).all()  # a bilinear resize invents labels


def test_the_factor_of_the_scale_is_uniform():
    mask = np.zeros((100, 100), np.uint8)
    pixels = np.zeros((100, 100, 3), np.uint8)
    sides = [
        transforms.random_resize(
            np.random.default_rng(seed), pixels, mask, scale=(2048, 512), ratio=(0.5, 2.0)
        )[1].shape[0]
        for seed in range(1500)
    ]
    assert stats.kstest((np.array(sides) + 0.5) / 512, "uniform", (0.5, 1.5)).pvalue > 1e-3
    assert min(sides) >= 256 and max(sides) <= 1024


def test_the_sides_of_the_scale_are_cut_to_whole_pixels():
    """A picture of 1 x 100 shows the limit of the long side: its width."""
    mask, pixels = np.zeros((1, 100), np.uint8), np.zeros((1, 100, 3), np.uint8)
    cut, rounded = 0, 0
    for seed in range(50):
        factor = 0.5 + 1.5 * np.random.default_rng(seed).random()
        _, resized = transforms.random_resize(
            np.random.default_rng(seed), pixels, mask, scale=(200, 50), ratio=(0.5, 2.0)
        )
        cut += resized.shape[1] == int(200 * factor)
        rounded += resized.shape[1] == round(200 * factor)
    assert cut == 50 > rounded


# --- the crop --------------------------------------------------------------------------------


def crop_corner(mask, size, seed, max_share=0.75):
    rows, columns = transforms.random_crop_box(
        np.random.default_rng(seed), mask, size, max_share=max_share
    )
    assert (rows.stop - rows.start, columns.stop - columns.start) == (size, size)
    return rows.start, columns.start


def test_the_position_of_a_crop_is_uniform():
    mask = np.zeros((70, 120), np.uint8)
    corners = np.array([crop_corner(mask, 20, seed, max_share=1.0) for seed in range(3000)])
    for values, positions in ((corners[:, 0], 51), (corners[:, 1], 101)):
        counts = np.bincount(values, minlength=positions)
        assert len(counts) == positions
        assert stats.chisquare(counts).pvalue > 1e-3
    assert abs(np.corrcoef(corners.T)[0, 1]) < 0.08


def test_dominated_crops_are_drawn_again_ten_times_and_the_eleventh_is_taken():
    """With one free position, the share of dominated crops that remain is q^11."""
    mask = np.zeros((20, 119), np.uint8)  # 100 positions for a crop of 20
    mask[:, 50:60] = 1
    shares = np.array([mask[:, x : x + 20].mean() for x in range(100)])
    dominated = (shares <= 0.25) | (shares >= 0.75)
    q, seeds = dominated.mean(), 4000
    taken = [crop_corner(mask, 20, seed)[1] for seed in range(seeds)]
    remaining = dominated[taken].mean()
    sigma = np.sqrt(q**11 * (1 - q**11) / seeds)
    assert abs(remaining - q**11) < 3 * sigma
    assert abs(remaining - q**10) > 3 * sigma and abs(remaining - q) > 100 * sigma


def test_ignored_pixels_have_no_share():
    """Class 4 has half of the labelled pixels, but hardly any of all; ignored ones have most."""
    mask = np.full((60, 60), 255, np.uint8)
    mask[::10] = 3
    mask[5::10] = 4
    for seed in range(50):
        assert crop_corner(mask, 20, seed) == crop_corner(mask, 20, seed, max_share=1.0)
    mask[5::10] = 3  # now only one class is left, so that every crop is drawn again
    moved = [crop_corner(mask, 20, s) != crop_corner(mask, 20, s, max_share=1.0) for s in range(50)]
    assert all(moved)


def test_a_share_equal_to_the_limit_dominates():
    mask = np.zeros((40, 20), np.uint8)
    mask[:, :5] = 1  # 25 % of every crop
    first = [crop_corner(mask, 20, seed, max_share=1.0) for seed in range(40)]
    equal = [crop_corner(mask, 20, seed, max_share=0.75) for seed in range(40)]
    below = [crop_corner(mask, 20, seed, max_share=0.76) for seed in range(40)]
    assert below == first != equal


def test_a_mask_without_any_label_is_cropped():
    crop_corner(np.full((60, 60), 255, np.uint8), 20, 0)


# --- colours ---------------------------------------------------------------------------------


def convert(pixels, alpha=1.0, beta=0.0):
    """In float32, clipped, cut to bytes, on whole pictures."""
    changed = pixels.astype(np.float32) * np.float32(alpha) + np.float32(beta)
    return changed.clip(0, 255).astype(np.uint8)


def with_hsv(pixels, change):
    """Through OpenCV's BGR, which is the order of the sources."""
    hsv = cv2.cvtColor(np.ascontiguousarray(pixels[..., ::-1]), cv2.COLOR_BGR2HSV)
    change(hsv)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[..., ::-1]


def reference_distort(rng, pixels, hues=180):
    def contrast(picture):
        return convert(picture, alpha=rng.uniform(0.5, 1.5)) if rng.random() < 0.5 else picture

    def saturate(hsv):
        hsv[..., 1] = convert(hsv[..., 1], alpha=rng.uniform(0.5, 1.5))

    def turn(hsv):
        hsv[..., 0] = (hsv[..., 0].astype(int) + rng.integers(-18, 18)) % hues

    if rng.random() < 0.5:
        pixels = convert(pixels, beta=rng.uniform(-32, 32))
    first = rng.random() < 0.5
    pixels = contrast(pixels) if first else pixels
    pixels = with_hsv(pixels, saturate) if rng.random() < 0.5 else pixels
    pixels = with_hsv(pixels, turn) if rng.random() < 0.5 else pixels
    return pixels if first else contrast(pixels)


def test_colours_are_distorted_as_by_whole_picture_arithmetic(photo):
    wrong = 0
    for seed in range(100):
        distorted = transforms.distort(np.random.default_rng(seed), photo)
        wanted = reference_distort(np.random.default_rng(seed), photo)
        np.testing.assert_array_equal(distorted, wanted)
        modulo = reference_distort(np.random.default_rng(seed), photo, hues=256)
        wrong += not np.array_equal(distorted, modulo)
    assert wrong > 10  # a hue that is turned modulo 256 shows


@pytest.mark.parametrize("steps", [-18, -5, 3, 17])
def test_hue_turns_like_colorsys(steps):
    """The picture has saturated colours around the circle, red in the middle of the turn."""
    circle = [colorsys.hsv_to_rgb(h, 0.8, 0.8) for h in np.linspace(0, 1, 60, endpoint=False)]
    pixels = np.round(255 * np.array(circle)).astype(np.uint8)[None]
    turned = [
        colorsys.hsv_to_rgb((h + 2 * steps / 360) % 1, 0.8, 0.8)
        for h in np.linspace(0, 1, 60, endpoint=False)
    ]
    error = transforms.change_hsv(pixels, hue=transforms.hues(steps)) - 255 * np.array(turned)[None]
    assert np.abs(error).max() < 6  # OpenCV's hue has steps of two degrees
    if steps < 0:  # OpenCV understands hues above 180, but not -5 modulo 256
        table = ((np.arange(256) + steps) % 256).astype(np.uint8)
        error = transforms.change_hsv(pixels, hue=table) - 255 * np.array(turned)[None]
        assert np.abs(error).max() > 50


def test_saturation_scales_like_colorsys():
    pixels = np.array([[[180, 90, 60], [20, 140, 200], [90, 91, 92]]], np.uint8)
    wanted = []
    for rgb in pixels[0] / 255:
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        wanted.append(colorsys.hsv_to_rgb(h, min(1.4 * s, 1), v))
    changed = transforms.change_hsv(pixels, saturation=transforms.levels(factor=1.4))
    assert np.abs(changed - 255 * np.array(wanted)).max() < 3


def hue_of(pixel):
    """In steps of two degrees, between -90 and 90."""
    return (180 * colorsys.rgb_to_hsv(*(pixel / 255))[0] + 90) % 180 - 90


def test_how_often_and_how_far_colours_change():
    """Hue survives brightness, contrast and saturation; grey survives saturation and hue."""
    red = np.full((1, 1, 3), (150, 90, 90), np.uint8)
    grey = np.full((1, 1, 3), 120, np.uint8)
    black = np.zeros((1, 1, 3), np.uint8)
    turned, greys, lifted = [], [], []
    for seed in range(4000):
        turned.append(hue_of(transforms.distort(np.random.default_rng(seed), red)[0, 0]))
        greys.append(transforms.distort(np.random.default_rng(seed), grey)[0, 0])
        lifted.append(transforms.distort(np.random.default_rng(seed), black)[0, 0, 0])
    turned, greys, lifted = np.array(turned), np.array(greys), np.array(lifted)
    assert -20 < turned.min() < -16 and 15 < turned.max() < 19  # rounded colours are a step off
    assert abs(np.mean(np.abs(turned) < 4.5) - (0.5 + 0.5 * 9 / 36)) < 0.04
    assert (greys == greys[:, :1]).all()
    assert abs(np.mean(greys[:, 0] == 120) - 0.25) < 0.04  # neither brightness nor contrast
    assert greys.min() < 50 and greys.max() > 210
    # Black is only lifted by brightness, and contrast then scales it: by a quarter of all draws.
    assert abs(np.mean(lifted > 0) - 0.25) < 0.04 and 32 < lifted.max() < 48


def test_no_change_is_a_copy_of_the_table():
    np.testing.assert_array_equal(transforms.levels(), np.arange(256))
    assert transforms.levels(shift=-0.5)[1] == 0  # cut, not rounded
    assert list(transforms.levels(factor=1.5)[[0, 1, 169, 170, 171]]) == [0, 1, 253, 255, 255]


# --- padding and the whole -------------------------------------------------------------------


def reference(photo, stored, rng, size, *, filler=255, bilinear_mask=False, distort_mask=False):
    """The recipe in its order, with a filler and defects to choose from."""
    mask = np.where(stored == 0, 255, stored - 1).astype(np.uint8)
    factor = 0.5 + 1.5 * rng.random()
    long, short = int(512 * factor), int(128 * factor)
    height, width = mask.shape
    shrunk = min(long / max(height, width), short / min(height, width))
    target = int(width * shrunk + 0.5), int(height * shrunk + 0.5)
    pixels = cv2.resize(photo, target, interpolation=cv2.INTER_LINEAR)
    nearest = cv2.INTER_LINEAR if bilinear_mask else cv2.INTER_NEAREST
    mask = cv2.resize(mask, target, interpolation=nearest)
    for attempt in range(11):
        y = rng.integers(0, max(mask.shape[0] - size, 0) + 1)
        x = rng.integers(0, max(mask.shape[1] - size, 0) + 1)
        window = mask[y : y + size, x : x + size]
        found, counts = np.unique(window[window != 255], return_counts=True)
        if attempt < 10 and len(found) > 1 and counts.max() / counts.sum() < 0.75:
            break
    pixels, mask = pixels[y : y + size, x : x + size], window
    if rng.random() < 0.5:
        pixels, mask = pixels[:, ::-1], mask[:, ::-1]
    pixels = reference_distort(rng, pixels)
    if distort_mask:
        mask = convert(mask, alpha=0.9)
    below, right = size - mask.shape[0], size - mask.shape[1]
    layers = [
        np.pad(pixels[..., c], ((0, below), (0, right)), constant_values=FILL[c]) for c in range(3)
    ]
    mask = np.pad(mask, ((0, below), (0, right)), constant_values=filler)
    return {"image": np.stack(layers, -1), "mask": mask}


def test_the_whole_transform_is_the_recipe_in_its_order(photo):
    transform, stored = make(), blocks(1, 150, 200, (0, 1, 5, 150))
    defects = {"filler": 0, "bilinear_mask": True, "distort_mask": True}
    caught = dict.fromkeys(defects, 0)
    for seed in range(60):
        row = transform(scene(photo, stored), np.random.default_rng(seed))
        wanted = reference(photo, stored, np.random.default_rng(seed), 96)
        for name, element in transform.elements.items():
            assert (row[name].shape, row[name].dtype) == (element.shape, element.dtype)
            np.testing.assert_array_equal(row[name], wanted[name])
        for name, value in defects.items():
            wrong = reference(photo, stored, np.random.default_rng(seed), 96, **{name: value})
            caught[name] += not np.array_equal(row["mask"], wrong["mask"])
    assert min(caught.values()) > 5, caught  # a sixth of the crops is padded


def test_picture_and_mask_show_the_same_places():
    """The picture is the mask as a grey picture, so they stay equal, but where colours mix."""
    stored = blocks(2, 100, 130, (1, 60, 150), side=25)
    grey = np.repeat(stored[..., None], 3, axis=-1)
    transform, mirrored = make(64, distort=False, scale=(400, 100)), []
    for seed in range(200):
        row = transform(scene(grey, stored), np.random.default_rng(seed))
        inside = row["mask"] != 255
        same = row["image"][..., 0][inside] == row["mask"][inside] + 1
        assert same.mean() > 0.8
        flipped = row["mask"][:, ::-1]
        mirrored.append((row["image"][..., 0] == flipped + 1)[inside & (flipped != 255)].mean())
    assert np.mean(mirrored) < 0.7


def test_half_of_the_pictures_are_mirrored():
    """Class 0 is on the left of every picture, and the crop holds all of it."""
    stored = np.full((40, 60), 2, np.uint8)
    stored[:, :30] = 1
    photo = np.zeros((40, 60, 3), np.uint8)
    options = {"scale": (60, 40), "ratio": (1.0, 1.0)}
    for flip, share in ((True, 0.5), (False, 0.0)):
        transform = make(64, flip=flip, **options)
        masks = [
            transform(scene(photo, stored), np.random.default_rng(seed))["mask"]
            for seed in range(1000)
        ]
        assert abs(np.mean([mask[0, 0] == 1 for mask in masks]) - share) <= 0.064 * (share > 0)


def test_what_lies_outside_the_picture_is_filled_and_ignored(photo):
    transform = make(256, ratio=(1.0, 1.0))
    row = transform(scene(photo, np.full((150, 200), 7, np.uint8)), np.random.default_rng(0))
    assert (row["mask"][:128, :171] == 6).all()
    outside = np.ones((256, 256), bool)
    outside[:128, :171] = False
    assert (row["mask"][outside] == 255).all() and (row["image"][outside] == FILL).all()
    assert {name: e.padding for name, e in transform.elements.items()} == {"image": 0, "mask": 255}


def test_rounding_the_fill_costs_a_hundredth_after_normalisation():
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    filled = (np.round(255 * mean) / 255 - mean) / std
    assert 0 < np.abs(filled).max() < 0.01


def test_encoded_scenes_give_the_same_rows(photo):
    stored = blocks(1, 150, 200, (0, 1, 5, 150))
    encoded = Scene(encode(photo), encode(stored), "one", "one.png")
    rows = [make()(s, np.random.default_rng(3)) for s in (encoded, scene(photo, stored))]
    for name in ("image", "mask"):
        np.testing.assert_array_equal(rows[0][name], rows[1][name])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ratio", (2.0, 0.5)),
        ("ratio", (0.0, 1.0)),
        ("scale", (512, 0)),
        ("max_share", 0.0),
        ("max_share", 1.5),
    ],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"data.{field}="):
        make(**{field: value})
