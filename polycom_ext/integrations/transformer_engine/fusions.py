"""What TE's operation fuser replaces by one operation of ours.

- `te.ops.Bias` and an activation behind it: x + bias is formed on the way (`pre_bias`) and no tensor holds
  it. A bias that TE adds in the epilogue of the GEMM before it stays there. Only forward: backward, TE sums
  and quantises the bias's gradient in one kernel of its own.
- Under a quantised recipe, an activation beside `GroupedLinear`, whose experts have a quantizer each: the
  fuser hands out the first expert's, which would round every expert's rows by a scale that is not theirs,
  before each expert's own does. So y, or the gradient of x, is handed on as it is.
- An activation and the linear layer behind it, from TE 2.17 on, which lets one fusion have both passes: the
  linear layer keeps no y for its weight's gradient, backward forms it again. Without a quantised recipe that
  costs nothing, as the pass over x that backward makes anyway writes y too. With one, y is formed in a pass
  of its own, and only where the activation has `activation_recompute_in_mlp`. Under delayed scaling never:
  the scale of forward is gone by then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from transformer_engine.pytorch import ops as te_ops
from transformer_engine.pytorch.ops import BasicLinear, BasicOperation, Bias, FusedOperation, GroupedLinear
from transformer_engine.pytorch.ops.fused import ForwardLinearBiasActivation
from transformer_engine.pytorch.ops.fuser import OperationFuser
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

from polycom_ext.integrations.transformer_engine.operations import Activation

ExtraInputs = Sequence[Sequence[Tensor]]


class _Fused(FusedOperation):
    """The activation of a run of operations, and the bias before it if there is one.

    Args:
        operations: these.
        before: what the fuser runs before them, if anything.
        behind: what it runs behind them.
    """

    def __init__(
        self, operations: Iterable[BasicOperation], *, before: Any = None, behind: Any = None
    ) -> None:
        super().__init__(operations)
        self._of_experts, self._to_experts = (isinstance(one, GroupedLinear) for one in (before, behind))
        self.position = next(i for i, one in enumerate(self.basic_ops) if isinstance(one, Activation))

    @property
    def activation(self) -> Activation:
        found = self.basic_ops[self.position]
        assert isinstance(found, Activation)
        return found

    def _activate(
        self, ctxs: list[Any], x: Tensor, extra_inputs: ExtraInputs, quantizer: Any, grad_quantizer: Any
    ) -> Tensor:
        quantizer = None if self._to_experts else quantizer
        grad_quantizer = None if self._of_experts else grad_quantizer
        pre_bias = None
        if self.position:
            bias, ctx = self.basic_ops[0], ctxs[0]
            if ctx.requires_grad:  # as Bias keeps it, whose own backward pass reads it
                ctx.grad_input_quantizer = None if _overridden(_recipe()) else grad_quantizer
            pre_bias, grad_quantizer = bias.bias, bias.get_grad_output_quantizer()
        scales = extra_inputs[self.position]
        return self.activation.apply_to(
            ctxs[self.position],
            x,
            pre_bias=pre_bias,
            row_scale=scales[0] if scales else None,
            quantizer=quantizer,
            grad_quantizer=grad_quantizer,
        )


class ForwardActivation(_Fused):
    """Forward of [Bias,] activation."""

    def fuser_forward(
        self,
        basic_op_ctxs: list[Any],
        input_: Tensor,
        *,
        basic_op_extra_inputs: ExtraInputs,
        prev_op_grad_output_quantizer: Any,
        next_op_input_quantizer: Any,
        basic_op_kwargs: list[dict[str, Any]],
    ) -> tuple[Tensor, ExtraInputs]:
        y = self._activate(
            basic_op_ctxs,
            input_,
            basic_op_extra_inputs,
            next_op_input_quantizer,
            prev_op_grad_output_quantizer,
        )
        return y, [()] * len(self.basic_ops)


class ActivationLinear(_Fused):
    """Both passes of [Bias,] activation, BasicLinear [, Bias]; y is not kept."""

    def __init__(self, operations: Iterable[BasicOperation], *, before: Any = None) -> None:
        super().__init__(operations, before=before)
        behind = list(self.basic_ops)[self.position + 1 :]
        self._behind = ForwardLinearBiasActivation.fuse_forward_ops(behind, recipe=None)

    def fuser_forward(
        self,
        basic_op_ctxs: list[Any],
        input_: Tensor,
        *,
        basic_op_extra_inputs: ExtraInputs,
        prev_op_grad_output_quantizer: Any,
        next_op_input_quantizer: Any,
        basic_op_kwargs: list[dict[str, Any]],
    ) -> tuple[Tensor, ExtraInputs]:
        quantizers = [*(one.get_input_quantizer() for one in self._behind), next_op_input_quantizer]
        out = self._activate(
            basic_op_ctxs, input_, basic_op_extra_inputs, quantizers[0], prev_op_grad_output_quantizer
        )
        done, before = self.position + 1, self.activation
        for operation, quantizer in zip(self._behind, quantizers[1:], strict=True):
            count = len(operation.basic_ops) if operation.is_fused_op else 1
            out, _ = operation.fuser_forward(
                basic_op_ctxs[done : done + count],
                out,
                basic_op_extra_inputs=[()] * count,
                prev_op_grad_output_quantizer=before.get_grad_output_quantizer(),
                next_op_input_quantizer=quantizer,
                basic_op_kwargs=basic_op_kwargs[done : done + count],
            )
            done, before = done + count, operation
        linear = basic_op_ctxs[self.position + 1]
        if linear.requires_grad:
            _, weight = linear.to_save
            linear.to_save = (None, weight)
        return out, [()] * len(self.basic_ops)

    def fuser_backward(
        self,
        basic_op_ctxs: list[Any],
        grad_output: Tensor,
        *,
        basic_op_grad_extra_outputs: ExtraInputs,
    ) -> tuple[Tensor, list[Iterable[Tensor | None]], list[tuple[Tensor | None, ...]]]:
        operations, grad = list(self.basic_ops), grad_output
        of_parameters: list[Iterable[Tensor | None]] = [()] * len(operations)
        of_extra: list[tuple[Tensor | None, ...]] = [()] * len(operations)
        here = self.position
        if operations[here + 2 :]:
            grad, of_parameters[-1] = operations[-1].op_backward(basic_op_ctxs[-1], grad)
        act, linear, act_ctx, ctx = *operations[here : here + 2], *basic_op_ctxs[here : here + 2]
        if not ctx.weight_requires_grad:
            grad, of_parameters[here + 1] = linear.op_backward(ctx, grad)
            found = act.gradients(act_ctx, grad)
        elif ctx.with_quantized_compute or (
            linear.tensor_parallel_mode == "row" and linear.sequence_parallel
        ):
            # The gradient is quantised or gathered for both GEMMs at once, so y is needed before them.
            ctx.saved_tensors = (act.again(act_ctx), ctx.saved_tensors[1])
            grad, of_parameters[here + 1] = linear.op_backward(ctx, grad)
            found = act.gradients(act_ctx, grad)
        else:
            of_y, _ = linear.op_backward(_changed(ctx, weight_requires_grad=False), grad)
            found = act.gradients(act_ctx, of_y, recompute=True)
            last = _changed(ctx, input_requires_grad=False, saved_tensors=(found.y, None))
            _, of_parameters[here + 1] = linear.op_backward(last, grad)
        grad, of_parameters[here] = found.x, found.parameters
        of_extra[here] = (found.row_scale,) * act.num_extra_inputs
        if here:
            grad, of_parameters[0] = operations[0].op_backward(basic_op_ctxs[0], grad)
        return grad, of_parameters, of_extra


def _changed(ctx: Any, **attributes: Any) -> Any:
    twin = copy.copy(ctx)
    vars(twin).update(attributes)
    return twin


def _recipe() -> Any:
    return FP8GlobalStateManager.get_fp8_recipe() if FP8GlobalStateManager.is_fp8_enabled() else None


def _overridden(recipe: Any) -> bool:
    """Whether backward computes in another precision than forward did; TE before 2.17 knows no such thing."""
    return getattr(recipe, "backward_override", None) is not None


def _in_epilogue(operations: Sequence[Any]) -> bool:
    """Whether TE makes one operation of a linear layer and the bias behind it."""
    return len(ForwardLinearBiasActivation.fuse_forward_ops(list(operations), recipe=None)) == 1


def _recomputed(activation: Activation, linear: BasicLinear, recipe: Any) -> bool:
    if recipe is None:
        return True
    # A custom recipe too may have the quantizer whose scale is of earlier steps.
    delayed = recipe.delayed() or isinstance(linear.get_input_quantizer(), Float8Quantizer)
    return activation.activation_recompute_in_mlp and not delayed and not _overridden(recipe)


def fuse_forward(operations: list[Any], *, recipe: Any) -> list[Any]:
    """Forward fusion; see the module's docstring."""
    out: list[Any] = []
    for one, behind in zip(operations, [*operations[1:], None], strict=True):
        if isinstance(one, Activation):
            run: list[Any] = [one]
            if one.takes_bias and out and isinstance(out[-1], Bias):
                run.insert(0, out.pop())
            before = out[-1] if out else None
            of_experts = isinstance(before, GroupedLinear) or isinstance(behind, GroupedLinear)
            if run[1:] or (of_experts and recipe is not None):
                one = ForwardActivation(run, before=before, behind=behind)
        out.append(one)
    return out


