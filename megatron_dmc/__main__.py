"""`python -m megatron_dmc COMMAND …`, the same as the console script `megatron-dmc`."""

from megatron_dmc.cli import main

if __name__ == "__main__":
    main()
