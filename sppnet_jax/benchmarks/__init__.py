"""Measurements of speed: one module per suite, run by `python -m sppnet_jax.bench`."""
