"""Every op, on every way to run it, has every property: generated from the list of ops and their declarations.

Properties of torch's modes (compile, autocast, fake tensors ...) are in test_registration.py.
"""

import math
from contextlib import contextmanager

import pytest
import torch
from matrix import (
    DTYPES,
    PUBLIC,
    WAYS,
    arguments_of,
    assert_same,
    check,
    declared,
    each_sample,
    results,
    running,
    runs,
    samples,
    shapes_of,
    sizes_of_samples,
)
from torch.nn import functional as F

from route_kernels.backends import OPS, PRODUCTS
from route_kernels.testing import call, converted, declaration, map_tensors, named_tensors, sample_arguments


def calls():
    """(op, label, way, dtype): every sample and shape in every dtype, in one dtype of each in order."""
    for op in PUBLIC:
        for way in WAYS:
            dtypes = [dtype for dtype in DTYPES if runs(op, way, DTYPES[dtype])]
            for place, label in enumerate([*sample_arguments(op), *shapes_of(op, way)] if dtypes else []):
                chosen = [dtypes[place % len(dtypes)]] if way.endswith("in order") else dtypes
                yield from ((op, label, way, dtype) for dtype in chosen)


@pytest.mark.parametrize("op, label, way, dtype", list(calls()))
def test_output_and_gradients_are_as_accurate_as_eager(op, label, way, dtype):
    check(op, arguments_of(op, label, way, DTYPES[dtype]), way)


@pytest.mark.parametrize("way", ["cpu", "reference"])
@pytest.mark.parametrize("op, sizes", [(op, sizes) for op in PUBLIC for sizes in declared(op, "GRADCHECK")])
def test_gradcheck(op, sizes, way):
    arguments = declaration(op).arguments(dtype=torch.float64, **sizes)
    tensors = [tensor for _, tensor in named_tensors(arguments) if tensor.requires_grad]

    def function(*given):
        new = iter(given)
        return call(op, map_tensors(arguments, lambda x: next(new) if x.requires_grad else x))

    with running(way):
        assert torch.autograd.gradcheck(function, tensors)


MIXED = [(op, place, way) for op in PUBLIC for place in range(len(declared(op, "MIXED"))) for way in WAYS
         if runs(op, way, declared(op, "MIXED")[place]["dtype"]) and not way.endswith("in order")]  # fmt: skip


@pytest.mark.parametrize("op, place, way", MIXED)
def test_arguments_of_several_dtypes(op, place, way):
    options = declared(op, "MIXED")[place]
    arguments = declaration(op).arguments(**options, **sizes_of_samples(way))
    dtype, (other,) = options["dtype"], [options[name] for name in options if name.endswith("_dtype")]
    found, expected = results(op, arguments, way), results(op, arguments, "reference")
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: x.dtype for name, x in expected.items()}
    assert found["output"].dtype == dtype
    if dtype == torch.float32 or torch.promote_types(dtype, other) == other:
        return check(op, arguments, way)
    for name, tensor in expected.items():  # eager computes in the dtype of value, and not of what is accumulated
        eps = torch.finfo(tensor.dtype).eps
        atol = (32 * eps if eps > 1e-6 else 1e-5) * max(1.0, tensor.abs().max().item())
        torch.testing.assert_close(found[name], tensor, rtol=8 * eps, atol=atol, msg=name)


# ---- strides ---------------------------------------------------------------------------------------------------------


def heads_first(tensor):
    return tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() == 2 else (
        tensor.transpose(1, 2).contiguous().transpose(1, 2) if tensor.dim() > 2 else tensor
    )  # fmt: skip


def sliced(tensor):
    return F.pad(tensor, (3, 2, 1, 1))[..., 1:-1, 3:-2] if tensor.dim() > 1 else F.pad(tensor, (3, 2))[3:-2]


def reversed_dimensions(tensor):
    dims = tuple(reversed(range(tensor.dim())))
    return tensor.permute(dims).contiguous().permute(dims)


def rows_of_more_queries(tensor):
    """Rows of a wider tensor, whose others are NaN."""
    if not tensor.is_floating_point() or tensor.dim() < 2:
        return tensor
    return torch.cat([tensor, torch.full_like(tensor, math.nan)], dim=1)[:, : tensor.shape[1]]


def one_for_all(tensor):
    """The first image's, for all of them."""
    return tensor[:1].expand_as(tensor) if tensor.dim() > 2 else tensor


VIEWS = {view.__name__: view for view in (heads_first, sliced, reversed_dimensions, rows_of_more_queries, one_for_all)}
OTHER_SUMS = ("query_similarity", "matching_cost", *PRODUCTS)
"""PyTorch's own products and its softmax sum in another order for other strides."""


