"""What tests of the core share."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Many tiny operations go faster without a pool of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
