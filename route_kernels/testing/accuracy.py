"""The tolerance policy: measured, not chosen.

Against float64, an op's error may be at most twice the error that PyTorch's own operators make for the same formula in
the same dtype. The root mean square over a result is compared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import route_kernels as rk

from ..precision import accumulate_dtype
from .arguments import Arguments, converted, map_tensors, named_tensors
from .eager import EAGER


def outcome(
    function: Callable[..., torch.Tensor], arguments: Arguments, grad_output: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """{"output": ...} and, with grad_output, {"grad NAME": ...} of each argument that requires a gradient."""
    output = function(**arguments)
    results = {"output": output.detach()}
    wanted = {name: tensor for name, tensor in named_tensors(arguments) if tensor.requires_grad}
    if grad_output is not None and wanted:
        grads = torch.autograd.grad(output, list(wanted.values()), grad_output.to(output.dtype))
        results |= {f"grad {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return results


def root_mean_square(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def errors(
    ours: dict[str, torch.Tensor], eager: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]
) -> dict[str, tuple[float, float]]:
    """For each result (RMS error of ours, the error allowed): twice eager's, plus what rounding of the result costs.

    That cost is eps in the result's dtype relative to the result, and 4 eps of the accumulation relative to the largest
    gradient of the call (a gradient that cancels to zero still carries the rounding of its terms). The yardstick is
    float64, with an error of its own: for float64 results the cost counts 64 times.
    """
    largest = max((root_mean_square(grad) for name, grad in exact.items() if name != "output"), default=0.0)
    found = {}
    for name, expected in exact.items():
        dtype = ours[name].dtype
        rounding = torch.finfo(dtype).eps * root_mean_square(expected)
        rounding += 4 * torch.finfo(accumulate_dtype(dtype)).eps * (largest if name != "output" else 0.0)
        allowed = 2 * root_mean_square(eager[name].double() - expected)
        allowed += rounding * (64 if dtype == torch.float64 else 1)
        found[name] = root_mean_square(ours[name].double() - expected), allowed
    return found


def assert_as_accurate(
    ours: dict[str, torch.Tensor], eager: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]
) -> None:
    """Raises AssertionError, naming every result that is missing or whose error is above the allowed one."""
    if ours.keys() != exact.keys():
        raise AssertionError(f"expected results {sorted(exact)}, got {sorted(ours)}")
    shapes = [name for name in exact if ours[name].shape != exact[name].shape]
    if shapes:
        raise AssertionError(f"wrong shapes of {shapes}")
    bad = [
        f"{name}: RMS error {error:.3g}, allowed {allowed:.3g}"
        for name, (error, allowed) in errors(ours, eager, exact).items()
        if not error <= allowed
    ]
    if bad:
        raise AssertionError("; ".join(bad))


def yardstick(op: str, arguments: Arguments) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(grad_output, results of PyTorch's own operators in the dtypes of the arguments, results in float64)."""
    of_op: Callable[..., torch.Tensor] = getattr(rk, op)
    with rk.backend("reference"):
        doubles = converted(arguments, torch.float64)
        output = of_op(**doubles)
        generator = torch.Generator().manual_seed(0)
        dtype = next(tensor.dtype for _, tensor in named_tensors(arguments))
        grad_output = torch.randn(output.shape, dtype=torch.float64, generator=generator).to(output.device, dtype)
        exact = outcome(of_op, doubles, grad_output)
    return grad_output, outcome(EAGER[op], arguments, grad_output), exact


def check_accuracy(op: str, arguments: Arguments, function: Callable[..., torch.Tensor] | None = None) -> None:
    """Forward and every gradient of `function` (default: the public op) against the reference in float64.

    Raises:
        AssertionError: an error is above twice that of PyTorch's own operators in the dtypes of the arguments.
    """
    grad_output, eager, exact = yardstick(op, arguments)
    fresh = map_tensors(arguments, lambda x: x.detach().requires_grad_(x.requires_grad))
    assert_as_accurate(outcome(function or getattr(rk, op), fresh, grad_output), eager, exact)
