"""Transport "cuda_peer": copy engines write into the memory of the other GPUs."""

from jax_sm_free.transports.one_process import OneProcess


class CudaPeer(OneProcess):
    """Connects the GPUs of this process, which need peer access to each other."""

    name = "cuda_peer"
    platform = "cuda"
