"""Pictures of every depth and format: what they become, and what is refused with a reason."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
from PIL import Image, ImageOps
import pytest

from fd_jax.data import decoding
from fd_jax.data.decoding import BrokenImageError, decode

RAMP = np.tile(np.arange(256, dtype=np.uint16) * 257, (8, 1))  # every high byte once per row


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(high_byte):
    return np.repeat(np.asarray(high_byte, np.uint8)[..., None], 3, axis=-1)


def tiff(rows, *, bits, photometric=1):
    """A grey TIFF of one strip. rows: packed bytes of all rows; 16 pixels wide, one row high."""
    tags = [(256, 16), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1)]
    tags += [(278, 1), (279, len(rows))]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in tags
    )
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + rows


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_becomes_its_high_byte(kind):
    np.testing.assert_array_equal(decode(encode(Image.fromarray(RAMP), kind)), grey(RAMP >> 8))


def test_16_bit_grey_and_16_bit_rgb_become_the_same():
    """The RGB file is written by hand, since Pillow writes none."""
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in RAMP)
    header = struct.pack(">IIBBBBB", 256, 8, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    file = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    theirs = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    np.testing.assert_array_equal(decode(file), theirs)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(RAMP), "PNG")), theirs)
    # Negative control: Pillow's own conversion of 16-bit grey clips all but the first to white.
    clipped = np.asarray(Image.fromarray(RAMP).convert("L"))
    assert len(np.unique(clipped)) < 4


def test_12_bit_grey_uses_its_own_range():
    values = np.arange(16) * 273  # 0 to 4095
    pairs = values.reshape(-1, 2)
    packed = bytes(byte for a, b in pairs for byte in (a >> 4, (a & 15) << 4 | b >> 8, b & 255))
    expected = grey(values >> 4)[None]
    for exif in (False, True):
        np.testing.assert_array_equal(decode(tiff(packed, bits=12), exif=exif), expected)


def test_16_bit_tiffs_in_which_zero_is_white_are_refused():
    rows = RAMP[0, :16].astype("<u2").tobytes()
    np.testing.assert_array_equal(decode(tiff(rows, bits=16)), grey(RAMP[:1, :16] >> 8))
    with pytest.raises(BrokenImageError, match="0 is white; save it with 0 as black"):
        decode(tiff(rows, bits=16, photometric=0))


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "floats"), ("int32", "integers")])
def test_pixels_without_a_known_range_are_refused(dtype, kind):
    data = encode(Image.fromarray(RAMP.astype(dtype)), "TIFF")
    with pytest.raises(BrokenImageError, match=f"32-bit {kind}, whose range is not known; save"):
        decode(data)
    with pytest.raises(BrokenImageError, match=f"pixels are {dtype}, whose range is not known"):
        decode(RAMP.astype(dtype))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,), (2,)], ids=str)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_arrays_of_every_number_of_channels(shape, dtype):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, np.iinfo(dtype).max, (5, 4, *shape), dtype=dtype, endpoint=True)
    high = pixels if dtype == "uint8" else (pixels // 256).astype(np.uint8)
    colours = 3 if shape and shape[0] > 2 else 1
    expected = np.broadcast_to(high.reshape(5, 4, -1)[..., :colours], (5, 4, 3))
    np.testing.assert_array_equal(decode(pixels), expected)


@pytest.mark.parametrize("shape", [(4,), (2, 4, 4, 3), (3, 4, 9)])
def test_arrays_of_other_shapes_are_refused(shape):
    with pytest.raises(BrokenImageError, match=r"pixels have the shape \["):
        decode(np.zeros(shape, np.uint8))


# --- formats ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "AVIF", "WEBP", "BMP", "PNG"])
def test_every_format_is_read_and_of_moving_pictures_the_first_frame(kind):
    first, second = (Image.new("RGB", (20, 10), colour) for colour in ("red", "blue"))
    moving = {"save_all": True, "append_images": [second]} if kind != "BMP" else {}
    pixels = decode(encode(first, kind, **moving))
    assert pixels.shape == (10, 20, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 2  # AVIF and WebP are lossy


def test_no_suffix_is_both_read_and_not_read():
    assert ".avif" in decoding.SUFFIXES  # Pillow's wheels have it
    assert not set(decoding.SUFFIXES) & set(decoding.UNREAD_SUFFIXES)


# --- size ------------------------------------------------------------------------------------


def huge(kind, width, height):
    """A picture whose header gives another size than that of its pixels."""
    data = bytearray(encode(Image.new("RGB", (16, 16)), kind))
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    elif kind == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    else:
        data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
@pytest.mark.parametrize("size", [(14_000, 13_000), (12_800, 13_908)], ids=str)
def test_huge_pictures_are_refused_alike_and_by_their_size(kind, size):
    """The second size is between our limit and Pillow's."""
    megapixels = f"{size[0] * size[1] / 1e6:.1f}"
    with pytest.raises(BrokenImageError, match=f"it has {megapixels} megapixels.* up to 178 are"):
        decode(huge(kind, *size))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF"])
def test_the_limit_is_the_same_number_of_pixels_in_every_format(kind, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 32 * 24)
    assert decode(encode(Image.new("RGB", (32, 24)), kind)).shape == (24, 32, 3)
    with pytest.raises(BrokenImageError, match="megapixels"):
        decode(encode(Image.new("RGB", (32, 25)), kind))


@pytest.mark.parametrize("load", [True, False], ids=["with fd_jax", "negative control"])
def test_pillow_does_not_warn_below_the_limit(tmp_path, load):
    (tmp_path / "large.png").write_bytes(huge("PNG", 10_000, 10_000))
    lines = ["from PIL import Image", f"Image.open({str(tmp_path / 'large.png')!r})"]
    if load:
        lines.insert(0, f"import runpy; runpy.run_path({decoding.__file__!r})")
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ("DecompressionBombWarning" in done.stderr) is not load


# --- EXIF ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_are_applied_on_request_only(kind, orientation):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8)).resize((40, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture, kind, exif=exif.tobytes())
    with Image.open(io.BytesIO(data)) as opened:
        stored = np.asarray(opened.convert("RGB")).astype(int)
        turned = np.asarray(ImageOps.exif_transpose(opened).convert("RGB")).astype(int)
    assert np.abs(decode(data) - stored).max() <= 1
    assert np.abs(decode(data, exif=True) - turned).max() <= 1
    if orientation > 1:  # negative control
        assert stored.shape != turned.shape or np.abs(stored - turned).max() > 20
