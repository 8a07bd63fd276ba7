"""A training script that knows Megatron and nothing of DMC, in the manner of Megatron's `pretrain_gpt.py`."""

from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args


def datasets(num_samples, vp_stage=None):
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed, sequence_length=args.seq_length, tokenizer=get_tokenizer(), split="90,5,5",
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, lambda: True, config).build()


def loss_function(mask, losses):
    loss, count = (losses * mask).sum(), mask.sum()
    return loss, count.int(), {"lm loss": torch.stack([loss.detach(), count])}


def forward_step(iterator, model):
    batch = {name: x.cuda() for name, x in next(iterator).items()}
    losses = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return losses, partial(loss_function, batch["loss_mask"])


if __name__ == "__main__":
    arguments = parse_and_validate_args()
    config = pretrain_cfg_container_from_args(arguments, gpt_config_from_args(arguments))
    datasets.is_distributed = True
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)
    assert parallel_state.is_initialized()
