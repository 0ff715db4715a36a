"""Triton kernels, one mechanism a file: each with the function that launches it on tensors of any framework."""
