"""Decode the elements of a tensor from their bytes to numbers, for every dtype of torch."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from ..spec import DTYPES

if TYPE_CHECKING:
    import numpy as np

_DIRECT = {dtype: code for dtype, (_, code, *_) in DTYPES.items() if code}
"""NumPy's name of each dtype that it has."""

INTEGERS = frozenset(name for name, code in _DIRECT.items() if code.lstrip("<")[0] in "iu")

_SMALL: dict[str, tuple[int, int, int, str]] = {
    "float8_e4m3fn": (4, 3, 7, "last"),
    "float8_e4m3fnuz": (4, 3, 8, "minus zero"),
    "float8_e5m2": (5, 2, 15, "ieee"),
    "float8_e5m2fnuz": (5, 2, 16, "minus zero"),
    "float8_e8m0fnu": (8, 0, 127, "last"),
    "float4_e2m1fn_x2": (2, 1, 1, ""),
}
"""Bits of exponent and of fraction, bias, and which patterns are NaN. Source: OCP Microscaling Formats, OCP FP8, and
for the `fnuz` formats Noune et al., "8-bit Numerical Formats for Deep Neural Networks"."""


def decode(data: bytes | memoryview, dtype: str) -> np.ndarray:
    """Turn the bytes of elements into an array of at least their precision."""
    import numpy as np

    if dtype in _DIRECT:
        return np.frombuffer(data, _DIRECT[dtype])
    if dtype == "bfloat16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "complex32":
        return np.frombuffer(data, "<f2").astype(np.float32).view(np.complex64)
    codes = np.frombuffer(data, np.uint8)
    if dtype == "float4_e2m1fn_x2":  # the low half of a byte is the first element
        codes = np.stack((codes & 15, codes >> 4), axis=1).reshape(-1)
    return _values(dtype)[codes]


@cache
def _values(dtype: str) -> np.ndarray:
    """The value of each bit pattern of a small float."""
    import numpy as np

    exponent_bits, fraction_bits, bias, special = _SMALL[dtype]
    signed = dtype != "float8_e8m0fnu"
    patterns = 1 << (exponent_bits + fraction_bits)
    values = []
    for code in range(patterns):
        exponent, fraction = code >> fraction_bits, (code & ((1 << fraction_bits) - 1)) / (1 << fraction_bits)
        if exponent == 0 and signed:
            value = fraction * 2.0 ** (1 - bias)
        else:
            value = (1 + fraction) * 2.0 ** (exponent - bias)
        if (special == "last" and code == patterns - 1) or (special == "ieee" and exponent == 31 and fraction):
            value = float("nan")
        elif special == "ieee" and exponent == 31:
            value = float("inf")
        values.append(value)
    negative = [-value for value in values] if signed else []
    if special == "minus zero":
        negative[0] = float("nan")
    return np.array(values + negative, np.float32)
