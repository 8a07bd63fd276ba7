"""Everything is declared in pyproject.toml; this file is where the CUDA extension under csrc/ will be built."""

from setuptools import setup

setup()
