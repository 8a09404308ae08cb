"""Runs on the true shapes of Stable Diffusion 1.5: `python -m benchmarks.real`."""
