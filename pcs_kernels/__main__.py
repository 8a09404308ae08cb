"""python -m pcs_kernels: which backend each op runs on this machine, and why the others are off."""

from .diagnostics import table

if __name__ == "__main__":
    print(table())
