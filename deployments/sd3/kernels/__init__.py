"""Triton kernels of the denoiser, each beside the plain way it replaces; imported on CUDA only."""
