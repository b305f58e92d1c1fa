"""Activations as `BasicOperation`s: forward and backward as two calls; between them TE's fuser keeps tensors.

An operation has its module's parameters under the module's names, so that state dicts go from one to the
other, and no state of TE's. What it keeps for backward is x and, where the operations are fused, a few
numbers a row; x is freed after backward, as TE's own activations do it. Its neighbours' quantizers are
honoured: y leaves it as the next operation's input is quantised, dx as the previous one's gradient is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformer_engine.pytorch.cpu_offload import is_cpu_offload_enabled, mark_activation_offload
from transformer_engine.pytorch.ops import BasicOperation
from transformer_engine.pytorch.ops._common import maybe_dequantize
from transformer_engine.pytorch.utils import canonicalize_device

from polycom_ext import activations
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.transformer_engine import quantization
from polycom_ext.ops.calls import group_size, scale_rows
from polycom_ext.ops.polynomial import dispatch, fused
from polycom_ext.ops.polynomial.dispatch import Path
from polycom_ext.ops.polynomial.inputs import Inputs

SCALED = "Scaled"
"""What the name of an operation with a factor a row begins with, as TE's own."""


class Gradients(NamedTuple):
    """What backward gives; `y` where it was asked to form it again."""

    x: Tensor
    parameters: list[Tensor | None]
    pre_bias: Tensor | None
    row_scale: Tensor | None
    y: Tensor | None


