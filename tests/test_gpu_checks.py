"""The checks of test_gpu.py on a CPU: they pass for the ops on every backend that runs here, and catch mistakes.

The triton backend runs here in Triton's interpreter; what needs a GPU (streams, graphs) is not reached.
"""

import gpu_checks
import pytest
import test_gpu
import torch

import route_kernels as rk
from route_kernels.backends import OPS
from route_kernels.testing import EAGER, declaration, named_tensors, routed_attention_arguments

CPU = torch.device("cpu")
each_op = pytest.mark.parametrize("op", OPS)


@pytest.fixture(params=["cpu", "triton"])
def backend(request):
    with rk.backend(request.param):
        yield request.param


def tiny(op, backend, dtype=torch.float32, **sizes):
    return test_gpu.on_device(op, declaration(op).arguments(dtype=dtype, **declaration(op).TINY | sizes), backend, CPU)


# ---- the ops pass --------------------------------------------------------------------------------------------------


@each_op
def test_repeats(op, backend):
    gpu_checks.check_same_twice(op, gpu_checks.public(op), tiny(op, backend))
    gpu_checks.check_deterministic_mode(op, gpu_checks.public(op), tiny(op, backend))


@each_op
def test_compiled(op, backend):
    gpu_checks.check_compiled(op, gpu_checks.public(op), lambda n: tiny(op, backend, queries=n // 4), "aot_eager")


@each_op
def test_autocast(op, backend):
    gpu_checks.check_autocast(op, gpu_checks.public(op), tiny(op, backend), torch.bfloat16)


@each_op
def test_addresses(op, backend):
    gpu_checks.check_beyond_32_bits(op, gpu_checks.public(op), tiny(op, backend, torch.bfloat16))


@each_op
def test_many_images(op, backend):
    gpu_checks.check_many_images(op, gpu_checks.public(op), tiny(op, backend, batch=3))


@each_op
def test_memory_of_the_native_kernels(op):
    sizes = (1024, 2048)
    with rk.backend("cpu"):
        gpu_checks.check_memory(op, gpu_checks.public(op), lambda n: tiny(op, "cpu", batch=1, queries=n), CPU, sizes)


# ---- the tables run ------------------------------------------------------------------------------------------------

ON_A_CPU = {
    "samples": lambda: [test_gpu.test_samples(op, label, torch.bfloat16, "cpu") for op, label in test_gpu.SAMPLES],
    "shapes": lambda: [test_gpu.test_shapes(op, next(iter(test_gpu.TABLES[op])), torch.float64, "cpu") for op in OPS],
    "masks": lambda: [test_gpu.test_masks("M", kind, "cpu") for kind in ("bool", "float")],
    "key ranges": lambda: [test_gpu.test_key_ranges(letters, torch.float32, "cpu") for letters in ("N", "BN")],
    "no key": lambda: [
        test_gpu.test_rows_with_no_key_give_zero_and_zero_gradients(how, every, "cpu")
        for how in ("bool", "float", "ranges", "both")
        for every in (5, 1)
    ],
    "views": lambda: [test_gpu.test_views(view, "cpu") for view in test_gpu.VIEWS],
    "bad inputs": lambda: [test_gpu.test_bad_inputs(bad) for bad in test_gpu.BAD],
}


@pytest.mark.parametrize("table", ON_A_CPU)
def test_tables(table, monkeypatch):
    monkeypatch.setattr(test_gpu, "DEVICE", CPU)
    with rk.backend(None if table == "bad inputs" else "cpu"):
        ON_A_CPU[table]()


# ---- mistakes are caught -------------------------------------------------------------------------------------------


def arguments():
    return routed_attention_arguments(**declaration("routed_attention").TINY)


def noisy(**given):
    output = EAGER["routed_attention"](**given)
    return output + 1e-6 * torch.randn_like(output)


def test_noise_is_not_the_same_twice():
    with pytest.raises(AssertionError, match="differs bitwise"):
        gpu_checks.check_same_twice("routed_attention", noisy, arguments())
    with pytest.raises(AssertionError, match="differs bitwise"):
        gpu_checks.check_deterministic_mode("routed_attention", noisy, arguments())
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_empty_holds_must_be_overwritten():
    def last_row_unwritten(query, key, value, routing):
        written = EAGER["routed_attention"](query, key, value, routing)
        output = torch.cat([written[:, :, :-1], torch.empty_like(written[:, :, -1:])], dim=2)
        return output.nan_to_num(nan=7.0)

    with pytest.raises(AssertionError, match="output: RMS error"):
        gpu_checks.check_deterministic_mode("routed_attention", last_row_unwritten, arguments())


def test_sums_by_atomics_may_differ_a_little_and_no_more():
    expected = {"grad value": torch.ones(3)}
    gpu_checks.assert_equal({"grad value": torch.ones(3) + 1e-6}, expected, ["grad value"])
    with pytest.raises(AssertionError, match=r"differs by 0\.01"):
        gpu_checks.assert_equal({"grad value": torch.ones(3) + 0.01}, expected, ["grad value"])


def test_compiling_anew_is_caught():
    def by_number_of_queries(**given):
        return EAGER["routed_attention"](**given) * (2 if given["query"].shape[2] == 40 else 1)

    def of(queries):
        return routed_attention_arguments(**{**declaration("routed_attention").TINY, "queries": queries})

    with pytest.raises(AssertionError, match="compiled anew"):
        gpu_checks.check_compiled("routed_attention", by_number_of_queries, of, "eager")


def test_addresses_of_32_bits_are_caught():
    def wrapped(query, key, value, routing):
        strides = (query.stride(0) % 2**31, *query.stride()[1:])
        near = query.detach().as_strided(query.shape, strides) + (query - query.detach())
        return EAGER["routed_attention"](near, key, value, routing)

    given = routed_attention_arguments(dtype=torch.bfloat16, **declaration("routed_attention").TINY)
    gpu_checks.check_beyond_32_bits("routed_attention", EAGER["routed_attention"], given)
    with pytest.raises(AssertionError, match="differs bitwise"):
        gpu_checks.check_beyond_32_bits("routed_attention", wrapped, given)


def test_spread_arguments_hold_the_same_values():
    given = routed_attention_arguments(dtype=torch.bfloat16, **declaration("routed_attention").TINY)
    for (name, tensor), (_, spread) in zip(
        named_tensors(given), named_tensors(gpu_checks.beyond_32_bits(given)), strict=True
    ):
        assert torch.equal(tensor, spread) and spread.requires_grad and spread.stride(0) > 2**31, name


def test_a_wrong_last_image_is_caught():
    def last_image_forgotten(**given):
        output = EAGER["routed_attention"](**given)
        return torch.cat([output[:-1], output[-1:] * 0])

    with pytest.raises(AssertionError, match="RMS error"):
        gpu_checks.check_many_images(
            "routed_attention",
            last_image_forgotten,
            routed_attention_arguments(**declaration("routed_attention").TINY | {"batch": 5}),
        )


def test_quadratic_memory_is_caught():
    def of(queries):
        return routed_attention_arguments(batch=1, heads=1, queries=queries, channels=4, rank=2, gate_rank=1)

    with pytest.raises(AssertionError, match="expected at most"):
        gpu_checks.check_memory("routed_attention", EAGER["routed_attention"], of, CPU, (256, 512))
    gpu_checks.assert_linear((1, 2, 4), (100, 190, 390))
    with pytest.raises(AssertionError, match="450 bytes at 4, 190 at 2: expected at most 399"):
        gpu_checks.assert_linear((1, 2, 4), (100, 190, 450))


def test_copies_hold_the_same_values_in_other_places():
    given = arguments()
    for (_, tensor), (_, copy) in zip(named_tensors(given), named_tensors(gpu_checks.placed(given, CPU)), strict=True):
        assert torch.equal(tensor, copy) and copy.is_leaf and copy.requires_grad
        assert tensor.data_ptr() != copy.data_ptr()
    others = gpu_checks.placed(routed_attention_arguments(seed=1, **declaration("routed_attention").TINY), CPU)
    gpu_checks.overwrite(given, others)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(named_tensors(given), named_tensors(others), strict=True))


@each_op
def test_arguments_of_the_large_tests(op):
    sizes = declaration(op).MANY
    one = declaration(op).arguments(dtype=torch.bfloat16, **sizes | {"batch": 1})
    assert sizes["batch"] * max(tensor.numel() for _, tensor in named_tensors(one)) > 2**31
    many = gpu_checks.map_tensors(one, lambda tensor: test_gpu.many_of(tensor, 4))
    for (_, tensor), (_, image) in zip(named_tensors(many), named_tensors(one), strict=True):
        if image.shape[0] != 1:
            assert tensor is image
            continue
        assert tensor.shape == (4, *image.shape[1:]) and tensor.requires_grad == image.requires_grad
        assert all(torch.equal(tensor[index], image[0]) for index in range(3))