@pytest.mark.parametrize("view", VIEWS)
@each_sample()
def test_views(op, label, way, view):
    place = list(VIEWS).index(view) + list(sample_arguments(op)).index(label)
    dtypes = [dtype for dtype in DTYPES.values() if runs(op, way, dtype)]
    sizes = {"batch": 2, "queries": 9 if way == "cpu" else 5}
    arguments = sample_arguments(op, dtypes[place % len(dtypes)], **sizes)[label]
    viewed = map_tensors(arguments, lambda x: VIEWS[view](x.detach()).requires_grad_(x.requires_grad))
    assert not all(x.is_contiguous() for _, x in named_tensors(viewed))
    same = map_tensors(viewed, lambda x: x.detach().contiguous().requires_grad_(x.requires_grad))
    expected = results(op, same, way)
    in_other_lanes = way.startswith("emulated")  # the alignment decides how many channels a lane has
    loosely = expected if op in OTHER_SUMS or in_other_lanes else declared(op, "SUMMED_BY_ATOMICS")
    tolerance = 16 * torch.finfo(expected["output"].dtype).eps
    assert_same(results(op, viewed, way), expected, loosely, max(tolerance, 1e-5))


def incoming_gradients(shape):
    """Gradients of one shape as autograd hands them over."""
    last = len(shape) - 1
    yield torch.ones(()).expand(shape)
    yield torch.randn(*shape[:1], *(1,) * last).expand(shape)
    if last > 0:
        yield torch.randn(*shape[:-2], shape[-1], shape[-2]).mT
        yield torch.randn(shape[1], shape[0], *shape[2:]).transpose(0, 1)
        yield torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]


@each_sample("cpu", "triton", "emulated")
def test_an_incoming_gradient_of_any_strides(op, label, way):
    arguments = arguments_of(op, label, way)
    with running(way):
        output = call(op, arguments)
    if output.requires_grad and output.dim():
        for grad_output in incoming_gradients(output.shape):
            expected = results(op, arguments, way, grad_output.contiguous())
            loosely = expected if op in OTHER_SUMS else declared(op, "SUMMED_BY_ATOMICS")
            assert_same(results(op, arguments, way, grad_output), expected, loosely)


# ---- what is written, and what is read -------------------------------------------------------------------------------

GUARD = 64  # bytes before and after a buffer
NAN = 0xFF  # in every byte: NaN in every floating dtype


