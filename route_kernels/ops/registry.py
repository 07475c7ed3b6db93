"""The library `route_kernels` of Python-defined torch ops; `OPS` lists what has been registered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from ..graphs import not_traced
from .contract import has_tangent, unsupported

_library = torch.library.Library("route_kernels", "DEF")
OPS: list[str] = []


class Backward(NamedTuple):
    """The op that differentiates another. Its arguments are found by their names.

    `grad_output` is the gradient of the first output; others are called as an input or an output of the forward op,
    which keeps it, or `<input>_grad`: whether that input, or the last tensor of that list, asks for a gradient.
    """

    schema: str
    kernel: Callable
    fake: Callable
    gradients: Callable[[Sequence[torch.Tensor], dict[str, object]], dict[str, object]]
    """(what the kernel returns, its arguments by name) -> the gradients of the forward op's inputs by name."""


def register(
    schema: str, kernel: Callable, fake: Callable, backward: Backward | None = None, tags: Sequence[torch.Tag] = ()
) -> None:
    """Defines `route_kernels::<schema>` with its real kernel, its fake (shapes only), its rules for vmap, its backward.

    Differentiating a backward op again is a clear error instead of a silent zero.
    """
    overload = _define(schema, kernel, fake, tags)
    if backward is None:
        return
    of_backward = _define(backward.schema, backward.kernel, backward.fake, tags)
    _differentiate(overload, _formula(overload, of_backward, backward.gradients))
    _differentiate(of_backward, (lambda ctx, inputs, outputs: None, _second_derivative(overload)))


def _define(schema: str, kernel: Callable, fake: Callable, tags: Sequence[torch.Tag]) -> torch._ops.OpOverload:
    name = schema[: schema.index("(")]
    _library.define(schema, tags=tags)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"route_kernels::{name}", fake, lib=_library)
    packet, _, overload_name = name.partition(".")
    overload = getattr(getattr(torch.ops.route_kernels, packet), overload_name or "default")
    torch.library.register_vmap(f"route_kernels::{name}", _one_call_each(overload), lib=_library)
    if _returns_list(overload):
        _library.impl(name, _refusal(overload), "Batched")
    OPS.append(name)
    return overload


def _name(overload: torch._ops.OpOverload) -> str:
    return overload._opname.removesuffix("_backward")


def _returns_list(overload: torch._ops.OpOverload) -> bool:
    return isinstance(overload._schema.returns[0].type, torch.ListType)


# ---- differentiation ------------------------------------------------------------------------------------------------


class _Arguments:
    """An op's arguments, one after the other, and flat: an autograd.Function sees no tensor within a list.

    An op has one list of tensors at most; flat, its tensors come last.
    """

    def __init__(self, overload: torch._ops.OpOverload):
        arguments = overload._schema.arguments
        self.names = [argument.name for argument in arguments]
        lists = [i for i, argument in enumerate(arguments) if str(argument.type) == "List[Tensor]"]
        self.list_at = lists[0] if lists else None

    def flat(self, given: Sequence[object]) -> Sequence[object]:
        at = self.list_at
        return given if at is None else (*given[:at], *given[at + 1 :], *given[at])

    def as_given(self, flat: Sequence[object]) -> Sequence[object]:
        at, fixed = self.list_at, len(self.names) - 1
        return flat if at is None else (*flat[:at], list(flat[fixed:]), *flat[at:fixed])

    def flat_by_name(self, found: dict[str, object], listed: int) -> list[object]:
        """One gradient, or None, for each flat argument, of which `listed` are in the list."""
        at = self.list_at
        fixed = [found.get(name) for i, name in enumerate(self.names) if i != at]
        return fixed if at is None else [*fixed, *found.get(self.names[at], (None,) * listed)]


