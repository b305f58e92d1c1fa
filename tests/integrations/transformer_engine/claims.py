"""What is claimed of our operations in Transformer Engine, of whichever version this process has.

Run by test_transformer_engine.py, a process a version, over `standin.py`, and by `make test-te` over the real
compiled module. POLYCOM_TE_SOURCES names the unpacked wheel; without it, TE is imported as it is installed.
"""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import pkgutil
import runpy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polycom_ext import activations, modules
from polycom_ext.errors import PolycomError
from tests.integrations.transformer_engine import standin
from tests.oracle import TOLERANCE, error

if "POLYCOM_TE_SOURCES" in os.environ:
    standin.install(Path(os.environ["POLYCOM_TE_SOURCES"]))
else:
    importlib.import_module("transformer_engine")
standin.without_driver()

import transformer_engine.pytorch as te  # noqa: E402
from transformer_engine.common import recipe as recipes  # noqa: E402
from transformer_engine.pytorch import custom_recipes  # noqa: E402
from transformer_engine.pytorch.ops.fuser import OperationFuser  # noqa: E402
from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer  # noqa: E402

import polycom_ext.integrations.transformer_engine as room  # noqa: E402
from polycom_ext.integrations.transformer_engine import fusions, operations  # noqa: E402

JOINT = hasattr(te.ops, "register_forward_backward_fusion")
LEARNABLE = [name for name in activations.REGISTRY if activations.find(name).learnable]
FUSED = [name for name in LEARNABLE if getattr(activations.find(name).load(), "takes_variants", False)]
EXAMPLE = Path(__file__).parents[3] / "examples" / "transformer-engine" / "feed_forward.py"
ROWS, HIDDEN, WIDTH = 16, 32, 64
Operation = Callable[..., Any]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def perturbed(activation: Any) -> Any:
    """Away from where training starts, where some gradients are alike."""
    with torch.no_grad():
        for parameter in activation.parameters():
            parameter.add_(torch.rand_like(parameter) / 4)
    return activation


def operation(name: str, *, scaled: bool = False, **options: Any) -> Any:
    make: Callable[..., Any] = room.named(name, scaled=scaled)
    return perturbed(make(device="cpu", **options))


