"""A decoded image as RGB between 0 and 1, for any image mode, without loss of content.

Pillow's own conversion to RGB clips every mode to 0 … 255: 16-bit images become white (issue 11, A3). Here each mode is
scaled by its range; a mode without a range of its own (`I` and `F`, 32 bits) is refused. Transparent pixels are shown
on a white background, and the orientation recorded by the camera (EXIF) is applied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

GROUND = "white"
"""Background colour of transparent pixels."""
_EIGHT_BITS = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


def rgb(image: Any, side: int) -> NDArray[np.float32]:
    """Return a Pillow image, resized (bilinear) to [side, side, 3] float32 with values from 0 to 1.

    Raises ValueError with a clause that continues a sentence after the image's name.
    """
    from PIL import ImageOps
    from PIL.Image import Resampling, fromarray

    size = (side, side)
    format_ = image.format
    image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and format_ == "PNG"):
        levels = np.asarray(image).astype(np.float32) / np.float32(2**16 - 1)
        grey = np.asarray(fromarray(levels, mode="F").resize(size, Resampling.BILINEAR))
        return np.repeat(grey.clip(0, 1)[:, :, None], 3, axis=2)
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = _over_ground(image.convert("RGBA"))
    elif image.mode not in _EIGHT_BITS:
        raise ValueError(
            f"is of mode {image.mode}, whose values have no range of their own: store it with 8 or 16 bits per channel"
        )
    small = image.convert("RGB").resize(size, Resampling.BILINEAR)
    return np.asarray(small, dtype=np.float32) / np.float32(255)


def _over_ground(image: Any) -> Any:
    from PIL import Image

    return Image.alpha_composite(Image.new("RGBA", image.size, GROUND), image)
