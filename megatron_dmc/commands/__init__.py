"""The commands of `python -m megatron_dmc`, one file each."""
