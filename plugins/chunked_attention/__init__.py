"""Kernels of `thoughtx::ChunkedAttention`, their PyTorch operator, and what ships them; see plugins/README.md."""