class Activation(BasicOperation):
    """y = act(x), `act` being a module of the registry, over the last dimension of x.

    Args:
        module: the activation; the operation and it have the same parameters, whoever replaces one.
        activation_recompute_in_mlp: also under a quantised recipe, where it costs a pass over x, keep no y
            for the linear layer behind, but form it again in backward; see fusions.py.

    Raises PolycomError for a module without parameters of its own.
    """

    # Without quantizers there is no extra state, and an entry for it would be one that the module lacks.
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def __init__(self, module: nn.Module, *, activation_recompute_in_mlp: bool = False) -> None:
        super().__init__()
        if not module._parameters or module._modules:
            raise _nothing_to_learn(type(module).__name__)
        object.__setattr__(self, "module", module)  # not as a submodule, which would prefix the names
        self._parameters = module._parameters
        self.activation_recompute_in_mlp = activation_recompute_in_mlp

    def reset_parameters(self) -> None:
        """Every parameter as at the start of training."""
        self.module.reset_parameters()

    def extra_repr(self) -> str:
        return str(self.module.extra_repr())

    @property
    def takes_bias(self) -> bool:
        """Whether x + pre_bias is formed on the way."""
        return bool(getattr(self.module, "takes_variants", False))

    def op_forward(
        self,
        ctx: Any,
        input_: Tensor,
        *,
        prev_op_grad_output_quantizer: Any,
        next_op_input_quantizer: Any,
    ) -> Tensor:
        return self.apply_to(
            ctx, input_, quantizer=next_op_input_quantizer, grad_quantizer=prev_op_grad_output_quantizer
        )

    def op_backward(self, ctx: Any, grad_output: Tensor) -> tuple[Tensor, Iterable[Tensor | None]]:
        found = self.gradients(ctx, grad_output)
        return found.x, found.parameters

    def apply_to(
        self,
        ctx: Any,
        x: Tensor,
        *,
        pre_bias: Tensor | None = None,
        row_scale: Tensor | None = None,
        quantizer: Any,
        grad_quantizer: Any,
    ) -> Tensor:
        """act(x + pre_bias) row_scale[..., None], quantised by `quantizer`; `ctx` keeps what backward takes.

        Args:
            pre_bias: (width,), for an operation that `takes_bias`.
            row_scale: x.shape[:-1].
            grad_quantizer: quantises the gradient of x.
        """
        device = x.device.type
        kept: tuple[Tensor | None, ...]
        options: tuple[Any, ...] | None = None
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x = maybe_dequantize(x, dtype)
        with torch.no_grad():
            inputs = self._inputs(x, pre_bias, row_scale)
            if inputs is not None and dispatch.path_of(inputs) is Path.FUSED:
                written = None
                if quantizer is not None and group_size(self._group) == 1:
                    written = quantization.forward(inputs, quantizer)
                y, scales = written or fused.forward(inputs, self._group)
                quantizer = None if written else quantizer
                kept, options = (*inputs.tensors, scales), inputs.options
            else:
                kept = (x, pre_bias, row_scale)
                y = self._formula(kept, dict(self.named_parameters()))
        if ctx.requires_grad:
            if is_cpu_offload_enabled():
                mark_activation_offload(x)
            ctx.save_for_backward(*kept)
            ctx.options, ctx.grad_quantizer = options, grad_quantizer
        return y if quantizer is None else quantizer(y)

    def gradients(self, ctx: Any, grad_output: Tensor, *, recompute: bool = False) -> Gradients:
        """The gradients of what `apply_to` was given, and y again if asked for; x is freed."""
        x = ctx.saved_tensors[0]
        grad_output = maybe_dequantize(grad_output, x.dtype)
        y: Tensor | None
        of_parameters: list[Tensor | None]
        if ctx.options is None:
            pre_bias, row_scale = ctx.saved_tensors[1:]
            (grad_x, of_bias, of_scale, *of_parameters), y = self._by_formula(ctx.saved_tensors, grad_output)
        else:
            *tensors, scales = ctx.saved_tensors
            inputs = Inputs.of(tensors, ctx.options)
            pre_bias, row_scale = inputs.pre_bias, inputs.row_scale
            found, y = fused.backward(inputs, scales, grad_output, self._group, recompute)
            grad_x, *of_parameters, of_bias, of_scale, _ = found
        assert grad_x is not None
        if not hasattr(x, "_do_not_clear"):  # TE's mark of what others may still read
            x.data = x.new_empty(0)
        return Gradients(
            grad_x if ctx.grad_quantizer is None else ctx.grad_quantizer(grad_x),
            [
                _typed(grad, parameter)
                for grad, parameter in zip(of_parameters, self.parameters(), strict=True)
            ],
            _typed(of_bias, pre_bias),
            _typed(of_scale, row_scale),
            y if recompute else None,
        )

    def again(self, ctx: Any) -> Tensor:
        """y, from what `ctx` keeps."""
        with torch.no_grad():
            if ctx.options is None:
                return self._formula(ctx.saved_tensors, dict(self.named_parameters()))
            return fused.forward(Inputs.of(ctx.saved_tensors[:-1], ctx.options), self._group)[0]

    @property
    def _group(self) -> Any:
        return getattr(self.module, "group", None)

    def _inputs(self, x: Tensor, pre_bias: Tensor | None, row_scale: Tensor | None) -> Inputs | None:
        """The call as the polynomial operations take it; None for other activations."""
        if not self.takes_bias:
            return None
        inputs: Inputs = self.module.inputs(x, pre_bias=pre_bias, row_scale=row_scale)
        return inputs

    def _formula(self, given: Sequence[Tensor | None], parameters: dict[str, Any]) -> Tensor:
        """The activation as a torch function of x, pre_bias and row_scale, and of its parameters."""
        x, pre_bias, row_scale = given
        assert x is not None
        inputs = self._inputs(x, pre_bias, row_scale)
        if inputs is not None:
            return dispatch.polynomial(inputs._replace(**parameters), group=self._group)
        return scale_rows(torch.func.functional_call(self.module, parameters, (x,)), row_scale)

    def _by_formula(
        self, given: Sequence[Tensor | None], grad_output: Tensor
    ) -> tuple[list[Tensor | None], Tensor]:
        """Gradients of x, pre_bias, row_scale and the parameters, and y."""
        with torch.enable_grad():
            leaves = [None if one is None else one.detach().requires_grad_() for one in given]
            parameters = {name: one.detach().requires_grad_() for name, one in self.named_parameters()}
            y = self._formula(leaves, parameters)
        leaves += parameters.values()
        found = iter(torch.autograd.grad(y, [one for one in leaves if one is not None], grad_output))
        return [None if one is None else next(found) for one in leaves], y.detach()


