"""The sources of kernels."""

KERNELS = [
    "forward_route.cu",
    "forward_rows.cu",
    "forward_sums.cu",
    "pack.cu",
    "pack_quantized.cu",
    "pack_sums.cu",
    "plan.cu",
    "route.cu",
    "spread.cu",
    "sum.cu",
    "unpack_dequantized.cu",
    "unpack_experts.cu",
    "unpack_tokens.cu",
    "wait.cu",
]
