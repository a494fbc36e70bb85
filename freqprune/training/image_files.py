"""Which files are images, and how one of them is read: upright, in 8 bits."""

from __future__ import annotations

import logging
import struct

import numpy as np
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import BITSPERSAMPLE

# Of a page of a TIFF, what it is: bit 0 is set for a smaller copy of another.
NEWSUBFILETYPE = 254

log = logging.getLogger(__name__)

# Those that torchvision's ImageFolder knows, and further ones of photographs; what else Pillow decodes lies beside
# images more often than among them.
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".jpe", ".jfif", ".jp2", ".avif",
           ".pbm", ".pnm")  # fmt: skip
# What Pillow raises for files that it cannot make out.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


_dark = False


def _tell_of_dark(name: str) -> None:
    """Once in a process: cameras of 12 bits are often saved as 16 as they are."""
    global _dark
    if not _dark:
        log.warning(
            "%s has 16 bits and nothing above 4095, of which 17 grey levels are left in 8 bits; if all images are so, "
            "as a camera of 12 bits leaves them, save them scaled to 16 bits", name
        )  # fmt: skip
    _dark = True


# By the number that EXIF has for how an image lies; 1 is upright.
_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
          5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_90}  # fmt: skip


def upright(image: Image.Image) -> Image.Image:
    """An image as it is shown. (`ImageOps.exif_transpose` writes the EXIF anew as well, and fails where a tag of it has
    another type than the standard's.)

    Raises:
        ValueError: for a TIFF of several pages, of which only the first would be read.
    """
    if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1 and (n_pages := _n_pages(image)) > 1:
        raise ValueError(f"it holds {n_pages} pages: save each, or the one that is meant, as a file of its own")
    image.load()
    try:
        turn = _TURNS.get(image.getexif()[ExifTags.Base.Orientation])
    except Exception:  # Whatever EXIF may hold, the pixels are there.
        turn = None
    return image if turn is None else image.transpose(turn)


def _n_pages(image: Image.Image) -> int:
    """Pages of a TIFF, without smaller copies of them."""
    found, copy_of_another = 0, 1
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        found += not int(getattr(image, "tag_v2", {}).get(NEWSUBFILETYPE, 0)) & copy_of_another
    image.seek(0)
    return found


def in_bytes(image: Image.Image, mode: str) -> Image.Image:
    """An image in a mode of 8 bits; one of 12 or 16 bits is scaled, where Pillow would cut it off at 255.

    Args:
        image: any image.
        mode: ``"RGB"`` or ``"L"``.

    Raises:
        ValueError: for pixels of 32 bits or floating point, whose white nobody can tell.

    >>> grey = Image.fromarray(np.array([[0, 257 * 40, 65535]], dtype=np.uint16))
    >>> np.array(in_bytes(grey, "L")).tolist()
    [[0, 40, 255]]
    """
    # Pillow scales what netpbm files hold to 16 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and getattr(image, "format", None) == "PPM"):
        values = np.asarray(image, dtype=np.float64)
        # Packed 12 bits, which Pillow leaves as they are.
        packed = getattr(image, "tag_v2", {}).get(BITSPERSAMPLE) == (12,)
        if not packed and 0 < values.max() < 2**12:
            _tell_of_dark(str(getattr(image, "filename", "") or "an image"))
        image = Image.fromarray(np.round(values * (255 / (2**12 - 1) if packed else 1 / 257)).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {image.mode}, whose white nobody can tell: save it with 8 or 16 bits")
    return image if image.mode == mode else image.convert(mode)
