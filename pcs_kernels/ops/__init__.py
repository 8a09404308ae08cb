"""One folder an op: contract and gradient (`op.py`), equations (`reference.py`), and the implementations."""
