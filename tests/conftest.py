"""Every test starts from one seed, on one thread, with no backend asked for."""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which no import below does

import route_kernels as rk


@pytest.fixture(autouse=True)
def same_start():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    left_behind = rk.requested_backend()
    rk.set_backend(None)
    assert left_behind is None, f"a test left backend {left_behind!r} behind"
