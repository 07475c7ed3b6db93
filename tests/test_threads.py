"""A CPU kernel gives the same bits whatever the number of threads, forward and backward."""

import pytest
import torch

import route_kernels as rk
from route_kernels.testing import outcome, sample_arguments

THREADS = (1, 2, 3, 4, 7)
LEVELS = ((13, 17), (5, 3), (1, 1))
# Work for seven threads each; batches and heads that they cannot share evenly.
CALLS = [
    *(("routed_attention", dict(batch=b, heads=3, queries=n)) for b, n in ((1, 517), (3, 130), (9, 77), (17, 65))),
    *(
        (op, dict(batch=b, heads=h, queries=333, levels=LEVELS))
        for op in ("ms_deform_attn", "ms_deform_attn_fused")
        for b, h in ((1, 1), (1, 3), (1, 8), (3, 5))
    ),
    ("ms_deform_attn_fused", dict(batch=2, heads=3, queries=1, levels=LEVELS)),
    ("add_layer_norm", dict(batch=3, queries=701)),
    ("sigmoid_focal_loss", dict(batch=3, queries=701, classes=13)),
    ("query_similarity", dict(batch=3, queries=517)),
    ("matching_cost", dict(batch=3, queries=997, targets=17)),
    ("box_loss", dict(batch=3, queries=9973, targets=17)),
]



def bits(x):
    return x.reshape(-1).contiguous().view(torch.uint8)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("op", "sizes"), CALLS, ids=[f"{op}-{'x'.join(map(str, list(sizes.values())[:3]))}" for op, sizes in CALLS]
)
def test_bits_do_not_depend_on_the_number_of_threads(op, sizes, dtype, threads):
    function = getattr(rk, op)
    for label, arguments in sample_arguments(op, dtype, **sizes).items():
        threads(1)
        output = function(**arguments).detach()
        grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
        expected = outcome(function, arguments, grad_output)
        for count in THREADS[1:]:
            threads(count)
            for name, result in outcome(function, arguments, grad_output).items():
                assert torch.equal(bits(result), bits(expected[name])), f"{label}: {name} differs, {count} threads"
