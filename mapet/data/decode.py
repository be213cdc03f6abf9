"""An image file, as it is found in the wild, to an 8-bit RGB picture and its centre square."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mapet.errors import DataError
from mapet_kernels.regular import open_regular

# Only raster decoders: Pillow would otherwise follow the content of a file, not its name, into e.g. Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")


def decode(path: str | Path, *, name: str | None = None, plain: bool = False) -> Image.Image:
    """Read one image as 8-bit RGB.

    - CMYK, palette, grey and YCbCr are converted by Pillow; a colour profile is ignored.
    - 16-bit grey is scaled by 255/65535 and float grey in [0, 1] by 255, neither is clipped.
    - Alpha, or a transparent palette entry, is composited on white: what a viewer shows, not the hidden pixels.
    - The EXIF orientation is applied.
    - The first frame of an animation or of a multi-page file is taken.

    Args:
        path: the file.
        name: how errors call it; by default its path.
        plain: leave all that to Pillow's convert("RGB"), as the official code does: no orientation, 16-bit and float
            grey clipped at 255, alpha thrown away, so that hidden pixels show.
    Raises:
        DataError: naming the file: not readable, not an image, truncated, too many pixels (Pillow's
            `Image.MAX_IMAGE_PIXELS`), or pixel values without a known white.
    """
    try:
        # Pillow only warns between one and two times its pixel limit, and prints what it thinks of broken EXIF blocks.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
                image.load()
                return image.convert("RGB") if plain else to_rgb(_upright(image))
    except Exception as error:  # on damaged bytes the decoders raise nearly anything, from SyntaxError to struct.error
        raise DataError(f"cannot read image {name or path}: {_reason(error)}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode as RGB, by the rules of `decode`. ValueError for values without a known white."""
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bit(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    white = 1.0 if image.mode == "F" else 65535
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= white):  # written so that NaN fails
        raise ValueError(f"grey values from {low} to {high}, allowed are 0 to {white:g}; convert it to 8 or 16 bits")
    return Image.fromarray(np.rint(pixels * (255.0 / white)).astype(np.uint8))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing against the pixels
        return image


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image, or none of the formats {', '.join(FORMATS)}"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return (
            f"more than {Image.MAX_IMAGE_PIXELS} pixels (PIL.Image.MAX_IMAGE_PIXELS), which may be a decompression bomb"
        )
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"{type(error).__name__}: {error}"


def centre_square(image: Image.Image, size: int) -> np.ndarray:
    """The centre square of side min(W, H), resized to `size` pixels (bicubic, antialiased).

    This is the official pre-training crop. The official transform is torchvision's RandomResizedCrop with scale (1, 1)
    and ratio (1, 1): it asks for a square of area W x H, which fits in no image that is not square, so after ten tries
    it falls back to the largest centred crop of that ratio: the square taken here, odd margins rounded down alike.
    Where W and H differ by so little that sqrt(W x H) rounds to the shorter side, the official crop slides along the
    longer side by those pixels at random; here it stays in the centre, so that pixels and stored tokens always match.

    Args:
        image: RGB.
        size: side of the result in pixels.
    Returns:
        (3, size, size) uint8, contiguous.
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))
