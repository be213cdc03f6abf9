"""Kernels of masked and permuted attention, token embedding and k-means. Needs torch (and triton), never mapet."""
