"""The network: a hand-written UNet of the Stable Diffusion family on the ops of pcs_kernels."""