@contextmanager
def guarded():
    """New tensors are the middle of buffers of NaN; gives the buffers, whose ends must stay so."""
    buffers, real = [], torch.empty

    def empty(*size, dtype=None, device="cpu", **options):
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        if options or torch.device(device).type != "cpu":
            return real(shape, dtype=dtype, device=device, **options)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        count = shape.numel() * dtype.itemsize
        buffers.append(real(count + 2 * GUARD, dtype=torch.uint8).fill_(NAN))
        return buffers[-1][GUARD : GUARD + count].view(dtype).view(shape)

    def new_empty(x, *size, dtype=None, **options):
        make = real if options else empty  # options: the interpreter's own
        return make(*size, dtype=dtype or x.dtype, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", lambda x, dtype=None, **_: empty(x.shape, dtype=dtype or x.dtype))
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        yield buffers


@pytest.mark.parametrize("threads", [1, 3])
@each_sample("cpu", "triton", "triton in order", ops=OPS)
def test_every_element_is_written_and_nothing_beside(op, label, way, threads):
    if threads > 1 and way != "cpu":
        pytest.skip("Triton's interpreter has one thread")
    torch.set_num_threads(threads)
    dtypes = [dtype for dtype in DTYPES.values() if runs(op, way, dtype)]
    for dtype in dtypes[:1] if way == "triton in order" else dtypes:  # 5 s each in the interpreter
        arguments = arguments_of(op, label, way, dtype)
        expected = results(op, arguments, way)
        with guarded() as buffers:
            found = results(op, arguments, way)
        assert buffers or label == "mean"
        assert_same(found, expected, declared(op, "SUMMED_BY_ATOMICS"))  # NaN equals nothing
        for buffer in buffers:
            assert (buffer[:GUARD] == NAN).all() and (buffer[-GUARD:] == NAN).all()


EMPTY = [(op, dimension, way) for op in PUBLIC for dimension in declaration(op).EMPTY for way in (*WAYS, "reference")
         if runs(op, way)]  # fmt: skip


@pytest.mark.parametrize("op, dimension, way", EMPTY)
def test_a_dimension_of_size_0(op, dimension, way):
    arguments = declaration(op).EMPTY[dimension]()
    for dtype, autocast in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        given = converted(arguments, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected = results(op, given, "reference")
            found = results(op, given, "cpu in order" if way == "cpu" else way)  # fills what is not written with NaN
        tolerance = 0.05 if autocast or dtype == torch.bfloat16 else 1e-5
        assert_same(found, expected, expected, tolerance)


def has_rows_of_images(op, label):
    """Whether the output's first dimension counts images: not a sum, nor rows of packed targets."""
    given = sample_arguments(op)[label]
    return given.get("reduction") != "sum" and "counts" not in given


IMAGES = [(op, label, way) for op, label, way in samples() if has_rows_of_images(op, label)]


def poisoned(tensor, index):
    with torch.no_grad():
        tensor[index] = torch.where(torch.rand(tensor[index].shape) < 0.5, math.nan, 1e30).to(tensor.dtype)


@pytest.mark.parametrize("op, label, way", IMAGES)
def test_an_image_does_not_depend_on_others(op, label, way):
    """Its output; the gradients of what images share do."""
    sizes = sizes_of_samples(way) | {"batch": 2}
    arguments, others = (sample_arguments(op, **sizes)[label] for _ in range(2))
    expected = results(op, arguments, way)
    for _, tensor in named_tensors(others):
        if tensor.is_floating_point() and tensor.dim() > 2 and tensor.shape[0] == 2:
            poisoned(tensor, 0)
    found = results(op, others, way)
    assert not torch.equal(found["output"][0], expected["output"][0])
    for name, tensor in expected.items():
        if name == "output" or (tensor.dim() > 2 and tensor.shape[0] == 2):
            assert torch.equal(found[name][1], tensor[1]), name


PER_QUERY = [(op, way, dtype) for op in PUBLIC if declared(op, "PER_QUERY") for way in WAYS for dtype in DTYPES
             if runs(op, way, DTYPES[dtype]) and not way.endswith("in order")]  # fmt: skip


def changed(arguments, function):
    """The arguments with `function(name, tensor)` for every tensor."""
    names = iter([name for name, _ in named_tensors(arguments)])
    return map_tensors(arguments, lambda tensor: function(next(names), tensor))


@pytest.mark.parametrize("op, way, dtype", PER_QUERY)
def test_a_query_does_not_depend_on_others(op, way, dtype):
    """NaN and huge numbers stay with their query; a few queries give what they give among many, gradients too."""
    dims, sizes = declaration(op).PER_QUERY, dict(queries=60) if way == "cpu" else sizes_of_samples(way)
    label = next(label for label, given in sample_arguments(op).items() if given.get("reduction") != "sum")
    arguments, others = (sample_arguments(op, DTYPES[dtype], **sizes)[label] for _ in range(2))
    with running(way):
        grad_output = torch.randn(call(op, arguments).shape)
    expected = results(op, arguments, way, grad_output)
    for name, tensor in named_tensors(others):
        if name in dims and tensor.is_floating_point():
            poisoned(tensor, (slice(None),) * dims[name] + (3,))
    queries = torch.arange(grad_output.shape[dims["output"]])
    found = results(op, others, way, grad_output)["output"]
    assert_same(
        {"output": found.index_select(dims["output"], queries[queries != 3])},
        {"output": expected["output"].index_select(dims["output"], queries[queries != 3])},
    )

    def few(name, tensor):
        if name not in dims or tensor.shape[dims[name]] == 1:
            return tensor
        return tensor.detach().narrow(dims[name], 2, 2).requires_grad_(tensor.requires_grad)

    alone = results(op, changed(arguments, few), way, few("output", grad_output))
    own = {name: few(name.removeprefix("grad "), x) for name, x in expected.items()
           if name.removeprefix("grad ") in dims}  # fmt: skip
    loosely = own if op in PRODUCTS else ()
    assert_same({name: alone[name] for name in own}, own, loosely, 16 * torch.finfo(DTYPES[dtype]).eps)


# ---- order of sums (over any number of threads: test_threads.py) -----------------------------------------------------


@each_sample("triton", "triton in order", "emulated in order")
def test_interpreted_kernels_repeat_bit_for_bit(op, label, way):
    arguments = arguments_of(op, label, way)
    assert_same(results(op, arguments, way), results(op, arguments, way))


@each_sample("triton", "emulated")
def test_sums_in_order_are_those_of_atomics(op, label, way):
    if not runs(op, f"{way} in order"):
        return
    arguments = arguments_of(op, label, way)
    expected = results(op, arguments, f"{way} in order")
    assert_same(results(op, arguments, way), expected, expected)
