"""DGT through torch.compile, torch.export and ONNX."""

import pytest
import torch
from small_dgt import images, small_dgt

# two stages, one of each attention: tracing takes as long as the network is deep
TWO_STAGES = {"dims": (16, 32), "depths": (1, 1), "num_heads": (1, 2), "attention": ("dynamic_group", "global")}

pytestmark = pytest.mark.filterwarnings("ignore:centroids of dynamic groups")  # no optimizer follows in these tests


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compiles_without_a_graph_break_forward():
    model = small_dgt(**TWO_STAGES).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_compiles_without_a_graph_break_in_training():
    eager, compiled = small_dgt(**TWO_STAGES).train(), small_dgt(**TWO_STAGES).train()
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x = images()
    for step in range(2):
        loss, expected = run(x).square().mean(), eager(x).square().mean()
        torch.testing.assert_close(loss, expected, msg=f"step {step}")
        loss.backward()
        expected.backward()
    for (name, one), other in zip(eager.named_parameters(), compiled.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)
    for (name, one), other in zip(eager.named_buffers(), compiled.buffers()):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.slow
def test_compiles_by_inductor():
    model = small_dgt(**TWO_STAGES).eval()
    compiled = torch.compile(model, fullgraph=True)
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_exports_with_any_batch_size_and_plain_operators():
    model = small_dgt(**TWO_STAGES).eval()
    program = torch.export.export(model, (images(2),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("coterie" in operator for operator in operators)  # runs where this library is not installed
    x = images(5, seed=1)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_runs_as_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = small_dgt(**TWO_STAGES).eval()
    path = tmp_path / "model.onnx"
    program = torch.onnx.export(model, (images(2),), dynamo=True, verbose=False, dynamic_shapes=({0: "batch"},))
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = images(3, seed=1)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=1e-4, atol=1e-5)
