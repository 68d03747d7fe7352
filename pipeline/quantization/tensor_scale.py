"""The scale of a whole tensor, for formats whose groups' scales have a narrow range (NVFP4)."""

from __future__ import annotations

import math

from torch import Tensor

from pipeline.quantization.formats import Format, get_format

HEADROOM = 2.0
"""Factor between the scale that just covers a tensor's largest weight and the largest one that can
be stored: what error feedback and scale search may need beyond the former."""

MOST_EXPONENT = 100
"""Largest exponent of a tensor scale in size; products stay normal numbers of float32."""


def format_for(kind: str, weight: Tensor) -> Format:
    """The format called `kind`, with the tensor scale that suits `weight` if it has one.

    See `fit_tensor_scale`.
    """
    return fit_tensor_scale(get_format(kind), weight)


def fit_tensor_scale(fmt: Format, weight: Tensor) -> Format:
    """The format with the smallest power of two under which the covering scale of the largest
    weight has `HEADROOM`.

    Scales down to the 2^-12th of that one then have full precision, so what a tensor quantizes to
    does not depend on its unit: weights times 2 have scales times 2 and the same codes. A file
    could hold any float32, and next to nothing would be gained: the scales that groups want lie
    anywhere between two points of the lattice.

    Args:
        fmt: Any format; returned as it is if it has no tensor scale.
        weight: All rows that share it, [out, in].
    """
    if fmt.tensor_scale is None:
        return fmt
    largest = float(weight.detach().abs().max()) if weight.numel() else 0.0
    if not 0 < largest < math.inf:
        return fmt.at_tensor_scale(1.0)
    plain = fmt.at_tensor_scale(1.0)
    covering = largest / plain.levels[-1] * HEADROOM / plain.scale_lattice.max_value
    mantissa, exponent = math.frexp(covering)
    exponent -= mantissa == 0.5
    return plain.at_tensor_scale(2.0 ** max(-MOST_EXPONENT, min(MOST_EXPONENT, exponent)))
