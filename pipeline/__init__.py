"""Sweeps of variational autoencoders against plain autoencoders, a whole grid trained as one batched program."""

import atexit
import gc
import os

# Without it MKL rounds by the address of a matrix, hence by a cell's place in the stack. MKL reads it at its first product.
os.environ.setdefault("MKL_CBWR", "AUTO")

# Else Python looks through all that torch and MLflow made once more when a process ends: a second or two of every command.
atexit.register(gc.freeze)