def _formula(
    overload: torch._ops.OpOverload, of_backward: torch._ops.OpOverload, gradients: Callable
) -> tuple[Callable, Callable]:
    """The functions that autograd calls: setup(ctx, inputs, outputs) after the op, and backward(ctx, *grads)."""
    arguments = _Arguments(overload)
    names = [argument.name for argument in of_backward._schema.arguments]
    known = [*arguments.names, *(output.name for output in overload._schema.returns)]
    kept = [name for name in names if name in known]
    places = [known.index(name) for name in kept]
    asked = [name for name in names if name not in known and name != "grad_output"]
    fixed = [name for i, name in enumerate(arguments.names) if i != arguments.list_at]
    needs = [fixed.index(of) if (of := name.removesuffix("_grad")) in fixed else -1 for name in asked]
    list_kept = None if arguments.list_at is None else kept.index(arguments.names[arguments.list_at])

    def setup(ctx, inputs, outputs):
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        every = (*inputs, *outputs)
        saved = [every[place] for place in places]
        listed = () if list_kept is None else saved[list_kept]
        tensors = [x if isinstance(x, torch.Tensor) else None for x in saved]
        ctx.others = [None if isinstance(x, torch.Tensor) else x for x in saved]
        if list_kept is not None:
            ctx.others[list_kept] = None
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        ctx.save_for_backward(*tensors, *listed)

    def backward(ctx, grad_output, *_):
        needed = ctx.needs_input_grad[1:]
        if grad_output is None:
            return (None,) * len(needed)
        tensors = ctx.saved_tensors
        count = len(kept)
        values = [
            other if tensor is None else tensor for tensor, other in zip(tensors[:count], ctx.others, strict=True)
        ]
        if list_kept is not None:
            values[list_kept] = list(tensors[count:])
        named = dict(zip(kept, values, strict=True))
        named["grad_output"] = grad_output
        named.update((name, needed[i]) for name, i in zip(asked, needs, strict=True))
        found = gradients(of_backward(*(named[name] for name in names)), named)
        return arguments.flat_by_name(found, len(tensors) - count)

    return setup, backward


def _second_derivative(overload: torch._ops.OpOverload) -> Callable:
    def backward(ctx, *grads):
        raise RuntimeError(unsupported(_name(overload), "second derivatives are"))

    return backward


def _differentiate(overload: torch._ops.OpOverload, formula: tuple[Callable, Callable]) -> None:
    """Gives the op its kernel for the key Autograd: `torch.library.register_autograd`, and torch.func's transforms."""
    setup, differentiate = formula
    arguments, returns_list = _Arguments(overload), _returns_list(overload)
    below = torch._C._after_autograd_keyset

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, *flat):
            inputs = arguments.as_given(flat)
            transformed = torch._C._are_functorch_transforms_active()
            with _for_the_next_transform() if transformed else _UNCHANGED, torch._C._AutoDispatchBelowAutograd():
                output = overload.redispatch(keyset & below, *inputs)
            setup(ctx, inputs, output)
            return tuple(output) if returns_list else output

        @staticmethod
        @not_traced
        def backward(ctx, *grads):
            return None, *differentiate(ctx, *grads)

    @not_traced  # an op called after a break of a graph is one step
    def kernel(keyset, *args):
        if forward_ad._current_level >= 0:
            _expect_no_tangents(overload, arguments.flat(args))
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            with torch._C._AutoDispatchBelowAutograd():
                return overload.redispatch(keyset & below, *args)
        transformed = torch._C._are_functorch_transforms_active()
        apply = partial(_apply_to_one_transform, Formula) if transformed else Formula.apply
        output = apply(keyset, *arguments.flat(args))
        return list(output) if returns_list else output

    _library.impl(overload.name().partition("::")[2], kernel, "Autograd", with_keyset=True)


_UNCHANGED = nullcontext()


@contextmanager
def _for_the_next_transform() -> Iterator[None]:
    """Both modes of differentiation on, which the Function of the innermost transform has turned off."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


def _apply_to_one_transform(formula: type[torch.autograd.Function], *args: object) -> object:
    """`formula.apply`, for the innermost of torch.func's transforms alone, as built-in ops do it."""
    from torch._functorch.autograd_function import enable_single_level_autograd_function

    with enable_single_level_autograd_function():
        return super(torch.autograd.Function, formula).apply(*args)


def _expect_no_tangents(overload: torch._ops.OpOverload, args: tuple) -> None:
    for argument in args:
        if isinstance(argument, torch.Tensor) and has_tangent(argument):
            raise RuntimeError(unsupported(_name(overload), "forward-mode differentiation is"))


# ---- torch.vmap -----------------------------------------------------------------------------------------------------


def _one_call_each(overload: torch._ops.OpOverload) -> Callable:
    """The op's rule for torch.vmap."""

    def of_call(argument, dim, i):
        if isinstance(dim, list | tuple):
            return [of_call(x, d, i) for x, d in zip(argument, dim, strict=True)]
        return argument if dim is None else argument.select(dim, i)

    def call_each(info, dims, *args):
        if info.batch_size == 0:
            raise ValueError(f"{_name(overload)}: torch.vmap: expected at least one call, got a dimension of size 0")
        outputs = [overload(*of_call(args, dims, i)) for i in range(info.batch_size)]
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


# ---- plain PyTorch inside a kernel ----------------------------------------------------------------------------------

_AUTOGRAD = ("AutogradFunctionality", "AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView")


def gradients(function: Callable, inputs: Sequence[torch.Tensor], grad_output: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of `function(*inputs)`, inside a kernel: PyTorch runs those with autograd out of its dispatch."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        return list(torch.autograd.grad(function(*leaves), leaves, grad_output))
