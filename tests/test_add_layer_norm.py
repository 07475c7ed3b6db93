"""LayerNorm of a residual sum, whose backward starts from the output."""

import pytest
import torch
from saved_tensors import kept_bytes
from torch import nn

import route_kernels as rk
from route_kernels import native
from route_kernels.nn import AddLayerNorm
from route_kernels.ops.add_layer_norm import SPARE, spare_channels
from route_kernels.testing import EAGER, add_layer_norm_arguments, call, check_accuracy, outcome

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

SHAPES = {  # around vectors of 2 to 16 lanes, and parts of 64 tokens
    "one token": dict(batch=1, queries=1, channels=16),
    "one channel": dict(queries=5, channels=1),
    "as many channels as are kept": dict(queries=3, channels=4),
    "7": dict(queries=63, channels=7, zeros=1),
    "odd": dict(batch=3, queries=65, channels=33, zeros=2),
    "256": dict(queries=130, channels=256, zeros=4),
    "1000": dict(batch=1, queries=9, channels=1000),
    "normalized": dict(queries=70, channels=40, zeros=40, keep="normalized"),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_accuracy(sizes, dtype):
    check_accuracy("add_layer_norm", add_layer_norm_arguments(dtype=dtype, **sizes))


@pytest.mark.parametrize("keep", ["output", "normalized"])
def test_gradcheck(keep):
    arguments = add_layer_norm_arguments(queries=3, channels=6, zeros=2, keep=keep, dtype=torch.float64)
    tensors = [arguments[name] for name in ("x", "residual", "weight", "bias")]
    assert torch.autograd.gradcheck(lambda *tensors: rk.add_layer_norm(*tensors, keep=keep), tensors)


def with_ratio(arguments, ratio):
    """|bias| = ratio |weight| in every channel: x^ is found in y behind `ratio` times as much."""
    with torch.no_grad():
        sign = torch.where(arguments["bias"] < 0, -1.0, 1.0)
        arguments["bias"].copy_(ratio * arguments["weight"].double().abs() * sign)
    return arguments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("ratio", [0.3, 2, 8])
def test_accuracy_where_the_bias_is_larger_than_the_weight(ratio, dtype):
    arguments = add_layer_norm_arguments(batch=1, queries=200, channels=256, dtype=dtype)
    check_accuracy("add_layer_norm", with_ratio(arguments, ratio))


@pytest.mark.parametrize("keep, zeros", [("output", 0), ("output", 4), ("normalized", 24)])
def test_gradients_agree_with_what_it_replaces(keep, zeros):
    arguments = add_layer_norm_arguments(queries=70, zeros=zeros, keep=keep, dtype=torch.float64)
    grad_output = torch.randn(2, 70, 24, dtype=torch.float64)
    found = outcome(rk.add_layer_norm, arguments, grad_output)
    for name, expected in outcome(EAGER["add_layer_norm"], arguments, grad_output).items():
        assert (found[name] - expected).abs().max() <= 1e-9 * expected.abs().max(), name


@pytest.mark.parametrize("shift", [0.0, 1.0], ids=["no bias", "bias"])
def test_lost_channels_beyond_the_spare_ones_are_nan_and_not_wrong(shift):
    arguments = add_layer_norm_arguments(zeros=SPARE + 1)
    with torch.no_grad():
        arguments["bias"].fill_(shift)
    grads = outcome(rk.add_layer_norm, arguments, torch.randn(2, 9, 24))
    assert grads["output"].isfinite().all()
    assert grads["grad x"].isnan().all() and grads["grad weight"].isnan().any()
    arguments["keep"] = "normalized"
    assert all(
        result.isfinite().all() for result in outcome(rk.add_layer_norm, arguments, torch.randn(2, 9, 24)).values()
    )


def test_weights_that_are_tiny_beside_their_bias_are_among_the_spare_ones():
    weight, bias = torch.ones(10), torch.ones(10)
    weight[3], weight[7], bias[7], weight[5], weight[1], bias[1] = 1e-9, 0, 0, -1e-6, 1e-9, 0
    assert set(spare_channels(weight, bias, 3).tolist()) == {3, 7, 5}  # 1 has no bias: y holds all of its x^


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_only_the_output_and_a_few_numbers_a_token_are_kept(dtype):
    arguments = add_layer_norm_arguments(batch=2, queries=100, channels=64, dtype=dtype)
    parameters = [arguments["weight"], arguments["bias"]]
    channels = SPARE * 4
    kept = kept_bytes(lambda: call("add_layer_norm", arguments), but=parameters)
    assert kept == 200 * (4 + SPARE * dtype.itemsize) + channels
    plain = kept_bytes(lambda: EAGER["add_layer_norm"](**arguments), but=parameters)
    assert plain >= 200 * 64 * dtype.itemsize
    arguments["keep"] = "normalized"
    channels = 64 * 4
    assert kept_bytes(lambda: call("add_layer_norm", arguments), but=parameters) == (
        200 * (4 + 64 * dtype.itemsize) + channels
    )
    with torch.no_grad():
        assert kept_bytes(lambda: call("add_layer_norm", arguments)) == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_a_short_change_to_a_long_residual(autocast):
    """Under autocast a projection's output is bfloat16 and the residual float32; so are their gradients."""
    arguments = add_layer_norm_arguments(
        queries=5, dtype=torch.bfloat16, residual_dtype=torch.float32, parameter_dtype=torch.float32
    )
    grad_output = torch.randn(2, 5, 24)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = outcome(rk.add_layer_norm, arguments, grad_output)
    assert found["output"].dtype == found["grad residual"].dtype == found["grad weight"].dtype == torch.float32
    assert found["grad x"].dtype == torch.bfloat16
    longer = {**arguments, "x": arguments["x"].detach().float().requires_grad_()}
    for name, expected in outcome(EAGER["add_layer_norm"], longer, grad_output).items():
        torch.testing.assert_close(found[name].float(), expected, rtol=1e-2, atol=1e-2, msg=name)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)], ids=["no rows", "no tokens", "no channels"])
