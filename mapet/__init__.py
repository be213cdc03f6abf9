"""MaPeT: pre-training vision transformers by masked and permuted visual tokens."""

__version__ = "0.1.0"
