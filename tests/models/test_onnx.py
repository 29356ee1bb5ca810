"""Nets from ONNX files equal the same layers written in PyTorch; what cannot be judged honestly is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite import Lp
from robustbench_lite.certify import bounds
from robustbench_lite.evaluation.fingerprint import fingerprint
from robustbench_lite.models.onnx_net import load_onnx

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnx2torch", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")

SIZE = {"in_channels": 1, "image_size": 4}
RESHAPES = {
    "flatten": ("Flatten", None),
    "kept": ("Reshape", [0, -1]),
    "open": ("Reshape", [-1, 32]),
    "one": ("Reshape", [1, 32]),
}


def weights() -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(3)
    shapes = {"k": (2, 1, 3, 3), "b": (2,), "w": (3, 32), "c": (3,)}
    return {name: torch.randn(*shape, generator=stream) for name, shape in shapes.items()}


def reference(x: Tensor) -> Tensor:
    w = weights()
    return F.linear(F.conv2d((x - 0.25) * 2, w["k"], w["b"], padding=1).relu().flatten(1), w["w"], w["c"])


def net(
    path: Path, batch: Any = "batch", reshape: str = "flatten", opset: int = 20, image: Any = (1, 4, 4), **more: Any
) -> Path:
    """Write conv, ReLU, flatten, linear as ONNX, as other tools than PyTorch's exporter do too."""
    h, kind = onnx.helper, onnx.TensorProto.FLOAT
    operator, sizes = RESHAPES[reshape]
    held = [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in weights().items()]
    held += [onnx.numpy_helper.from_array(np.array(v, np.float32), n) for n, v in (("mean", 0.25), ("gain", 2.0))]
    held += [onnx.numpy_helper.from_array(np.array(sizes or [0], np.int64), "sizes")]
    start = [h.make_node("Reshape", ["x", "as"], ["image"])] if len(image) == 1 else []
    start += [h.make_node("Transpose", ["x"], ["image"], perm=[0, 3, 1, 2])] if image[-1] == 1 else []
    if len(image) == 1:
        held.append(onnx.numpy_helper.from_array(np.array([-1, 1, 4, 4], np.int64), "as"))
    nodes = [
        *start,
        h.make_node("Sub", ["image" if start else "x", "mean"], ["s"]),
        h.make_node("Mul", ["s", "gain"], ["m"]),
        h.make_node("Identity", ["b"], ["bias"]),
        h.make_node("Conv", ["m", "k", "bias"], ["z"], pads=[1, 1, 1, 1]),
        h.make_node("Relu", ["z"], ["r"]),
        h.make_node(operator, ["r", "sizes"] if sizes else ["r"], ["f"]),
        h.make_node("Gemm", ["f", "w", "c"], ["y"], transB=1),
        *more.get("nodes", []),
    ]
    inputs = [h.make_tensor_value_info("x", more.get("type", kind), [batch, *image]), *more.get("inputs", [])]
    outputs = more.get("outputs") or [h.make_tensor_value_info("y", kind, [batch, 3])]
    graph = h.make_graph(nodes, "net", inputs, outputs, held)
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", opset)], ir_version=9), path)
    return path


@pytest.mark.parametrize("opset", [13, 17, 20])
@pytest.mark.parametrize(
    ("reshape", "batch"), [("flatten", "n"), ("kept", "n"), ("open", "n"), ("one", 1), ("kept", 4)]
)
def test_logits_gradients_and_bounds_are_those_of_the_layers(
    tmp_path: Path, reshape: str, batch: Any, opset: int
) -> None:
    model = load_onnx(net(tmp_path / "net.onnx", batch, reshape, opset), **SIZE)
    assert not model.training
    for count in (1, 5):
        x = torch.rand(count, 1, 4, 4, requires_grad=True)
        torch.testing.assert_close(model(x), reference(x))
        mine, other = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (model, reference))
        torch.testing.assert_close(mine, other)
    threat = Lp("linf", 0.05)
    x = x.detach()
    lower, upper = (bound.detach() for bound in bounds(model, threat, x=x, method="crown"))
    near = [threat.project(x + 0.1 * (torch.rand(x.shape) - 0.5), x) for _ in range(200)]
    logits = torch.stack([reference(part) for part in near])
    assert bool((logits >= lower - 1e-5).all() and (logits <= upper + 1e-5).all())
    assert float((upper - lower).max()) < 20 * float((logits.amax(0) - logits.amin(0)).max())


