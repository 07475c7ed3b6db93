"""LayerNorm of a residual sum, whose backward starts from the output; the matrix has the rest."""

import pytest
import torch
from matrix import each_way, results
from saved_tensors import kept_bytes
from torch import nn

import route_kernels as rk
from route_kernels.nn import AddLayerNorm
from route_kernels.ops.add_layer_norm import SPARE, spare_channels
from route_kernels.testing import EAGER, add_layer_norm_arguments, call, check_accuracy, outcome

OP = "add_layer_norm"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("ratio", [0.3, 2, 8])
def test_accuracy_where_the_bias_is_larger_than_the_weight(ratio, dtype):
    """With |bias| = ratio |weight| in every channel x^ is found in y behind `ratio` times as much."""
    arguments = add_layer_norm_arguments(batch=1, queries=200, channels=256, dtype=dtype)
    with torch.no_grad():
        sign = torch.where(arguments["bias"] < 0, -1.0, 1.0)
        arguments["bias"].copy_(ratio * arguments["weight"].double().abs() * sign)
    check_accuracy(OP, arguments)


@pytest.mark.parametrize("shift", [0.0, 1.0], ids=["no bias", "bias"])
@each_way(OP)
def test_lost_channels_beyond_the_spare_ones_are_nan_and_not_wrong(shift, way):
    arguments = add_layer_norm_arguments(zeros=SPARE + 1)
    with torch.no_grad():
        arguments["bias"].fill_(shift)
    grads = results(OP, arguments, way)
    assert grads["output"].isfinite().all()
    assert grads["grad x"].isnan().all() and grads["grad weight"].isnan().any()
    arguments["keep"] = "normalized"
    assert all(result.isfinite().all() for result in results(OP, arguments, way).values())


def test_weights_that_are_tiny_beside_their_bias_are_among_the_spare_ones():
    weight, bias = torch.ones(10), torch.ones(10)
    weight[3], weight[7], bias[7], weight[5], weight[1], bias[1] = 1e-9, 0, 0, -1e-6, 1e-9, 0
    assert set(spare_channels(weight, bias, 3).tolist()) == {3, 7, 5}  # 1 has no bias: y holds all of its x^


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_only_the_output_and_a_few_numbers_a_token_are_kept(dtype):
    arguments = add_layer_norm_arguments(batch=2, queries=100, channels=64, dtype=dtype)
    parameters = [arguments["weight"], arguments["bias"]]
    assert kept_bytes(lambda: EAGER[OP](**arguments), but=parameters) >= 200 * 64 * dtype.itemsize
    for keep, channels in (("output", SPARE), ("normalized", 64)):
        arguments["keep"] = keep
        kept = kept_bytes(lambda: call(OP, arguments), but=parameters)
        assert kept == 200 * (4 + channels * dtype.itemsize) + channels * 4
    with torch.no_grad():
        assert kept_bytes(lambda: call(OP, arguments)) == 0


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
    for name, expected in outcome(EAGER[OP], longer, grad_output).items():
        torch.testing.assert_close(found[name].float(), expected, rtol=1e-2, atol=1e-2, msg=name)


def test_vectors_and_nan():
    arguments = add_layer_norm_arguments()
    expected = call(OP, arguments)
    one = {**arguments, "x": arguments["x"][0, 0], "residual": arguments["residual"][0, 0]}
    assert torch.equal(call(OP, one), expected[0, 0])
    with torch.no_grad():
        arguments["x"][0, 3] = torch.nan
    assert call(OP, arguments)[0, 3].isnan().all()


def test_the_module_has_the_parameters_of_layer_norm():
    plain, ours = nn.LayerNorm(8), AddLayerNorm(8)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    ours.load_state_dict(plain.state_dict())
    x, residual = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    torch.testing.assert_close(ours(x, residual), plain(x + residual))
    assert "keep='output'" in repr(ours)
