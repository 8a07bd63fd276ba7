"""Dynamic Memory Compression for Megatron-LM: retrofit a model to compress its own KV cache, and generate from it."""

__version__ = "0.1.0"
