"""Graphs are kept, read parameters live, leave models alone, and say clearly what they cannot follow."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.certify import UnsupportedOperator, bounds, graph_of
from robustbench_lite.certify.graph import _KEPT, trace
from robustbench_lite.core.threats import Lp

X = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Sixteen inputs, three logits, and one call to try."""

    def __init__(self, call) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 3)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.call(x).flatten(1))


def state(model: nn.Module) -> list:
    modes = [module.training for module in model.modules()]
    return [*modes, *((p.requires_grad, p.grad) for p in model.parameters()), sorted(vars(model))]


def test_parameters_are_read_live_from_one_kept_graph():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    graph = graph_of(net, X)
    before = bounds(net, Lp("linf", 0.1), x=X)[1]
    before.sum().backward()
    optimizer.step()
    after = bounds(net, Lp("linf", 0.1), x=X)[1]
    assert graph_of(net, X) is graph
    assert (after - before).abs().max() > 1e-3
    net.eval()
    torch.testing.assert_close(bounds(net, (X, X))[0], net(X))


def test_buffers_and_computed_constants_are_read_live():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.log_scale = nn.Linear(16, 3), nn.Parameter(torch.zeros(1))
            self.register_buffer("mean", torch.zeros(1, 1, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear((x - self.mean).flatten(1)) * self.log_scale.exp()

    net = Scaled()
    graph_of(net, X)
    with torch.no_grad():
        net.log_scale.fill_(math.log(3))
        net.mean.fill_(0.5)
    torch.testing.assert_close(bounds(net, (X, X))[0], net(X))


def test_a_new_structure_is_traced_anew_and_dead_models_are_forgotten():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.ReLU())
    graph = graph_of(net, X)
    net[2] = nn.Tanh()
    assert graph_of(net, X) is not graph
    torch.testing.assert_close(bounds(net, (X, X))[0], net(X))
    kept = len(_KEPT)
    del net, graph
    gc.collect()
    assert len(_KEPT) < kept


@pytest.mark.parametrize("front_end", ["fx", "export"])
def test_tracing_leaves_the_model_as_it_was(front_end):
    class WithConstant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten())
            self.linear = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.body(x * torch.tensor([2.0])))

    net = WithConstant()
    net.body[1].eval()
    net.linear.weight.requires_grad_(False)
    net.linear.bias.grad = torch.ones(3)
    before, statistics = state(net), net.body[1].running_mean.clone()
    trace(net, X, (front_end,))
    assert state(net) == before
    assert torch.equal(net.body[1].running_mean, statistics)


def test_export_follows_what_fx_cannot():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = 2 * x - 1
            if x.ndim != 4 or x.shape[1] != 1:
                raise ValueError("grey images only")
            return self.linear(F.gelu(x).flatten(1))

    net = Branches()
    lower, upper = bounds(net, Lp("linf", 0.1), x=X)
    logits = net(X)
    assert (lower <= logits).all()
    assert (logits <= upper).all()
    torch.testing.assert_close(bounds(net, (X, X))[0], logits)


def test_a_cifar_resnet_20_is_traced_and_bounded(kinds):
    net = kinds["ResNet"]((16, 32, 64), 3).eval()
    x = torch.rand(2, 3, 32, 32)
    lower, upper = bounds(net, Lp("linf", 1e-4), x=x)
    with torch.no_grad():
        logits = net(x)
    assert (lower <= logits).all()
    assert (logits <= upper).all()


def in_place_on_a_view(x: Tensor) -> Tensor:
    h = 2 * x
    h[:, :, 0].mul_(3)
    return h


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda x: torch.fft.fft2(x).real, "fft"),
        (lambda x: x * x, "product of two values"),
        (lambda x: 1 / (1 + x), "divisor"),
        (lambda x: F.dropout(x, 0.5), "dropout"),
        (lambda x: F.leaky_relu(x, -0.1), "negative slope"),
        (lambda x: x / x.max(), "max"),
        (lambda x: x[:, :, [0, 2, 1, 3]], "index"),
        (lambda x: x - x.mean(), "batch"),
        (lambda x: x.sort(-1).values, "sort"),
    ],
)
def test_an_unsupported_operator_is_named(call, told):
    with pytest.raises(UnsupportedOperator, match=told) as error:
        bounds(Net(call), Lp("linf", 0.1), x=X)
    assert "node" in str(error.value)
    assert "conv2d" in str(error.value)  # the list of what there is


def test_the_module_of_an_unsupported_operator_is_named():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2)), nn.Flatten())
    with pytest.raises(UnsupportedOperator, match=r"'1\.1' \(GroupNorm\)"):
        bounds(net, Lp("linf", 0.1), x=X)


def test_functions_name_the_line_they_stand_in():
    with pytest.raises(UnsupportedOperator, match=r"test_graph\.py:\d+"):
        bounds(Net(lambda x: torch.erfinv(x / 2)), Lp("linf", 0.1), x=X)


