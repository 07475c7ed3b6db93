"""Every op on a GPU: the accuracy tables of the CPU tests on the device, and what only a GPU has.

`python -m pytest -m gpu`; skipped where PyTorch finds no GPU. The checks are in gpu_checks.py.
"""

import fcntl
import os
import tempfile

import gpu_checks
import pytest
import test_routed_attention
import torch
from test_matrix import VIEWS
from test_routed_attention import LARGE

import route_kernels as rk
from route_kernels.backends import OPS
from route_kernels.testing import (
    BAD_INPUTS,
    call,
    check_accuracy,
    declaration,
    map_tensors,
    named_tensors,
    routed_attention_arguments,
    sample_arguments,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU (torch.cuda.is_available())"),
]
DEVICE = torch.device("cuda", 0)
BACKENDS = ("triton", "cuda")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
HALVES_AND_F32 = {name: DTYPES[name] for name in ("f32", "bf16", "f16")}
SAMPLES = [(op, label) for op in OPS for label in sample_arguments(op)]
FIRST_SAMPLES = [(op, next(iter(sample_arguments(op)))) for op in OPS]
TABLES = {op: declaration(op).SHAPES for op in OPS}

each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
each_short_dtype = pytest.mark.parametrize("dtype", HALVES_AND_F32.values(), ids=HALVES_AND_F32)
each_op = pytest.mark.parametrize("op", OPS)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Every test runs on this backend, or is skipped with the reason why it cannot."""
    with rk.backend(request.param):
        yield request.param


def on_device(op, arguments, backend, device=None):
    arguments = gpu_checks.placed(arguments, device or DEVICE)
    runs, reason = rk.can_run(op, backend, *(tensor for _, tensor in named_tensors(arguments)))
    if not runs:
        pytest.skip(reason)
    return arguments


def sample(op, label, dtype, backend, device=None, **sizes):
    return on_device(op, sample_arguments(op, dtype, **sizes)[label], backend, device)


def detector_sized(op, dtype, backend, queries=300, **sizes):
    return on_device(
        op, declaration(op).arguments(dtype=dtype, queries=queries, **declaration(op).DETECTOR | sizes), backend
    )


# ---- what only a GPU has -------------------------------------------------------------------------------------------


def test_the_fastest_is_not_the_reference():
    for op, label in FIRST_SAMPLES:
        arguments = gpu_checks.placed(sample_arguments(op)[label], DEVICE)
        tensors = [tensor for _, tensor in named_tensors(arguments)]
        assert any(rk.can_run(op, backend, *tensors)[0] for backend in BACKENDS), rk.can_run(op, "triton", *tensors)


@each_op
@each_short_dtype
def test_same_twice(op, dtype, backend):
    gpu_checks.check_same_twice(op, gpu_checks.public(op), detector_sized(op, dtype, backend))


@each_op
@each_short_dtype
def test_deterministic_mode(op, dtype, backend):
    gpu_checks.check_deterministic_mode(op, gpu_checks.public(op), detector_sized(op, dtype, backend))


@pytest.mark.parametrize("op, label", SAMPLES)
def test_no_synchronisation(op, label, backend):
    gpu_checks.check_no_synchronisation(gpu_checks.public(op), sample(op, label, torch.float32, backend))


@pytest.mark.parametrize("op, label", FIRST_SAMPLES)
@each_short_dtype
def test_graph_replay(op, label, dtype, backend):
    arguments, *others = (sample(op, label, dtype, backend, queries=70, seed=seed) for seed in range(3))
    gpu_checks.check_graph_replay(op, gpu_checks.public(op), arguments, others)


@pytest.mark.parametrize("op, label", FIRST_SAMPLES)
def test_stream_of_ones_own(op, label, backend):
    gpu_checks.check_stream(op, gpu_checks.public(op), sample(op, label, torch.float32, backend))


@pytest.mark.parametrize("op, label", FIRST_SAMPLES)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_a_device_that_is_not_the_current_one(op, label, backend):
    arguments = sample(op, label, torch.float32, backend, torch.device("cuda", 1))
    check_accuracy(op, arguments)
    assert call(op, arguments).device.index == 1 and torch.cuda.current_device() == 0


@pytest.mark.parametrize("op, label", SAMPLES)
def test_compiled_once_for_any_number_of_queries(op, label, backend):
    gpu_checks.check_compiled(
        op, gpu_checks.public(op), lambda queries: sample(op, label, torch.float32, backend, queries=queries)
    )


@pytest.mark.parametrize("op, label", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast(op, label, dtype, backend):
    gpu_checks.check_autocast(op, gpu_checks.public(op), sample(op, label, torch.float32, backend), dtype)


@each_op
def test_memory_is_linear_in_the_queries(op, backend):
    gpu_checks.check_memory(
        op, gpu_checks.public(op), lambda queries: detector_sized(op, torch.bfloat16, backend, queries), DEVICE,
        (1024, 2048, 4096, 8192, 16384),
    )  # fmt: skip


@pytest.fixture
def most_of_the_gpu():
    """One such test at a time, also in several processes; its memory goes back afterwards."""
    with open(os.path.join(tempfile.gettempdir(), "route-kernels-gpu-tests.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


def need_free(gigabytes):
    free = torch.cuda.mem_get_info(DEVICE)[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory, there are {free:.0f}")


@each_op
def test_images_beyond_32_bit_addresses(op, backend, most_of_the_gpu):
    need_free(6)
    gpu_checks.check_beyond_32_bits(op, gpu_checks.public(op), detector_sized(op, torch.bfloat16, backend, 70, batch=2))


@each_op
def test_more_than_2_31_elements(op, backend, most_of_the_gpu):
    sizes = declaration(op).MANY
    need_free(declaration(op).MANY_GIGABYTES)
    few = declaration(op).arguments(dtype=torch.bfloat16, **sizes | dict(batch=1))
    whole = map_tensors(on_device(op, few, backend), lambda x: many_of(x, sizes["batch"]))
    whole |= {name: sizes["batch"] * given for name, given in whole.items() if isinstance(given, list)}
    assert max(tensor.numel() for _, tensor in named_tensors(whole)) > 2**31
    gpu_checks.check_many_images(op, gpu_checks.public(op), whole)


def many_of(image, batch):
    """[1, ...] -> [batch, ...], the last two images each a copy in another order: what is read elsewhere differs.

    A tensor that begins with another size belongs to all images.
    """
    if image.shape[0] != 1:
        return image
    tensor = image.detach().expand(batch, *image.shape[1:]).contiguous()
    tensor[-1] = image.detach()[0].flip(0) if image.dim() > 1 else image.detach()[0]
    return tensor.requires_grad_(image.requires_grad)


# ---- the tables of the CPU tests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("op, label", SAMPLES)
@each_dtype
def test_samples(op, label, dtype, backend):
    check_accuracy(op, sample(op, label, dtype, backend))


@pytest.mark.parametrize("op, shape", [(op, shape) for op in OPS for shape in TABLES[op]])
@each_dtype
def test_shapes(op, shape, dtype, backend):
    check_accuracy(op, on_device(op, declaration(op).arguments(dtype=dtype, **TABLES[op][shape]), backend))


@pytest.mark.parametrize("letters", test_routed_attention.MASKS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(letters, kind, backend):
    drawn = torch.randn(LARGE.shape(letters))
    arguments = LARGE.arguments(torch.bfloat16, attn_mask=drawn if kind == "float" else drawn > -0.3)
    check_accuracy("routed_attention", on_device("routed_attention", arguments, backend))


@pytest.mark.parametrize("letters", ["N", "BN"], ids=["shared", "per image"])
@each_short_dtype
def test_key_ranges(letters, dtype, backend):
    arguments = LARGE.arguments(dtype, key_ranges=LARGE.random_ranges(*LARGE.shape(letters)))
    check_accuracy("routed_attention", on_device("routed_attention", arguments, backend))


@pytest.mark.parametrize("how", ["bool", "float", "ranges", "both"])
@pytest.mark.parametrize("every", [5, 1], ids=["some", "all"])
def test_rows_with_no_key_give_zero_and_zero_gradients(how, every, backend):
    rows = torch.arange(LARGE.N) % every == 0
    arguments = on_device("routed_attention", LARGE.arguments(torch.bfloat16, **LARGE.hide(how, rows)), backend)
    results = gpu_checks.results_of(rk.routed_attention, arguments)
    assert all(tensor.isfinite().all() for tensor in results.values())
    for name in ("output", "grad query"):
        assert (results[name][:, :, rows.to(DEVICE)] == 0).all(), name


@pytest.mark.parametrize("view", VIEWS)
def test_views(view, backend):
    arguments = routed_attention_arguments(queries=37, keys=45, dtype=torch.bfloat16)
    viewed = map_tensors(arguments, lambda tensor: VIEWS[view](tensor.detach().to(DEVICE)).requires_grad_())
    same = map_tensors(viewed, lambda tensor: tensor.detach().contiguous().requires_grad_())
    expected = gpu_checks.results_of(rk.routed_attention, on_device("routed_attention", same, backend))
    gpu_checks.assert_equal(gpu_checks.results_of(rk.routed_attention, viewed), expected)


BAD = [bad for bad in BAD_INPUTS if "elsewhere" not in bad.name]  # those say on which device they expect what


@pytest.mark.parametrize("bad", BAD, ids=[f"{bad.op} {bad.name}" for bad in BAD])
def test_bad_inputs(bad):
    arguments = gpu_checks.placed(bad.arguments(), DEVICE)
    with pytest.raises(bad.error, match=bad.message):
        call(bad.op, arguments)