class ScaledActivation(Activation):
    """y = act(x) * row_scale[..., None]: the factors, x.shape[:-1], are an extra input of the operation."""

    num_extra_inputs = 1

    def op_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError(f"{type(self).__name__} has an extra input: its forward pass is fuser_forward")

    def op_backward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Iterable[Tensor | None]]:
        raise RuntimeError(f"{type(self).__name__} has an extra input: its backward pass is fuser_backward")

    def fuser_forward(
        self,
        basic_op_ctxs: list[Any],
        input_: Tensor,
        *,
        basic_op_extra_inputs: Sequence[Sequence[Tensor]],
        prev_op_grad_output_quantizer: Any,
        next_op_input_quantizer: Any,
        basic_op_kwargs: list[dict[str, Any]],
    ) -> tuple[Tensor, Sequence[Sequence[Tensor]]]:
        y = self.apply_to(
            basic_op_ctxs[0],
            input_,
            row_scale=basic_op_extra_inputs[0][0],
            quantizer=next_op_input_quantizer,
            grad_quantizer=prev_op_grad_output_quantizer,
        )
        return y, [()]

    def fuser_backward(
        self,
        basic_op_ctxs: list[Any],
        grad_output: Tensor,
        *,
        basic_op_grad_extra_outputs: Sequence[Sequence[Tensor]],
    ) -> tuple[Tensor, Sequence[Iterable[Tensor | None]], Sequence[Sequence[Tensor | None]]]:
        found = self.gradients(basic_op_ctxs[0], grad_output)
        return found.x, [found.parameters], [(found.row_scale,)]


def _typed(gradient: Tensor | None, of: Tensor | None) -> Tensor | None:
    return None if gradient is None or of is None else gradient.to(of.dtype)


def _nothing_to_learn(activation: str) -> PolycomError:
    return PolycomError(
        f"the activation {activation} has no parameters of its own, which an operation of ours is for: take "
        "one of transformer_engine.pytorch.ops, as GELU or SwiGLU"
    )


def operation_of(
    module: nn.Module, *, scaled: bool = False, activation_recompute_in_mlp: bool = False
) -> Activation:
    """The operation for an activation that is there already and stays the owner of its parameters.

    Raises PolycomError for one without parameters.
    """
    kind = ScaledActivation if scaled else Activation
    return kind(module, activation_recompute_in_mlp=activation_recompute_in_mlp)


@cache
def named(name: str, *, scaled: bool = False) -> type[Activation]:
    """The class of the operation for a name of the registry, as `polynorm`.

    Its constructor takes the keywords of `polycom_ext.build` (`width` and `hidden` where the activation needs
    them; `device` is the current GPU unless given, as for TE's own operations, `dtype` float32), `order`, the
    constants of the module (`eps`), and `activation_recompute_in_mlp`.

    Raises PolycomError for a name that is unknown or that learns nothing.
    """
    entry = activations.find(name)
    if not entry.learnable or entry.gated:
        raise _nothing_to_learn(repr(name))
    target = entry.load()
    base = ScaledActivation if scaled else Activation
    constants = getattr(target, "constants", ())

    def __init__(
        self: Any,
        order: int | None = None,
        *,
        activation_recompute_in_mlp: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        spec = name if order is None else f"{name}-{order}"
        given = {key: options.pop(key) for key in constants if key in options}
        module = activations.build(spec, device=canonicalize_device(device), dtype=dtype, **options)
        vars(module).update(given)
        base.__init__(self, module, activation_recompute_in_mlp=activation_recompute_in_mlp)

    title = f"{SCALED if scaled else ''}{target.__name__}"
    doc = f"{target.__doc__}\n\nAn operation of Transformer Engine's fuser; see `named`."
    home = __name__.rpartition(".")[0]
    make: Any = type(base)
    made: type[Activation] = make(
        title, (base,), {"__init__": __init__, "__doc__": doc, "__module__": home, "__qualname__": title}
    )
    return made
