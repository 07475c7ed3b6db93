"""The L feature levels that deformable attention samples: sizes and starts within the S flattened positions.

Inside the torch ops they are flat lists of ints: (h_1, w_1, ..., h_L, w_L) and (start_1, ..., start_L). Where a tensor
has no numbers yet (torch.compile, torch.export, fake tensors), each op's overload `tensor` takes it as it is, and reads
it where its kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch._subclasses.fake_tensor import is_fake

from .. import backends
from .contract import integer
from .registry import Backward, gradients, register

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)

LONGEST_SIDE = 2**24
"""Pixels up to which float32 coordinates can tell one from the next."""

SpatialShapes = torch.Tensor | Sequence[tuple[int, int]]
LevelStarts = torch.Tensor | Sequence[int] | None
PointCounts = torch.Tensor | Sequence[int] | None


_SHAPES = {"spatial_shapes": "[L, 2]", "level_start_index": "[L]", "points": "[L]"}
"""Shapes of the arguments that are levels, as tensors."""


def level_arguments(
    op: str, value: torch.Tensor, spatial_shapes: SpatialShapes, level_start_index: LevelStarts, points: PointCounts
) -> tuple[list[int] | torch.Tensor, list[int] | torch.Tensor | None, list[int] | torch.Tensor | None]:
    """The three arguments as `overload` takes them: flat lists of ints, or all tensors where one cannot be read yet.

    Raises:
        TypeError, ValueError: not integers, not of these shapes, or meta tensors beside a value that is none.
    """
    given = {"spatial_shapes": spatial_shapes, "level_start_index": level_start_index, "points": points}
    for name, argument in given.items():
        if isinstance(argument, torch.Tensor) and argument.is_meta and not value.is_meta:
            raise ValueError(f"{op}: {name}: expected numbers or a tensor that has some, got one on meta")
    if any(_has_no_numbers(argument) for argument in given.values()):
        return tuple(_as_tensor(op, name, argument) for name, argument in given.items())
    return tuple(flat_integers(op, name, argument) for name, argument in given.items())


def flat_integers(op: str, argument: str, numbers: SpatialShapes | LevelStarts | PointCounts) -> list[int] | None:
    """Pairs (h, w) of `spatial_shapes` -> [h_1, w_1, ..., h_L, w_L], integers -> a list; None of others stays None.

    A tensor is read, so it must be real.

    Raises:
        TypeError, ValueError: not integers, not of the argument's shape.
    """
    pairs = argument == "spatial_shapes"
    if isinstance(numbers, torch.Tensor):
        return _expect_integers(op, argument, numbers).flatten().tolist()
    if numbers is None and not pairs:
        return None
    if not isinstance(numbers, Sequence):
        expected = "a tensor [L, 2] or a sequence of (h, w)" if pairs else "a sequence of ints, a tensor [L] or None"
        raise TypeError(f"{op}: {argument}: expected {expected}, got {type(numbers).__name__}")
    flat = []
    for pair in numbers if pairs else (numbers,):
        if pairs and (not isinstance(pair, Sequence) or len(pair) != 2):
            raise ValueError(f"{op}: {argument}: expected (h, w) pairs, got {pair!r}")
        flat += [integer(op, argument, number) for number in pair]
    return flat


def _as_tensor(op: str, argument: str, numbers: SpatialShapes | LevelStarts | PointCounts) -> torch.Tensor | None:
    """A tensor on the host: a GPU is read once for all calls of a graph, which has equal copies made once."""
    if isinstance(numbers, torch.Tensor):
        numbers = _expect_integers(op, argument, numbers)
        return numbers.cpu() if numbers.is_cuda else numbers
    flat = flat_integers(op, argument, numbers)
    if flat is None:
        return None
    tensor = torch.tensor(flat, dtype=torch.int64, device="cpu")
    return tensor.view(-1, 2) if argument == "spatial_shapes" else tensor


def _has_no_numbers(argument: object) -> bool:
    if not isinstance(argument, torch.Tensor):
        return False
    return (
        torch.compiler.is_compiling() or argument.is_meta or (type(argument) is not torch.Tensor and is_fake(argument))
    )


def _expect_integers(op: str, argument: str, numbers: torch.Tensor) -> torch.Tensor:
    if numbers.dtype not in _INTEGERS:
        raise TypeError(f"{op}: {argument}: expected integers, got dtype {numbers.dtype}")
    pairs = argument == "spatial_shapes"
    if numbers.dim() != 1 + pairs or (pairs and numbers.shape[1] != 2):
        raise ValueError(f"{op}: {argument}: expected shape {_SHAPES[argument]}, got {list(numbers.shape)}")
    return numbers


def level_pairs(spatial_shapes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """[h_1, w_1, ..., h_L, w_L] -> ((h_1, w_1), ..., (h_L, w_L))."""
    return tuple(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))


def level_starts(spatial_shapes: Sequence[int], level_start_index: Sequence[int] | None) -> tuple[int, ...]:
    """Where each level starts: as given, or one level after the other."""
    if level_start_index is not None:
        return tuple(level_start_index)
    starts, position = [], 0
    for height, width in level_pairs(spatial_shapes):
        starts.append(position)
        position = position + height * width
    return tuple(starts)


def level_count(spatial_shapes: Sequence[int] | torch.Tensor) -> int:
    """L of [h_1, w_1, ..., h_L, w_L], or of a tensor [L, 2]."""
    return spatial_shapes.shape[0] if isinstance(spatial_shapes, torch.Tensor) else len(spatial_shapes) // 2


def check_points(op: str, points: Sequence[int] | torch.Tensor, levels: int, total: int) -> None:
    """Raises ValueError unless `points` are counts >= 0, one a level, that sum to `total` = K.

    A tensor is a fake one here: its kernel checks the numbers.
    """
    if len(points) != levels:
        raise ValueError(f"{op}: points: expected L={levels} counts like spatial_shapes, got {list(points)}")
    if isinstance(points, torch.Tensor):
        return
    if any(count < 0 for count in points) or sum(points) != total:
        raise ValueError(f"{op}: points: expected counts >= 0 that sum to K={total}, got {list(points)}")


def check_levels(
    op: str,
    spatial_shapes: Sequence[int] | torch.Tensor,
    level_start_index: Sequence[int] | torch.Tensor | None,
    positions: int,
) -> None:
    """Raises ValueError unless each level lies within the `positions` = S of value.

    Without starts the levels must fill value exactly; with starts they may lie anywhere in it, even overlap. Tensors
    are fake ones here: their kernel checks the numbers.
    """
    levels = level_count(spatial_shapes)
    if level_start_index is not None and len(level_start_index) != levels:
        raise ValueError(
            f"{op}: level_start_index: expected L={levels} starts like spatial_shapes, got {len(level_start_index)}"
        )
    if isinstance(spatial_shapes, torch.Tensor):
        return
    pairs = level_pairs(spatial_shapes)
    for height, width in pairs:
        if height < 0 or width < 0:
            raise ValueError(f"{op}: spatial_shapes: expected sizes >= 0, got {(height, width)}")
        if height > LONGEST_SIDE or width > LONGEST_SIDE:
            raise ValueError(f"{op}: spatial_shapes: expected sizes <= {LONGEST_SIDE}, got {(height, width)}")
    if level_start_index is None:
        total = sum(height * width for height, width in pairs)
        if total != positions:
            raise ValueError(
                f"{op}: value: expected S = {total} positions, the sum of h * w over spatial_shapes {list(pairs)}, "
                f"got {positions}"
            )
        return
    for (height, width), start in zip(pairs, level_start_index, strict=True):
        if start < 0 or start + height * width > positions:
            raise ValueError(
                f"{op}: level_start_index: expected a level of {height} x {width} to lie within the S={positions} "
                f"positions of value, got start {start}"
            )


def packed_levels(spatial_shapes: Sequence[int], starts: Sequence[int], points: Sequence[int]) -> tuple[int, ...]:
    """The levels that kernels take: (h_1, w_1, ..., h_L, w_L, start_1, ..., start_L, points_1, ..., points_L)."""
    return (*spatial_shapes, *starts, *points)


# ---- kernels --------------------------------------------------------------------------------------------------------


def kernel(op: str, direction: str, backend: str | None, value: torch.Tensor) -> Callable:
    """`backends.kernel`, of the fastest backend if none is named; plain PyTorch has one where levels were tensors."""
    backend = backend or backends.resolve(op, None, value)
    plain = backends.plain(op, backend)
    if plain is None:
        return backends.kernel(op, direction, backend)
    return partial(_plain_forward if direction == "forward" else _plain_backward, plain)


def _plain(function: Callable, value: torch.Tensor, levels: Sequence[int], *others: torch.Tensor | None):
    """The output of plain PyTorch for a kernel's inputs."""
    count = len(levels) // 4
    pairs, starts, points = level_pairs(levels[: 2 * count]), levels[2 * count : 3 * count], levels[3 * count :]
    return function(value, pairs, starts, *others[:3], points, *others[3:])  # the value's mask comes last


