"""Autocast as CUDA does it, on (fake) CPU tensors.

PyTorch's CPU autocast runs the same operators in the lower precision but fewer in float32. The rest of CUDA's float32
list (ATen's `autocast_mode.h`) is added while a plan is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

HALF = (torch.float16, torch.bfloat16)
INPUTS_IN_FLOAT32 = (
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt"),
    *("sinh", "tan", "softplus", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "layer_norm"),
    *("native_layer_norm", "group_norm", "cosine_similarity", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss"),
    *("kl_div", "nll_loss", "binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm", "logsumexp"),
)
RESULT_IN_FLOAT32 = (
    *("prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "sum", "sum.dim_IntList"),
)
"""These sum in float32 without a copy of their input in it."""


@contextmanager
def mixed_precision(dtype: torch.dtype) -> Iterator[torch.autocast]:
    """Gives the autocast region to enter for the forward; stay inside over backward too, where forwards are redone.

    dtype: float32 (the region does nothing), bfloat16 or float16; parameters stay float32.
    """
    library = torch.library.Library("aten", "IMPL")
    try:
        for names, call in ((INPUTS_IN_FLOAT32, _with_wide_inputs), (RESULT_IN_FLOAT32, _with_wide_result)):
            for name in names:
                if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCPU"):
                    library.impl(name, _outside_autocast(name, call), "AutocastCPU")
        yield torch.autocast("cpu", dtype if dtype in HALF else torch.bfloat16, enabled=dtype in HALF)
    finally:
        library._destroy()


def _outside_autocast(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload or "default")
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return call(op, args, kwargs)

    return kernel


def _with_wide_inputs(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    return op(*tree_map_only(torch.Tensor, _widened, args), **tree_map_only(torch.Tensor, _widened, kwargs))


def _with_wide_result(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    names = [argument.name for argument in op._schema.arguments]
    given_dtype = dict(zip(names, args, strict=False)).get("dtype") or kwargs.get("dtype")
    if given_dtype is not None or args[0].dtype not in HALF:
        return op(*args, **kwargs)
    return op(*args[: names.index("dtype")], **{**kwargs, "dtype": torch.float32})


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor
