"""The library `route_kernels` of Python-defined torch ops; `OPS` lists what has been registered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad

from ..graphs import not_traced
from .contract import has_tangent, unsupported

_library = torch.library.Library("route_kernels", "DEF")
OPS: list[str] = []


def register(
    schema: str,
    kernel: Callable,
    fake: Callable,
    *,
    tags: Sequence[torch.Tag] = (),
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> None:
    """Defines `route_kernels::<schema>` with its real kernel, its fake (shapes only) and its autograd formula."""
    name = schema[: schema.index("(")]
    qualified = f"route_kernels::{name}"
    _library.define(schema, tags=tags)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    packet, _, overload_name = name.partition(".")
    overload = getattr(getattr(torch.ops.route_kernels, packet), overload_name or "default")
    torch.library.register_vmap(qualified, _one_call_each(overload), lib=_library)
    if _returns_list(overload):
        _library.impl(name, _refusal(overload), "Batched")
    if backward is not None:
        _library.impl(name, _autograd(overload, setup_context, backward), "Autograd", with_keyset=True)
    OPS.append(name)


def register_backward(
    op: str, schema: str, kernel: Callable, fake: Callable, *, tags: Sequence[torch.Tag] = ()
) -> None:
    """Defines the backward op of `op`; differentiating it again is a clear error instead of a silent zero."""

    def backward(ctx, *grads):
        raise RuntimeError(unsupported(op, "second derivatives are"))

    register(schema, kernel, fake, tags=tags, setup_context=lambda ctx, inputs, output: None, backward=backward)


def _name(overload: torch._ops.OpOverload) -> str:
    return overload._opname.removesuffix("_backward")


def _returns_list(overload: torch._ops.OpOverload) -> bool:
    return isinstance(overload._schema.returns[0].type, torch.ListType)


def _autograd(overload: torch._ops.OpOverload, setup_context: Callable, backward: Callable) -> Callable:
    """The op's kernel for the key Autograd: `torch.library.register_autograd`, and torch.func's transforms besides."""
    returns_list = _returns_list(overload)

    def below(keyset, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            *inputs, keyset = args
            with _for_the_next_transform():
                output = below(keyset, *inputs)
            setup_context(ctx, inputs, output)
            return tuple(output) if returns_list else output

        @staticmethod
        @not_traced
        def backward(ctx, *grads):
            grads = backward(ctx, *grads)
            return *(grads if isinstance(grads, tuple) else (grads,)), None

    @not_traced  # an op called after a break of a graph is one step
    def kernel(keyset, *args):
        if forward_ad._current_level >= 0:
            _expect_no_tangents(overload, args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return below(keyset, *args)
        output = _apply(Formula, *args, keyset)
        return list(output) if returns_list else output

    return kernel


def _apply(formula: type[torch.autograd.Function], *args: object) -> object:
    """`formula.apply`, for the innermost of torch.func's transforms alone if there are any, as built-in ops do it."""
    if not torch._C._are_functorch_transforms_active():
        return formula.apply(*args)
    from torch._functorch.autograd_function import enable_single_level_autograd_function

    with enable_single_level_autograd_function():
        return super(torch.autograd.Function, formula).apply(*args)


@contextmanager
def _for_the_next_transform() -> Iterator[None]:
    """Both modes of differentiation on, which the Function of the innermost transform has turned off."""
    if not torch._C._are_functorch_transforms_active():
        yield
        return
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


def _expect_no_tangents(overload: torch._ops.OpOverload, args: tuple) -> None:
    for argument in args:
        if isinstance(argument, torch.Tensor) and has_tangent(argument):
            raise RuntimeError(unsupported(_name(overload), "forward-mode differentiation is"))


def _one_call_each(overload: torch._ops.OpOverload) -> Callable:
    """The op's rule for torch.vmap."""

    def call_each(info, dims, *args):
        if info.batch_size == 0:
            raise ValueError(f"{_name(overload)}: torch.vmap: expected at least one call, got a dimension of size 0")
        batched = [isinstance(dim, int) for dim in dims]  # a list's dims are a list
        outputs = [
            overload(*(x.select(dim, i) if sliced else x for x, dim, sliced in zip(args, dims, batched, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(outputs[0], torch.Tensor):
            return torch.stack(outputs), 0
        stacked = type(outputs[0])(map(torch.stack, zip(*outputs, strict=True)))
        return stacked, type(stacked)(0 for _ in stacked)

    return call_each


def _refusal(overload: torch._ops.OpOverload) -> Callable:
    """The rule of autograd's own, older vmap for an op that returns a list: it has none."""

    def refuse(*args):
        raise RuntimeError(
            unsupported(_name(overload), "is_grads_batched=True, unlike torch.vmap of torch.func.vjp, is")
        )

    return refuse


_AUTOGRAD = ("AutogradFunctionality", "AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView")


def gradients(function: Callable, inputs: Sequence[torch.Tensor], grad_output: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of `function(*inputs)`, inside a kernel: PyTorch runs those with autograd out of its dispatch."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        return list(torch.autograd.grad(function(*leaves), leaves, grad_output))
