"""PyTorch counts the FLOP of our ops' products, as of the same formula in its own operators."""

import subprocess
import sys

import pytest
import torch
from torch._functorch import partitioners
from torch._functorch.aot_autograd import aot_function
from torch._functorch.compilers import nop
from torch.utils.flop_counter import FlopCounterMode

import route_kernels as rk
from route_kernels import native
from route_kernels.ops import registry
from route_kernels.testing import NAMES, call, declaration, map_tensors, named_tensors, sample_arguments

pytestmark = pytest.mark.skipif(native.load_error is not None, reason=str(native.load_error))
SAMPLES = [(op, label) for op in NAMES for label in sample_arguments(op) if label != "mean"]  # that is plain PyTorch
each_sample = pytest.mark.parametrize("op, label", SAMPLES)


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def both_passes(op, arguments):
    """(forward, backward)."""
    outputs = []
    forward = counted(lambda: outputs.append(call(op, arguments)))
    wanted = [tensor for _, tensor in named_tensors(arguments) if tensor.requires_grad]
    if not outputs[0].requires_grad:
        return forward, 0
    return forward, counted(lambda: torch.autograd.grad(outputs[0].sum(), wanted))


def corners_and_channels(op, arguments):
    """Sampling as a product of matrices: the weights of 4 corners times their vectors."""
    weights = arguments["attention_weights" if op == "ms_deform_attn" else "attention_logits"]
    samples, channels = weights.numel(), arguments["value"].shape[-1]
    corners, shares = (torch.randn(samples, *shape, requires_grad=True) for shape in ((4, channels), (1, 4)))
    sampled = []
    forward = counted(lambda: sampled.append(shares @ corners))
    return forward, counted(lambda: torch.autograd.grad(sampled[0].sum(), (corners, shares)))


def again(op, arguments):
    """FLOP that backward spends to compute again what forward did not keep."""
    if op == "routed_attention":
        routing = arguments.get("routing")
        return counted(
            lambda: (arguments["query"] @ arguments["key"].mT, None if routing is None else rk.routing_bias(routing))
        )
    if op == "feed_forward":
        return counted(lambda: torch.nn.functional.linear(arguments["x"], arguments["w1"]))
    return 0


@each_sample
def test_the_count_is_that_of_the_same_products_in_pytorch(op, label):
    arguments = sample_arguments(op)[label]
    if hasattr(declaration(op), "FLOP_OF_AN_ELEMENT"):
        name, *operations = declaration(op).FLOP_OF_AN_ELEMENT
        counted_over = call(op, arguments) if name == "output" else arguments[name]
        expected = tuple(count * counted_over.numel() for count in operations)
    elif op.startswith("ms_deform_attn"):
        expected = corners_and_channels(op, arguments)
    else:
        with rk.backend("reference"):
            forward, backward = both_passes(op, arguments)
        expected = forward, backward and backward + again(op, arguments)
    assert both_passes(op, arguments) == expected and expected[0] > 0


def test_attention_by_hand():
    arguments = sample_arguments("routed_attention", heads=3, queries=5, keys=7, channels=8, rank=4, gate_rank=2)
    pairs = 2 * 5 * 7
    forward, backward = both_passes("routed_attention", arguments["routed"])
    assert forward == 2 * pairs * (2 * 3 * 8 + 2 * 4 + 2) and backward == 2 * pairs * (5 * 3 * 8 + 3 * (2 * 4 + 2))


def test_every_registered_op_has_a_formula():
    with FlopCounterMode(display=False) as counter:
        known = set(counter.flop_registry)
    assert {getattr(torch.ops.route_kernels, name.partition(".")[0]) for name in registry.OPS} <= known


@pytest.mark.parametrize("op", ["ms_deform_attn", "ms_deform_attn_fused"])
def test_levels_as_tensors_change_no_count(op):
    arguments = next(iter(sample_arguments(op).values()))
    packet = getattr(torch.ops.route_kernels, op)
    sizes = [number for pair in arguments["spatial_shapes"] for number in pair]
    rest = [arguments[name] for name in arguments if name not in ("spatial_shapes", "level_start_index")]
    value, *others = rest
    starts = [None] if op == "ms_deform_attn" else []
    last = [None, None] if op == "ms_deform_attn" else [None, None, None]
    numbers = counted(lambda: packet.default(value, sizes, *starts, *others, *last))
    tensors = counted(lambda: packet.tensor(value, torch.tensor(sizes).view(-1, 2), *starts, *others, *last))
    assert numbers == tensors > 0


@each_sample
def test_the_compilers_memory_budget_does_not_take_it_for_free(op, label):
    arguments, estimates = sample_arguments(op)[label], {}

    def partition(joint, *args, **kwargs):
        ours = [node for node in joint.graph.nodes if "route_kernels." in str(node.target)]
        estimates.update({str(node.target): partitioners.estimate_runtime(node) for node in ours})
        return partitioners.min_cut_rematerialization_partition(joint, *args, **kwargs)

    def function(*tensors):
        given = iter(tensors)
        return call(op, map_tensors(arguments, lambda _: next(given)))

    tensors = [tensor for _, tensor in named_tensors(arguments)]
    output = aot_function(function, nop, nop, partition_fn=partition)(*tensors)
    if output.requires_grad:
        forward, backward = both_passes(op, arguments)
        (forward_estimate,) = (count for name, count in estimates.items() if "_backward" not in name)
        (backward_estimate,) = (count for name, count in estimates.items() if "_backward" in name)
        assert (forward_estimate, backward_estimate) == (forward, backward) and min(forward, backward) > 1


def test_importing_us_imports_neither_the_counter_nor_triton():
    code = """if True:
        import sys
        import route_kernels
        assert "triton" not in sys.modules and "torch.utils.flop_counter" not in sys.modules
        waiting = len(sys.meta_path)
        from torch.utils.flop_counter import FlopCounterMode, flop_registry
        import torch
        assert len(sys.meta_path) == waiting - 1
        assert torch.ops.route_kernels.routed_attention in flop_registry
        x = torch.randn(1, 3, 4)
        with FlopCounterMode(display=False) as counter:
            route_kernels.query_similarity(x)
        print(counter.get_total_flops())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(2 * 3 * 3 * 4)
