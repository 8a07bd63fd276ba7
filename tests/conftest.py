"""Shared fixtures. Random inputs are fresh in every run; the seed is printed with a failure, and DMC_TEST_SEED repeats it."""

import os
import secrets

import pytest
import torch


@pytest.fixture
def fresh_seed():
    seed = int(os.environ.get("DMC_TEST_SEED") or secrets.randbits(31))
    print(f"DMC_TEST_SEED={seed}")
    torch.manual_seed(seed)
    return seed
