"""A CPU kernel gives the same bits whatever the number of threads, forward and backward."""

import pytest
import torch
from small_detector import small_batch, small_detector, trained_step
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import route_kernels as rk
from route_kernels.testing import outcome, routed_attention_arguments, sample_arguments

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


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize(("batch", "queries"), [(1, 301), (3, 77), (2, 16)])
def test_a_tile_that_goes_another_way(batch, queries, masked, threads):
    """Logits far above the maximum so far, and rows that see nothing, send a whole block of queries another way."""
    arguments = routed_attention_arguments(batch=batch, queries=queries, keys=131, channels=5, heads=3, rank=3)
    with torch.no_grad():
        arguments["query"][:, :, ::13] *= 30
    if masked:
        arguments["attn_mask"] = torch.rand(queries, 131, generator=torch.Generator().manual_seed(2)) > 0.4
        arguments["attn_mask"][::29] = False
    grad_output = torch.randn(arguments["query"].shape)
    threads(1)
    expected = outcome(rk.routed_attention, arguments, grad_output)
    for count in THREADS[1:]:
        threads(count)
        for name, result in outcome(rk.routed_attention, arguments, grad_output).items():
            assert torch.equal(result, expected[name]), f"{name} differs, {count} threads"


class OursWithMoreThreads(TorchDispatchMode):
    """Calls our ops with one and with three threads; PyTorch's own, some of which differ, with one."""

    def __init__(self):
        super().__init__()
        self.names, self.differ = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.namespace == "route_kernels":
            self.names.add(func._opname)
            torch.set_num_threads(3)
            again = func(*args, **(kwargs or {}))
            torch.set_num_threads(1)
            if not all(torch.equal(*pair) for pair in zip(tree_leaves(found), tree_leaves(again), strict=True)):
                self.differ.add(func._opname)
        return found


def test_no_op_of_a_training_step_depends_on_threads():
    detector, batch = small_detector(dtype=torch.float32), small_batch(dtype=torch.float32, size=(140, 90))
    with OursWithMoreThreads() as operators:
        trained_step(detector, batch, strength=0.5, aux_weight=1.0)
    assert {"routed_attention_backward", "ms_deform_attn_fused_backward"} <= operators.names
    assert not operators.differ


def test_a_model_of_transformers_trains_to_the_same_bits_twice():
    """In PyTorch's deterministic mode, which fills what is left unwritten with NaN."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers_models import model_and_inputs

    def trained():
        model, inputs = model_and_inputs("rt_detr")
        assert rk.integrations.transformers.apply(model, verbose=False).replaced
        boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.3, 0.2]], dtype=torch.float64)
        inputs["labels"] = [{"class_labels": torch.tensor([0, 1]), "boxes": boxes.clone()} for _ in range(2)]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        for _ in range(20):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
        return before, model.state_dict()

    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    try:
        (before, once), (_, twice) = trained(), trained()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, twice[name]) for name, x in once.items())
    attention = [name for name in once if "sampling_offsets" in name or "value_proj" in name]
    assert attention and all(not torch.equal(once[name], before[name]) for name in attention)