@pytest.mark.parametrize("image", [(16,), (4, 4, 1)])
def test_images_come_in_the_form_that_the_net_takes(tmp_path: Path, image: Any) -> None:
    model, x = load_onnx(net(tmp_path / "net.onnx", image=image), **SIZE), torch.rand(3, 1, 4, 4)
    torch.testing.assert_close(model(x), reference(x))
    assert load_onnx(net(tmp_path / "plain.onnx"))(x).shape == (3, 3)  # which says itself what it takes


def test_a_file_has_one_fingerprint_and_another_net_another(tmp_path: Path) -> None:
    path = net(tmp_path / "net.onnx")
    same = {fingerprint(load_onnx(path, **SIZE)) for _ in range(2)}
    assert len(same) == 1
    proto = onnx.load(path)
    next(node for node in proto.graph.node if node.op_type == "Relu").op_type = "Sigmoid"
    onnx.save(proto, path)
    assert fingerprint(load_onnx(path, **SIZE)) not in same


def test_weights_beside_the_file_are_found(tmp_path: Path) -> None:
    proto = onnx.load(net(tmp_path / "net.onnx"))
    onnx.save(proto, tmp_path / "out.onnx", save_as_external_data=True, location="out.data", size_threshold=0)
    assert (tmp_path / "out.data").stat().st_size > 300
    x = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(load_onnx(tmp_path / "out.onnx", **SIZE)(x), reference(x))


def test_what_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    two_in = net(tmp_path / "two_in.onnx", inputs=[value("extra", 1, [1])])
    outputs = [value(name, 1, ["batch", 3]) for name in ("y", "again")]
    again = onnx.helper.make_node("Identity", ["y"], ["again"])
    two_out = net(tmp_path / "two_out.onnx", nodes=[again], outputs=outputs)
    mixing = net(
        tmp_path / "mixing.onnx", 1, nodes=[onnx.helper.make_node("Softmax", ["y"], ["mixed"], axis=0)],
        outputs=[value("mixed", 1, [1, 3])],
    )  # fmt: skip
    unknown = net(
        tmp_path / "unknown.onnx", nodes=[onnx.helper.make_node("Hardmax", ["y"], ["hard"])],
        outputs=[value("hard", 1, ["batch", 3])],
    )  # fmt: skip
    deep = net(
        tmp_path / "deep.onnx", nodes=[onnx.helper.make_node("Unsqueeze", ["y", "one"], ["more"])],
        outputs=[value("more", 1, ["batch", 3, 1])],
    )  # fmt: skip
    proto = onnx.load(deep)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2], np.int64), "one"))
    onnx.save(proto, deep)
    (tmp_path / "no.onnx").write_bytes(b"hello, world")
    for path, words in (
        (two_in, r"2 inputs \(x, extra\)"), (two_out, r"2 outputs \(y, again\)"), (mixing, "mixes the images"),
        (unknown, "cannot convert .*Hardmax"), (deep, "must give logits"), (tmp_path / "no.onnx", "is no ONNX file"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            load_onnx(path, **SIZE)
    with pytest.raises(ValueError, match="takes inputs of 1x4x4, the images are 3x8x8"):
        load_onnx(net(tmp_path / "net.onnx"), in_channels=3, image_size=8)
    with pytest.raises(FileNotFoundError, match="no ONNX file"):
        load_onnx(tmp_path / "gone.onnx")


def test_a_wrong_conversion_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx2torch

    def wrong(proto: Any) -> nn.Module:
        next(node for node in proto.graph.node if node.op_type == "Relu").op_type = "Tanh"
        return convert(proto)

    convert = onnx2torch.convert
    monkeypatch.setattr(onnx2torch, "convert", wrong)
    with pytest.raises(ValueError, match="computes something else"):
        load_onnx(net(tmp_path / "net.onnx"), **SIZE)
