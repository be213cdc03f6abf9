"""Two-stream attention of MaPeT and PIM: content and query streams over one set of keys."""

from mapet_kernels.two_stream_attention.op import two_stream_attention, two_stream_attention_packed

__all__ = ["two_stream_attention", "two_stream_attention_packed"]
