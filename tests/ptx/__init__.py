"""A GPU without a GPU: Triton's compiled kernels executed from their PTX, in numpy, all threads of a block in lockstep.

`launcher.device(86)` is the way in; README.md says what it proves and what it does not.
"""
