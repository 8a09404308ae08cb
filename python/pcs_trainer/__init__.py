"""Personalizing Stable Diffusion: the UNet, the models and the trainer on top of pcs_kernels."""
