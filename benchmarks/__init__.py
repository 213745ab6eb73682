"""Benchmarks of jax_sm_free."""
