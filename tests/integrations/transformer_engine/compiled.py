"""What only the real compiled module of Transformer Engine can say; run by `make test-te`, without a GPU."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import pytest
import torch

from polycom_ext.ops.polynomial import fused, quantized
from polycom_ext.ops.polynomial.quantized import Recipe, Target
from tests.integrations.transformer_engine import fp8, standin
from tests.integrations.transformer_engine.kernels import TRITON

torch.manual_seed(0)
te: Any = importlib.import_module("transformer_engine.pytorch")
tex: Any = importlib.import_module(standin.COMPILED)
standin.without_driver()
tensor: Any = importlib.import_module("transformer_engine.pytorch.tensor")
room: Any = importlib.import_module("polycom_ext.integrations.transformer_engine")
ROWS, WIDTH = 128, 256


def test_this_is_no_stand_in() -> None:
    assert tex.__file__.endswith(".so")


@pytest.mark.parametrize("kind", standin.TYPES, ids=lambda kind: kind.__name__)
def test_the_stand_ins_types_have_the_members_of_the_real_ones(kind: Any) -> None:
    real = getattr(tex, kind.__name__)
    if hasattr(kind, "__members__"):
        assert {name: int(value) for name, value in real.__members__.items()} == {
            one.name: one.value for one in kind
        }
    else:
        assert set(vars(kind())) <= set(dir(real))


def positional(signature: str) -> list[str]:
    """Names of a pybind11 signature's parameters, in order."""
    inner = signature[signature.index("(") + 1 : signature.rindex(") ->")]
    return re.findall(r"(?:^|, )(\w+): ", inner)


@pytest.mark.parametrize("function", [*standin.KERNELS, *fp8.KERNELS], ids=lambda one: one.__name__)
def test_the_stand_ins_functions_take_what_the_real_ones_take(function: Any) -> None:
    kernel = standin.REAL.get(function.__name__) or getattr(tex, function.__name__)
    real = positional(kernel.__doc__.splitlines()[0])
    ours = inspect.signature(function).parameters.values()
    named = [one.name for one in ours if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    assert len(named) == len(real) or any(one.kind is one.VAR_POSITIONAL for one in ours)
    if real and not real[0].startswith("arg"):  # pybind11's name for one that has none
        assert named == real[: len(named)]


@pytest.mark.parametrize("function", TRITON, ids=lambda one: one.__name__)
def test_what_stands_for_triton_s_takes_what_that_takes(function: Any) -> None:
    real = inspect.signature(standin.REAL[function.__name__]).parameters
    ours = inspect.signature(function).parameters
    assert [(one.name, one.default) for one in real.values()] == [
        (one.name, one.default) for one in ours.values()
    ]


def consumer(quantizer: Any) -> Any:
    """An operation whose input is to come quantised, as of TE's linear layers; it does not read it."""

    class Consumer(te.ops.BasicOperation):
        def get_input_quantizer(self) -> Any:
            return quantizer

        def op_forward(self, ctx: Any, input_: Any, **_: Any) -> torch.Tensor:
            self.seen = input_
            return torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16)

        def op_backward(self, ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, tuple[()]]:
            return grad_output, ()

    return Consumer()


def delayed() -> Any:
    """TE's quantizer of delayed scaling; its empty output, which asks the driver, made by hand."""
    quantizer = tensor.Float8Quantizer(torch.tensor([3.0]), torch.zeros(1), standin.DType.kFloat8E4M3)

    def make_empty(shape: Any, **options: Any) -> Any:
        return tensor.Float8Tensor(
            shape=shape,
            dtype=options["dtype"],
            data=torch.empty(shape, dtype=torch.uint8),
            fp8_scale_inv=torch.empty(1),
            fp8_dtype=quantizer.dtype,
            quantizer=quantizer,
            device=torch.device("cpu"),
        )

    quantizer.make_empty = make_empty
    return quantizer


QUANTIZERS = {
    Recipe.TENSOR: delayed,
    Recipe.BLOCKS: lambda: tensor.Float8BlockQuantizer(
        standin.DType.kFloat8E4M3, rowwise=True, columnwise=False, block_scaling_dim=1
    ),
    Recipe.MX: lambda: tensor.MXFP8Quantizer(standin.DType.kFloat8E4M3, rowwise=True, columnwise=False),
}


def expected(recipe: Recipe, y: torch.Tensor) -> tuple[Target, float]:
    """The buffers of the quantised y by plain torch, and its largest element."""
    scale_type = torch.uint8 if recipe is Recipe.MX else torch.float32
    target = Target(
        recipe,
        torch.zeros(ROWS, WIDTH, dtype=torch.uint8),
        torch.zeros(quantized.scale_shape(recipe, ROWS, WIDTH), dtype=scale_type),
        *((torch.tensor([3.0]), torch.zeros(1)) if recipe is Recipe.TENSOR else ()),
    )
    quantized.quantize(y, target)
    return target, float(y.abs().max())


@pytest.mark.parametrize("name", ["polynorm", "polyrelu"])
@pytest.mark.parametrize("recipe", Recipe)
def test_one_kernel_fills_the_quantizers_own_output(
    recipe: Recipe, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer = QUANTIZERS[recipe]()
    act, last = room.named(name)(device="cpu"), consumer(quantizer)
    x = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    y = act.module(x)
    grad = torch.randn_like(y)
    wanted = torch.autograd.grad(y, (x, *act.parameters()), grad)
    monkeypatch.setattr(fused, "forward", None)  # y itself is formed nowhere
    monkeypatch.setattr(
        tex, "fp8_transpose", lambda data, dtype, out: data.reshape(ROWS, WIDTH).T.contiguous(), raising=False
    )
    monkeypatch.setattr(room.operations.quantization, "is_non_tn_fp8_gemm_supported", lambda: False)
    out = te.ops.Sequential(te.ops.Identity(), act, last)(x)
    buffers, largest = expected(recipe, y.detach())
    if recipe is Recipe.TENSOR:
        assert torch.equal(last.seen._data, buffers.data)
        assert last.seen._scale_inv.item() == pytest.approx(1 / 3)
        assert quantizer.amax.item() == largest
        assert torch.equal(last.seen._transpose, buffers.data.T)
    else:
        assert torch.equal(last.seen._rowwise_data, buffers.data)
        assert torch.equal(last.seen._rowwise_scale_inv, buffers.scale_inv)
    assert all(map(torch.equal, torch.autograd.grad(out, (x, *act.parameters()), grad), wanted))


@pytest.mark.parametrize("recipe", [Recipe.BLOCKS, Recipe.MX])
def test_where_columns_are_wanted_too_the_quantizer_reads_y(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer = QUANTIZERS[recipe]()
    seen: list[torch.Tensor] = []

    def read(_: Any, y: torch.Tensor) -> torch.Tensor:
        seen.append(y)
        return y

    quantizer.set_usage(rowwise=True, columnwise=True)
    monkeypatch.setattr(type(quantizer), "__call__", read)
    act, last = room.named("polynorm")(device="cpu"), consumer(quantizer)
    x = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16)
    te.ops.Sequential(act, last)(x)
    assert torch.equal(seen[0], act.module(x))
