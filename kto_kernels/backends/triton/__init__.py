"""`backend="triton"`. `launch` launches the kernels of `logits` and `chunk`; `row` holds the functions for one row that
both of them call."""

from .launch import TritonBackend

__all__ = ["TritonBackend"]
