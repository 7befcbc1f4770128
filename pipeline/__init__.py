"""Sweeps of variational autoencoders against plain autoencoders, a whole grid trained as one batched program."""
