"""Groups of processes on this machine, for tests and for benchmarks."""