@pytest.mark.parametrize("call", [lambda x: x if x.sum() > 0 else -x, lambda x: x * float(x.max())])
def test_control_flow_on_values_is_refused_with_its_line(call):
    with pytest.raises(UnsupportedOperator, match=r"does not depend on the values of its input") as error:
        bounds(Net(call), Lp("linf", 0.1), x=X)
    assert "test_graph.py:" in str(error.value)


def test_batch_norm_without_running_statistics_is_refused():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten())
    with pytest.raises(UnsupportedOperator, match="running statistics"):
        bounds(net, Lp("linf", 0.1), x=X)


@pytest.mark.parametrize("call", [in_place_on_a_view, lambda x: x + torch.rand(())])
def test_a_trace_that_computes_something_else_is_refused(call):
    with pytest.raises(UnsupportedOperator):
        bounds(Net(call), Lp("linf", 0.1), x=X)


def test_hooks_that_change_the_output_are_not_overlooked():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    net[1].register_forward_hook(lambda module, args, output: output * 2)
    torch.testing.assert_close(bounds(net, (X, X))[0], net(X))  # torch.export sees hooks of layers
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    net.register_forward_hook(lambda module, args, output: output * 2)
    torch.testing.assert_close(bounds(net, (X, X))[0], net(X))


def test_parametrized_weights_are_read_as_the_layer_reads_them():
    net = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(16, 3)))
    torch.testing.assert_close(bounds(net, (X, X))[0], net(X))
    with torch.no_grad():
        net[1].parametrizations.weight.original0.mul_(2)
    torch.testing.assert_close(bounds(net, (X, X))[0], net(X))


def test_models_of_another_form_are_refused():
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x + y).flatten(1)

    with pytest.raises((ValueError, TypeError), match="y"):
        bounds(Two(), Lp("linf", 0.1), x=X)
    with pytest.raises(ValueError, match=r"logits of shape \(B, K\)"):
        bounds(nn.Conv2d(1, 2, 3), Lp("linf", 0.1), x=X)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        bounds(lambda x: x.flatten(1), Lp("linf", 0.1), x=X)


def test_a_graph_that_could_not_be_checked_is_not_kept():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    net[1].weight.data[0, 0] = float("nan")
    graph = graph_of(net, X)
    assert not graph.checked
    net[1].weight.data[0, 0] = 1.0
    assert graph_of(net, X) is not graph
    assert graph_of(net, X).checked


def test_a_layer_changed_in_place_is_traced_anew():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.LeakyReLU(0.01), nn.Linear(8, 3))
    graph_of(net, X)
    net[2].negative_slope = 0.9
    torch.testing.assert_close(bounds(net, (X, X))[0], net(X))
    net[1].register_forward_hook(lambda module, args, output: output + 1)
    torch.testing.assert_close(bounds(net, (X, X))[0], net(X))


@pytest.mark.parametrize("settings", [[2.0], {"scale": 2.0}, {"scale": [2.0, "text"], "rest": object()}])
def test_a_number_changed_inside_a_container_is_traced_anew(settings):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.settings = nn.Linear(16, 3), settings

        def forward(self, x: Tensor) -> Tensor:
            first = self.settings["scale"] if isinstance(self.settings, dict) else self.settings
            return self.linear(x.flatten(1)) * (first if isinstance(first, float) else first[0])

    net = Scaled()
    graph = graph_of(net, X)
    assert graph_of(net, X) is graph
    assert graph_of(net, X, recheck=True) is graph
    inner = settings["scale"] if isinstance(settings, dict) else settings
    if isinstance(inner, list):
        inner[0] = 5.0
    else:
        settings["scale"] = 5.0
    torch.testing.assert_close(bounds(net, (X, X))[0], net(X))


def test_a_kept_graph_that_no_longer_fits_at_all_is_traced_anew():
    class Holder:
        weight = torch.zeros(3, 16)

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.flatten(1), Holder.weight)

    net = Net()
    graph_of(net, X)
    Holder.weight = torch.ones(4, 16)
    assert graph_of(net, X, recheck=True).num_classes == 4
    torch.testing.assert_close(bounds(net, (X, X))[0], net(X))


def test_bounds_refuse_a_model_that_changes_its_input():
    images = X.clone()
    with pytest.raises(ValueError, match="changes its input in place"):
        bounds(Net(lambda x: x.sub_(0.5)), Lp("linf", 0.1), x=images)
    assert torch.equal(images, X)


def test_a_compiled_model_is_bounded_by_what_it_was_compiled_from():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    compiled = torch.compile(net, backend="eager")
    for ours, theirs in zip(bounds(compiled, Lp("linf", 0.1), x=X), bounds(net, Lp("linf", 0.1), x=X), strict=True):
        assert torch.equal(ours, theirs)


def test_a_failed_trace_prints_nothing(capfd):
    with pytest.raises(UnsupportedOperator):
        bounds(Net(lambda x: x if x.sum() > 0 else -x), Lp("linf", 0.1), x=X)
    assert capfd.readouterr() == ("", "")
