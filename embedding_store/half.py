"""IEEE halves in kernels: numba has no half type, so they travel as their 16 bits.

Subnormals go by arithmetic on normal numbers, so that a thread which flushes denormals to zero (ONNX Runtime can be
told to) computes the same.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_TINY = np.float32(2.0**-24)  # value of the last bit of a subnormal half
_LEAST_EXPONENT = np.uint32(0x38800000)  # of a float32 whose half is normal: 2^-14
_TO_INFINITY = np.float32(2.0**112)
_BACK = np.float32(2.0**-110)


@njit(cache=True, nogil=True)
def half_to_float(bits: np.uint16) -> np.float32:
    """The float32 of a half, exact for all 65,536."""
    h = np.uint32(bits)
    sign = np.uint32((h & np.uint32(0x8000)) << np.uint32(16))
    magnitude = np.uint32(h & np.uint32(0x7FFF))
    if magnitude < np.uint32(0x0400):
        bits32 = np.float32(np.float32(magnitude) * _TINY).view(np.uint32)
    elif magnitude < np.uint32(0x7C00):
        bits32 = np.uint32((magnitude << np.uint32(13)) + np.uint32(0x38000000))
    else:
        bits32 = np.uint32((magnitude << np.uint32(13)) | np.uint32(0x7F800000))
    return np.uint32(bits32 | sign).view(np.float32)


@njit(cache=True, nogil=True)
def float_to_half(value: np.float32) -> np.uint16:
    """The nearest half, the even one of two that are equally near; infinite from 65520 on. NaN stays NaN.

    Without branches, as github.com/Maratyszcza/FP16 does it: adding a power of two whose last bit is worth as much as
    the half's makes the processor round.
    """
    bits = np.float32(value).view(np.uint32)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    # To infinity and back: 4 · |value|, infinite where the half is
    base = np.float32(np.float32(magnitude.view(np.float32) * _TO_INFINITY) * _BACK)
    exponent = np.uint32(magnitude & np.uint32(0x7F800000))
    exponent = max(exponent, _LEAST_EXPONENT)
    rounded = np.float32(np.uint32(exponent + np.uint32(0x07800000)).view(np.float32) + base).view(np.uint32)
    half = np.uint32(((rounded >> np.uint32(13)) & np.uint32(0x7C00)) + (rounded & np.uint32(0x0FFF)))
    half = half if magnitude <= np.uint32(0x7F800000) else np.uint32(0x7E00)
    return np.uint16(half | np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000)))
