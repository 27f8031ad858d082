"""Mixed precision: weights in float32, matrix products in half precision (Micikevicius et al. 2018, arXiv:1710.03740).

Under autocast torch chooses the type of each operation: products of matrices in bfloat16, sums, norms and losses in
float32. bfloat16 has the range of float32, so no loss has to be scaled.
"""

from __future__ import annotations

from labkit.quantization.full import Single


class BFloat16(Single):
    """Autocast to bfloat16, by Accelerate."""

    mixed_precision = "bf16"
