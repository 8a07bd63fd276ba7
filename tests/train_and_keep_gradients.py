"""`megatron-dmc train` that also saves its first step's gradients, as if they were weights, in a folder given first."""

import sys
from pathlib import Path


def keep_gradients(folder: Path) -> None:
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model
    from megatron.training import training

    train_step = training.train_step

    def first_step(forward_step, data, model, optimizer, *args, **kwargs):
        if folder.exists():
            return train_step(forward_step, data, model, optimizer, *args, **kwargs)
        step = optimizer.step

        def save_and_step():
            optimizer.step = step
            (chunk,) = unwrap_model(model)
            weights = {p: p.data.clone() for p in chunk.parameters()}
            for p in weights:
                p.data.copy_(p.main_grad)  # in place: hooks hang on the parameters
            if torch.distributed.get_rank() == 0:
                folder.mkdir(parents=True)
            torch.distributed.barrier()
            dist_checkpointing.save(chunk.sharded_state_dict(), str(folder))
            for p, data in weights.items():
                p.data.copy_(data)
            return step()

        optimizer.step = save_and_step
        return train_step(forward_step, data, model, optimizer, *args, **kwargs)

    training.train_step = first_step


if __name__ == "__main__":
    from megatron_dmc.commands import train
    from megatron_dmc.cpu import emulate_cuda

    emulate_cuda()
    keep_gradients(Path(sys.argv.pop(1)))
    train.main()