def linear(inputs: int, outputs: int, bias: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    return te.ops.Linear(inputs, outputs, bias=bias, device="cpu", dtype=dtype)


def feed_forward(activation: Any, bias: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    return te.ops.Sequential(
        linear(HIDDEN, WIDTH, bias, dtype), activation, linear(WIDTH, HIDDEN, bias, dtype)
    )


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def gradients(model: nn.Module, y: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
    """Of y's weighted sum, by name; and y."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    named = {f"input {i}": tensor for i, tensor in enumerate(inputs)} | dict(model.named_parameters())
    found = torch.autograd.grad(y, list(named.values()), weights)
    return {"y": y.detach(), **dict(zip(named, found, strict=True))}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], within: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        if within:
            assert error(found[name], expected[name]) <= within, name
        else:
            assert torch.equal(found[name], expected[name]), name


@contextmanager
def nothing_of_ours_fused() -> Iterator[None]:
    registered = [
        getattr(OperationFuser, name, [])
        for name in ("forward_fusion_functions", "forward_backward_fusion_functions")
    ]
    kept = [list(functions) for functions in registered]
    for functions in registered:
        functions[:] = [one for one in functions if one.__module__ != fusions.__name__]
    try:
        yield
    finally:
        for functions, before in zip(registered, kept, strict=True):
            functions[:] = before


def forward_operations(model: Any) -> list[str]:
    """Names of what the fuser ran."""
    return [type(one).__name__ for group in model._module_groups for one, _ in group._forward_ops]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*LEARNABLE, "polynorm-4", "polyrelu-5"])
def test_an_operation_is_its_module(name: str, dtype: torch.dtype) -> None:
    name, _, order = name.partition("-")
    options: dict[str, Any] = {"order": int(order)} if order else {}
    act = operation(name, **options)
    x = leaf(ROWS, 3, WIDTH, dtype=dtype)
    model = te.ops.Sequential(te.ops.Identity(), act, te.ops.Identity())
    found = gradients(act, model(x), x)
    assert found["y"].dtype == found["input 0"].dtype == dtype
    assert_same(found, gradients(act.module, act.module(x), x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LEARNABLE)
def test_a_factor_a_row_is_an_extra_input(name: str, dtype: torch.dtype) -> None:
    act, x, scale = operation(name, scaled=True), leaf(ROWS, WIDTH, dtype=dtype), leaf(ROWS)
    assert type(act).__name__ == f"Scaled{type(act.module).__name__}"
    found = gradients(act, te.ops.Sequential(te.ops.Identity(), act)(x, scale), x, scale)
    plain = (act.module(x.float()) * scale.unsqueeze(-1)).to(dtype)
    assert_same(found, gradients(act.module, plain, x, scale), within=3 * TOLERANCE[dtype])


@pytest.mark.parametrize("name", FUSED)
def test_a_feed_forward_block_trains(name: str) -> None:
    model = te.ops.Sequential(
        te.ops.LayerNorm(HIDDEN, device="cpu"), linear(HIDDEN, WIDTH), operation(name), linear(WIDTH, HIDDEN)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, target = torch.randn(ROWS, HIDDEN), torch.randn(ROWS, HIDDEN)
    started = {key: value.clone() for key, value in model.named_parameters()}
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    assert not any(torch.equal(value, started[key]) for key, value in model.named_parameters())


@pytest.mark.parametrize("name", LEARNABLE)
def test_state_dicts_interchange_with_the_modules(name: str) -> None:
    act, module = operation(name), activations.build(name)
    assert all(parameter.dtype == torch.float32 for parameter in act.parameters())
    module.load_state_dict(act.state_dict(), strict=True)
    assert torch.equal(module(x := torch.randn(ROWS, WIDTH)), act(x))
    act.load_state_dict(activations.build(name).state_dict(), strict=True)
    assert torch.equal(activations.build(name)(x), act(x))


def test_an_operation_shares_the_parameters_of_a_module_that_is_there() -> None:
    module = modules.PolyNorm()
    act = room.operation_of(module)
    model = nn.ModuleDict({"act": module, "view": act}).bfloat16()
    assert [id(one) for one in act.parameters()] == [id(one) for one in module.parameters()]
    assert next(act.parameters()).dtype == torch.bfloat16
    module.weight = nn.Parameter(torch.zeros(3))
    assert act.weight is module.weight
    assert len(list(model.parameters())) == 2


def test_an_operation_is_copied_and_pickled() -> None:
    act, x = operation("polynorm", order=2, eps=1e-3), torch.randn(ROWS, WIDTH)
    for twin in (copy.deepcopy(act), pickle.loads(pickle.dumps(act))):
        assert torch.equal(twin(x), act(x))
        assert twin.weight is twin.module.weight
        assert twin.weight is not act.weight
    assert "order=2" in repr(act)


def test_eps_is_the_modules() -> None:
    x = torch.randn(ROWS, WIDTH)
    wide, act = operation("polynorm", eps=10.0), operation("polynorm")
    wide.load_state_dict(act.state_dict())
    assert not torch.equal(wide(x), act(x))


class Witness(te.ops.BasicOperation):
    """Passes its input on, as a new tensor that it remembers."""

    seen: Tensor

    def op_forward(self, ctx: Any, input_: Tensor, **_: Any) -> Tensor:
        self.seen = input_.clone()
        return self.seen

    def op_backward(self, ctx: Any, grad_output: Tensor) -> tuple[Tensor, tuple[()]]:
        return grad_output, ()


@pytest.mark.parametrize("name", [*FUSED, "swish"])
def test_x_is_freed_by_backward_unless_it_is_the_callers(name: str) -> None:
    witness, act, x = Witness(), operation(name), leaf(ROWS, WIDTH)
    te.ops.Sequential(witness, act, te.ops.Identity())(x).sum().backward()
    assert witness.seen.untyped_storage().nbytes() == 0 or witness.seen.numel() == 0
    te.ops.Sequential(act)(x).sum().backward()
    assert x.numel() == ROWS * WIDTH


def test_under_autocast_an_operation_computes_in_its_type() -> None:
    act, x = operation("polynorm"), torch.randn(ROWS, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = act(x)
    assert torch.equal(y, act.module(x.bfloat16()))


def test_the_fusions_are_registered_once() -> None:
    importlib.reload(fusions)
    importlib.reload(room)
    room.fusions.register()
    for name in ("forward_fusion_functions", *(["forward_backward_fusion_functions"] if JOINT else [])):
        ours = [one for one in getattr(OperationFuser, name) if one.__module__ == fusions.__name__]
        assert len(ours) == 1
        assert ours[0] is getattr(room.fusions, ours[0].__name__)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_a_bias_before_is_added_on_the_way(name: str, scaled: bool) -> None:
    bias, act = te.ops.Bias(WIDTH, device="cpu"), operation(name, scaled=scaled)
    nn.init.normal_(bias.bias)
    inputs = (leaf(ROWS, WIDTH), *([leaf(ROWS)] if scaled else []))
    model = te.ops.Sequential(bias, act)
    found = gradients(model, model(*inputs), *inputs)
    assert forward_operations(model) == ["ForwardActivation"]
    with nothing_of_ours_fused():
        apart = te.ops.Sequential(bias, act)
        assert_same(found, gradients(apart, apart(*inputs), *inputs), within=2e-6)
    assert len(forward_operations(apart)) == 2


def test_a_bias_that_te_adds_in_its_matrix_product_stays_there() -> None:
    model = te.ops.Sequential(linear(HIDDEN, WIDTH, True, torch.bfloat16), operation("polynorm"))
    model(leaf(ROWS, HIDDEN, dtype=torch.bfloat16))
    assert forward_operations(model) == ["ForwardLinearBiasActivation", "PolyNorm"]


def kept_bytes(model: nn.Module, *inputs: Tensor) -> tuple[Tensor, int]:
    """The result, and how many bytes backward keeps beside parameters and inputs."""
    mine = {one.untyped_storage().data_ptr() for one in (*inputs, *model.parameters())}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(*inputs)
    return y, sum(size for where, size in found.items() if where not in mine)


@pytest.mark.skipif(not JOINT, reason="this Transformer Engine has no forward-backward fusions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", [*FUSED, "swish"])
def test_the_linear_layer_behind_keeps_no_y(name: str, scaled: bool, bias: bool, dtype: torch.dtype) -> None:
    act = operation(name, scaled=scaled)
    model = feed_forward(act, bias, dtype)
    inputs = (leaf(ROWS, HIDDEN, dtype=dtype), *([leaf(ROWS)] if scaled else []))
    y, kept = kept_bytes(model, *inputs)
    if bias and name in FUSED:  # each where it costs nothing: ours, or in TE's matrix product
        theirs = ["ForwardLinearBiasActivation", "ActivationLinear"]
        ours = ["BasicLinear", "ActivationLinear", "Bias"]
        assert forward_operations(model) == (theirs if dtype == torch.bfloat16 else ours)
    assert "ActivationLinear" in forward_operations(model)
    found = gradients(model, y, *inputs)
    with nothing_of_ours_fused():
        apart = te.ops.Sequential(*model)
        y, kept_apart = kept_bytes(apart, *inputs)
        expected = gradients(apart, y, *inputs)
    assert kept_apart - kept == ROWS * WIDTH * dtype.itemsize
    taken = bias and dtype == torch.float32 and name in FUSED  # the bias then is added in another place
    assert_same(found, expected, within=2e-6 if taken else 0.0)


@pytest.mark.skipif(not JOINT, reason="this Transformer Engine has no forward-backward fusions")
def test_frozen_weights_need_no_y() -> None:
    model, x = feed_forward(operation("polynorm")), leaf(ROWS, HIDDEN)
    expected = gradients(model, model(x), x)
    for parameter in model[2].parameters():
        parameter.requires_grad_(False)
    (of_x,) = torch.autograd.grad(model(x), x, torch.linspace(-1, 1, ROWS * HIDDEN).view(ROWS, HIDDEN))
    assert torch.equal(of_x, expected["input 0"])


def test_without_gradients_nothing_is_kept() -> None:
    model, x = feed_forward(operation("polynorm"), bias=True), torch.randn(ROWS, HIDDEN)
    with torch.no_grad():
        y, kept = kept_bytes(model, x)
    assert kept == 0
    assert torch.equal(y, model(x))


def reference_recipe() -> Any:
    """FP8 by TE's own quantizer in plain torch."""
    names = (
        one.name for one in pkgutil.iter_modules(custom_recipes.__path__) if "current_scaling" in one.name
    )
    module = importlib.import_module(f"{custom_recipes.__name__}.{next(names)}")
    (factory,) = (value for name, value in vars(module).items() if name.startswith("current_scaling_ref"))
    return recipes.CustomRecipe(qfactory=factory)


class Unquantised(te.ops.BasicOperation):
    """The same activation, ignorant of quantizers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._parameters = module._parameters
        object.__setattr__(self, "module", module)

    def op_forward(self, ctx: Any, input_: Tensor, **_: Any) -> Tensor:
        ctx.save_for_backward(input_)
        return self.module(input_)

    def op_backward(self, ctx: Any, grad_output: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            y = self.module(x)
        of_x, *others = torch.autograd.grad(y, (x, *self.module.parameters()), grad_output)
        return of_x, others


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", [*FUSED, "swish"])
def test_neighbours_quantizers_are_honoured_in_fp8(
    name: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    act = operation(name, activation_recompute_in_mlp=recompute)
    model, x = feed_forward(act), leaf(ROWS, HIDDEN)
    calls: list[tuple[Any, ...]] = []
    apply_to = operations.Activation.apply_to

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = apply_to(self, *args, **kwargs)
        calls.append((kwargs["quantizer"], kwargs["grad_quantizer"], y))
        return y

    passed_on: list[Tensor] = []
    backward = operations.Activation.gradients

    def watched_backward(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = backward(self, *args, **kwargs)
        passed_on.append(result.x)
        return result

    monkeypatch.setattr(operations.Activation, "apply_to", watched)
    monkeypatch.setattr(operations.Activation, "gradients", watched_backward)
    with te.autocast(enabled=True, recipe=reference_recipe()):
        y = model(x)
    ((quantizer, grad_quantizer, emitted),) = calls
    assert quantizer is model[2].get_input_quantizer()
    assert grad_quantizer is model[0].get_grad_output_quantizer()
    assert quantizer is not None
    assert grad_quantizer is not None
    assert type(emitted) is type(quantizer(torch.ones(ROWS, WIDTH)))
    assert ("ActivationLinear" in forward_operations(model)) is (recompute and JOINT)
    found = gradients(model, y, x)
    assert [type(one) for one in passed_on] == [type(grad_quantizer(torch.ones(ROWS, WIDTH)))]
    ignorant = te.ops.Sequential(model[0], Unquantised(act.module), model[2])
    with te.autocast(enabled=True, recipe=reference_recipe()):
        expected = gradients(ignorant, ignorant(x), x)
    assert_same(found, expected)
    full = gradients(model, model(x), x)
    assert 0 < error(found["y"], full["y"]) < 0.1


@pytest.mark.skipif(not JOINT, reason="this Transformer Engine has no forward-backward fusions")
def test_under_delayed_scaling_y_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    act = operation("polynorm", activation_recompute_in_mlp=True)
    run = [act, *linear(WIDTH, HIDDEN).basic_ops]
    fuse = room.fusions.fuse_activation_linear
    assert [type(one).__name__ for one in fuse(run, recipe=None)] == ["ActivationLinear"]
    assert fuse(run, recipe=recipes.DelayedScaling()) == run
    assert len(fuse(run, recipe=recipes.Float8BlockScaling())) == 1
    of_earlier_steps = Float8Quantizer(torch.ones(1), torch.zeros(1), standin.DType.kFloat8E4M3)
    monkeypatch.setattr(run[1], "get_input_quantizer", lambda: of_earlier_steps)
    assert fuse(run, recipe=reference_recipe()) == run


def test_what_learns_nothing_is_refused_by_name() -> None:
    with pytest.raises(PolycomError, match="activation GELU has no parameters of its own"):
        room.operation_of(nn.GELU())
    with pytest.raises(PolycomError, match="activation 'swiglu' has no parameters of its own"):
        room.named("swiglu")
    with pytest.raises(PolycomError, match="unknown activation 'polynrom'"):
        room.named("polynrom")
    with pytest.raises(AttributeError, match="PolyNrom"):
        _ = room.PolyNrom
    assert {"PolyNorm", "ScaledPolyNorm", "XIELU"} <= set(dir(room))
    assert issubclass(room.ScaledPolyNorm, te.ops.BasicOperation)


def test_the_example_runs() -> None:
    losses = runpy.run_path(str(EXAMPLE))["losses"]
    assert losses[-1] < losses[0] / 2
