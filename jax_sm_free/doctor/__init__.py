"""`python -m jax_sm_free.doctor`: whether a machine or a cluster is ready; see `__main__`."""
