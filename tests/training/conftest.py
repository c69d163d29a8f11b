"""Each test of training has the process's environment to itself."""

import os
from unittest import mock

import pytest


@pytest.fixture(autouse=True)
def own_environment():
    """Some versions of `Trainer` set variables for `bf16` and `torch_compile`, and leave them to the next run."""
    with mock.patch.dict(os.environ):
        yield