def _plain_forward(function: Callable, *inputs_and_output) -> None:
    *inputs, output = inputs_and_output
    output.copy_(_plain(function, *inputs))


def _plain_backward(function: Callable, grad_output: torch.Tensor, value: torch.Tensor, levels, *others) -> None:
    *others, _deterministic, grads = others
    tensors = [value, *others]
    order = (0, 1, 2) if len(others) == 2 else (0, 2, 3, 1)[: len(grads)]  # reference points come last

    def forward(*leaves):
        given = dict(enumerate(tensors)) | dict(zip(order, leaves, strict=True))
        return _plain(function, given.pop(0), levels, *given.values())

    for grad, found in zip(grads, gradients(forward, [tensors[i] for i in order], grad_output), strict=True):
        grad.copy_(found)


# ---- registration: every op with levels has two overloads -----------------------------------------------------------


def register_with_levels(op: str, schema: str, kernel: Callable, fake: Callable, backward: Backward) -> None:
    """`register`, for levels as numbers, and again as overload `tensor` for levels as tensors.

    The kernels are the same: the overload reads the tensors first, which a CUDA graph must not record.
    """
    register(schema, kernel, fake, backward)
    of_tensors = backward._replace(
        schema=_of_tensors(backward.schema), kernel=_reading(op, backward.schema, backward.kernel)
    )
    unsafe = (torch.Tag.cudagraph_unsafe,)
    register(_of_tensors(schema), _reading(op, schema, kernel), fake, of_tensors, tags=unsafe)


def _of_tensors(schema: str) -> str:
    return schema.replace("(", ".tensor(", 1).replace("SymInt[]", "Tensor")


def _reading(op: str, schema: str, kernel: Callable) -> Callable:
    arguments = schema[schema.index("(") + 1 : schema.index(")")].split(", ")
    names = [argument.rpartition(" ")[2] for argument in arguments]

    def run(*inputs):
        return kernel(*(flat_integers(op, n, x) if n in _SHAPES else x for n, x in zip(names, inputs, strict=True)))

    return run


def overload(name: str, spatial_shapes: Sequence[int] | torch.Tensor) -> Callable:
    """The registered op of that name that takes such levels."""
    packet = getattr(torch.ops.route_kernels, name)
    return packet.tensor if isinstance(spatial_shapes, torch.Tensor) else packet
