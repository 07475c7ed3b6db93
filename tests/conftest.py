"""Every test starts from one seed, on one thread, with no backend asked for."""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which no import below does

import route_kernels as rk


def pytest_configure():
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        patch_the_language_once_a_launch()


def patch_the_language_once_a_launch():
    """Triton's interpreter does it again whenever a kernel calls a function: a third to a half of a test's time."""
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # a Triton that does it in another way
        return
    patch = interpreter._patch_lang

    def patch_once(function):
        modules = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if modules and all(module.static_print is print for module in modules):  # as the patch leaves it
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._patch_lang = patch_once


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
