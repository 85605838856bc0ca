"""From the bytes of a picture to 8-bit RGB, and which formats are read.

Every picture says what it is, or is refused with a reason. 16-bit grey becomes its high byte, as
16-bit RGB does in Pillow, instead of being clipped to white. Pixels whose range is not known,
floats and 32-bit integers, are refused. A picture of more than `MAX_PIXELS` is refused whatever its
format.
"""

import io
import re
import struct
import warnings

import numpy as np
from PIL import Image, ImageOps, features

_AVIF = (".avif",)
_HAS_AVIF = features.check("avif")  # the only format here that Pillow may lack
# Suffixes of the files that are read.
SUFFIXES = (
    *(".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(_AVIF if _HAS_AVIF else ()),
)
# Suffixes of files that a user takes for pictures, but that are not read.
UNREAD_SUFFIXES = tuple(
    ".heic .heif .hif .jp2 .j2k .jpf .jpx .jxl .jxr .psd .xcf .svg .svgz .eps .dng .cr2 .cr3 .nef "
    ".arw .orf .rw2 .raf .raw .ppm .pgm .pbm .pnm .tga .ico .pcx .exr .hdr .dcm".split()
) + (() if _HAS_AVIF else _AVIF)

MAX_PIXELS = 178_000_000  # just below the number from which Pillow itself refuses

_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive Huffman
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_UNKNOWN_RANGE = {"I": "32-bit integers", "F": "32-bit floats"}

# Pillow warns from half of its limit on; here, the limit alone counts.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BrokenImageError(Exception):
    """An example cannot be read or decoded; training continues with another one."""


def decode(image: bytes | np.ndarray, *, exif: bool = False) -> np.ndarray:
    """Decodes to RGB as torchvision's loader does: the first frame, alpha dropped.

    OpenCV decodes the common case, a complete JPEG in grey or YCbCr, to the same pixels as Pillow
    in three quarters of the time. Pillow decodes everything else. That includes truncated files,
    which Pillow refuses and OpenCV would fill with grey.

    Args:
      image: encoded bytes, or pixels that need no decoding: uint8, or uint16 of which the high byte
        is taken, [h, w] or [h, w, C] with 1 to 4 channels: grey or RGB, each with alpha or without.
      exif: whether the picture is turned as its EXIF orientation says. Pillow turns TIFFs in any
        case, whose orientation is part of the format.

    Returns:
      Pixels, uint8 [h, w, 3].

    Raises:
      BrokenImageError: the bytes are not a picture, it is truncated or too large, or its pixels
        have no known range.
    """
    if isinstance(image, np.ndarray):
        return _of_array(image)
    frame = _plain_jpeg_size(image)
    if frame is not None and not (exif and b"Exif\0\0" in image):
        import cv2

        _check_size(*frame)
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(image, np.uint8), flags)
        if pixels is not None:
            return pixels
    try:
        with Image.open(io.BytesIO(image)) as opened:
            _check_size(*opened.size)
            return _rgb(opened, exif=exif)
    except BrokenImageError:
        raise
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))  # Pillow's message begins with their number
        raise BrokenImageError(_too_large(int(pixels[0])) if pixels else str(error)) from error
    except Exception as error:  # Pillow's readers raise a dozen types of errors for bad bytes
        raise BrokenImageError(f"cannot decode: {error}") from error


def _of_array(pixels: np.ndarray) -> np.ndarray:
    """Checks pixels that need no decoding, and gives them three channels. -> uint8 [h, w, 3]"""
    if pixels.dtype not in (np.uint8, np.uint16):
        raise BrokenImageError(
            f"pixels are {pixels.dtype}, whose range is not known; expected uint8 or uint16"
        )
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or not 1 <= pixels.shape[-1] <= 4:
        raise BrokenImageError(
            f"pixels have the shape {list(pixels.shape)}; expected [h, w] or [h, w, C] with 1 to 4 "
            "channels"
        )
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.shape[-1] < 3:  # grey, with alpha or without
        return np.repeat(pixels[..., :1], 3, axis=-1)
    return pixels if pixels.shape[-1] == 3 else pixels[..., :3]


def _rgb(picture: Image.Image, *, exif: bool) -> np.ndarray:
    """8-bit RGB of a picture in any of Pillow's modes. -> uint8 [h, w, 3]"""
    tags = getattr(picture, "tag_v2", {})  # a turned copy has none
    if exif:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode in _UNKNOWN_RANGE:
        raise BrokenImageError(
            f"its pixels are {_UNKNOWN_RANGE[picture.mode]}, whose range is not known; save it "
            "with 8 or 16 bits per channel"
        )
    if not picture.mode.startswith("I;16"):
        return np.asarray(picture.convert("RGB"))
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts only those of 8 bits
        raise BrokenImageError("it is a 16-bit TIFF in which 0 is white; save it with 0 as black")
    bits = tags.get(_TIFF_BITS, (16,))[0]
    return _of_array((np.asarray(picture) << (16 - bits)).astype(np.uint16))


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a whole JPEG with one or three 8-bit channels; None for others."""
    if data[:2] != b"\xff\xd8" or b"\xff\xd9" not in data[-64:]:
        return None
    offset = 2
    while offset + 10 <= len(data) and data[offset] == 0xFF:
        marker, length = struct.unpack_from(">BH", data, offset + 1)
        if marker in _JPEG_FRAMES:
            bits, height, width, channels = struct.unpack_from(">BHHB", data, offset + 4)
            return (width, height) if bits == 8 and channels in (1, 3) else None
        offset += 2 + length
    return None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BrokenImageError(_too_large(width * height))


def _too_large(pixels: int) -> str:
    return (
        f"it has {pixels / 1e6:.1f} megapixels, and pictures of up to {MAX_PIXELS / 1e6:.0f} are "
        "read; scale it down"
    )
