"""Transport "in_process": a rank hands its packed message over to the other rank."""

from jax_sm_free.transports.one_process import OneProcess


class InProcess(OneProcess):
    """Connects the CPU devices of this process."""

    name = "in_process"
    platform = "cpu"
