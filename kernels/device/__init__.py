"""@triton.jit functions only: no torch, no allocation, no decisions; launch/ is the one caller."""
