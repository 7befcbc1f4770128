"""Sweeps of variational autoencoders against plain autoencoders, a whole grid trained as one batched program."""

import os

# Without it MKL rounds by the address of a matrix, hence by a cell's place in the stack. MKL reads it at its first product.
os.environ.setdefault("MKL_CBWR", "AUTO")
