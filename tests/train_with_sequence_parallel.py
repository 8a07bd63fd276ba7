"""`megatron-dmc train` on torch's own norms with `--sequence-parallel`, for which Megatron asks for Transformer Engine.

A norm of a rank's tokens is what it is for all of them. Its weight's gradients are to be summed over the ranks, which
Megatron does for parameters that say so.
"""


def allow_sequence_parallel() -> None:
    import copy

    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    make = WrappedTorchNorm.__new__

    def with_tokens_shared_out(cls, config, *args, **kwargs):
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = make(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = staticmethod(with_tokens_shared_out)


if __name__ == "__main__":
    from megatron_dmc.commands import train
    from megatron_dmc.cpu import emulate_cuda

    emulate_cuda()
    allow_sequence_parallel()
    train.main()
