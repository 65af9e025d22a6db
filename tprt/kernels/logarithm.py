"""The constants of the logarithm that CPUs and GPUs compute to the same bits: by the same additions and
multiplications in the same order, each rounded. Knows nothing of Triton, so that plain torch can take it too.
"""

from __future__ import annotations

# log(1 + f) / f for f from sqrt(1/2) - 1 to sqrt(2) - 1, fitted at Chebyshev nodes; highest power first. Every
# constant is a float32, so that no conversion rounds it.
COEFFICIENTS = (
    -0.10134056955575943,
    0.1623418927192688,
    -0.17247013747692108,
    0.19898565113544464,
    -0.24970071017742157,
    0.33335113525390625,
    -0.5000036358833313,
    0.9999999403953552,
)
LOG_TWO = 0.6931471824645996
SQRT_HALF_BITS = 0x3F3504F3
"""The bits of sqrt(1/2): from there to sqrt(2) a number's exponent counts as 0."""