def fuse_activation_linear(operations: list[Any], *, recipe: Any) -> list[Any]:
    """Forward-backward fusion; see the module's docstring."""
    out: list[Any] = []
    rest = list(operations)
    while rest:
        one: Any = rest[0]
        linear: Any = rest[1] if len(rest) > 1 else None
        fits = isinstance(one, Activation) and isinstance(linear, BasicLinear)
        # Communication that overlaps has fusions of its own.
        if not fits or linear._userbuffers_options is not None or not _recomputed(one, linear, recipe):
            out.append(rest.pop(0))
            continue
        run = [rest.pop(0), rest.pop(0)]
        if one.takes_bias and out and isinstance(out[-1], Bias) and not _in_epilogue(out[-2:]):
            run.insert(0, out.pop())
        if rest and isinstance(rest[0], Bias) and _in_epilogue([linear, rest[0]]):
            run.append(rest.pop(0))
        out.append(ActivationLinear(run, before=out[-1] if out else None))
    return out


def register() -> None:
    """Give the fusions to TE's fuser; again, they take the place of those that are there."""
    _register(OperationFuser.forward_fusion_functions, te_ops.register_forward_fusion, fuse_forward)
    if hasattr(te_ops, "register_forward_backward_fusion"):
        theirs = OperationFuser.forward_backward_fusion_functions
        _register(theirs, te_ops.register_forward_backward_fusion, fuse_activation_linear)


def _register(registered: list[Any], add: Callable[[Any], None], function: Callable[..., list[Any]]) -> None:
    def identity(one: Any) -> tuple[Any, Any]:
        return getattr(one, "__module__", None), getattr(one, "__qualname__", None)

    registered[:] = [one for one in registered if identity(one) != identity(function)]
    add(function)