def test_empty_dimensions(shape):
    x, residual, weight, bias = (
        torch.zeros(size, requires_grad=True) for size in (shape, shape, shape[-1:], shape[-1:])
    )
    output = rk.add_layer_norm(x, residual, weight, bias)
    assert output.shape == shape
    assert all(not grad.any() for grad in torch.autograd.grad(output.sum(), (x, residual, weight, bias)))


def test_views_and_vectors():
    arguments = add_layer_norm_arguments()
    expected = call("add_layer_norm", arguments).detach()
    x, residual = arguments["x"].detach(), arguments["residual"].detach()
    for view in (x.transpose(0, 1).contiguous().transpose(0, 1), torch.nn.functional.pad(x, (1, 2))[..., 1:-2]):
        assert not view.is_contiguous()
        assert torch.equal(rk.add_layer_norm(**{**arguments, "x": view}), expected)
    assert torch.equal(rk.add_layer_norm(**{**arguments, "x": x.mT.contiguous().mT}), expected)
    given = {**arguments, "x": x[0, 0], "residual": residual[0, 0]}
    assert torch.equal(rk.add_layer_norm(**given), expected[0, 0])
    call("add_layer_norm", arguments).sum().backward()  # a gradient without strides


def test_one_token_does_not_change_another():
    arguments = add_layer_norm_arguments()
    expected = call("add_layer_norm", arguments).detach()
    with torch.no_grad():
        arguments["x"][0, 3], arguments["x"][1, 4] = torch.nan, 1e30
    output = call("add_layer_norm", arguments)
    assert output[0, 3].isnan().all()
    others = torch.ones(2, 9, dtype=torch.bool)
    others[0, 3] = others[1, 4] = False
    assert torch.equal(output[others], expected[others])


@pytest.mark.skipif(native.load_error is not None, reason=str(native.load_error))
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_change_nothing(threads):
    arguments = add_layer_norm_arguments(queries=500, zeros=2)
    grad_output = torch.randn(2, 500, 24)
    alone = outcome(rk.add_layer_norm, arguments, grad_output)
    torch.set_num_threads(threads)
    for name, tensor in outcome(rk.add_layer_norm, arguments, grad_output).items():
        assert torch.equal(tensor, alone[name]), name


def test_the_module_has_the_parameters_of_layer_norm():
    plain, ours = nn.LayerNorm(8), AddLayerNorm(8)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    ours.load_state_dict(plain.state_dict())
    x, residual = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    torch.testing.assert_close(ours(x, residual), plain(x + residual))
    assert "keep='output'" in repr(ours)
