"""Triton kernels and their launches, one file per loss. Imported on first use, so that triton stays optional."""
