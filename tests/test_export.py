"""Exported graphs hold PyTorch's own operators alone, and compute the same; compiled ones still call the kernels."""

import pytest
import torch
from torch import nn

import route_kernels as rk
from route_kernels import native
from route_kernels.nn import MSDeformAttn, QueryRouter, RoutedSelfAttention

LEVELS = ((5, 7), (3, 4))
QUERIES = {1: torch.export.Dim.DYNAMIC}


class Routed(nn.Module):
    """Router, query similarity and routed self-attention."""

    def __init__(self):
        super().__init__()
        self.router = QueryRouter(16, rank=4, hidden_dim=8)
        self.attention = RoutedSelfAttention(16, num_heads=2)

    def forward(self, query):
        return self.attention(query, None, self.router(query))


class Sampled(nn.Module):
    """The fused deformable attention of the module, and the plain one with counts of points."""

    def __init__(self):
        super().__init__()
        self.attention = MSDeformAttn(16, num_levels=2, num_heads=2, num_points=3)

    def forward(self, query, references, memory):
        attended = self.attention(query, references, memory, LEVELS)
        places = attended.sigmoid().unflatten(-1, (2, 4, 2))  # [B, N, H, 4, 2]
        weights = attended.unflatten(-1, (2, 8))[..., :4].softmax(-1)
        return attended + rk.ms_deform_attn(memory.unflatten(-1, (2, 8)), LEVELS, None, places, weights, points=(3, 1))


def example(queries):
    return {
        Routed: (torch.randn(2, queries, 16),),
        Sampled: (torch.randn(2, queries, 16), torch.rand(2, queries, 1, 2), torch.randn(2, 47, 16)),
    }


DYNAMIC = {Routed: (QUERIES,), Sampled: (QUERIES, QUERIES, None)}
each_module = pytest.mark.parametrize("build", [Routed, Sampled])


def foreign_operators(graph):
    """The targets in an exported graph that are not PyTorch's or Python's own."""
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    return {str(target) for target in targets if getattr(target, "namespace", "aten") not in ("aten", "_operator")}


@pytest.mark.parametrize(
    "build, strict",
    [(Routed, False), (Routed, True), (Sampled, False), pytest.param(Sampled, True, marks=pytest.mark.slow)],
)
def test_torch_export_for_any_number_of_queries(build, strict):
    module = build().eval()
    program = torch.export.export(module, example(9)[build], dynamic_shapes=DYNAMIC[build], strict=strict)
    assert foreign_operators(program.graph) == set()
    for queries in (9, 4, 23):
        inputs = example(queries)[build]
        torch.testing.assert_close(program.module()(*inputs), module(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(native.load_error is not None, reason=str(native.load_error))
@each_module
def test_an_explicit_request_is_honoured_in_export(build):
    module = build().eval()
    with rk.backend("cpu"):
        program = torch.export.export(module, example(9)[build], strict=False)
    assert (
        foreign_operators(program.graph)
        == {
            Routed: {"route_kernels.query_similarity.default", "route_kernels.routed_attention.default"},
            Sampled: {"route_kernels.ms_deform_attn_fused.default", "route_kernels.ms_deform_attn.default"},
        }[build]
    )


@pytest.mark.skipif(native.load_error is not None, reason=str(native.load_error))
@each_module
def test_compile_still_calls_the_kernels(build):
    targets = set()

    def look(graph_module, inputs):
        targets.update(str(node.target) for node in graph_module.graph.nodes)
        return graph_module

    torch._dynamo.reset()
    torch.compile(build().eval(), backend=look, fullgraph=True)(*example(9)[build])
    assert len({target for target in targets if target.startswith("route_kernels.")}) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@each_module
def test_jit_trace(build):
    module, inputs = build().eval(), example(9)[build]
    traced = torch.jit.trace(module, inputs)
    assert {node.kind().partition("::")[0] for node in traced.inlined_graph.nodes()} <= {"aten", "prim"}
    torch.testing.assert_close(traced(*inputs), module(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [Routed, pytest.param(Sampled, marks=pytest.mark.slow)])
def test_onnx(build, tmp_path):
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript and onnx: pip install onnx onnxscript")
    onnx = pytest.importorskip("onnx")
    module, inputs = build().eval(), example(9)[build]
    path = str(tmp_path / "module.onnx")
    torch.onnx.export(module, inputs, path, dynamo=True, dynamic_shapes=DYNAMIC[build], verbose=False)
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "pkg.onnxscript.torch_lib.common"}
    runtime = pytest.importorskip("onnxruntime", reason="the exported file is valid; running it needs onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for queries in (9, 4):
        inputs = example(queries)[build]
        names = [entry.name for entry in session.get_inputs()]
        fed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        torch.testing.assert_close(torch.from_numpy(session.run(None, fed)[0]), module(*inputs), rtol=1e-4, atol=1e-4)
