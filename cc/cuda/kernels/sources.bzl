"""The sources of kernels."""

KERNELS = [
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
