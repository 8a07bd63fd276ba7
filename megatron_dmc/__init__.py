"""Dynamic Memory Compression for Megatron-LM: retrofit a model to compress its own KV cache, and generate from it."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`LLM` and `AsyncLLM`, imported when they are asked for: they bring Megatron with them."""
    if name in ("LLM", "AsyncLLM"):
        from megatron_dmc import llm

        return getattr(llm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
