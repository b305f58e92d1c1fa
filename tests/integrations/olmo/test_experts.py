"""Our MoE layer against a textbook one in float64: outputs, gradients and router losses."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polycom_ext import PolyNorm, reference
from polycom_ext.activations import parse
from polycom_ext.integrations.olmo.activation import build_activation
from polycom_ext.integrations.olmo.experts import MoE, Routing
from polycom_ext.integrations.olmo.router import RouterLosses, load_balancing_loss, z_loss

from ...oracle import gradient

D_MODEL, WIDTH, EXPERTS, TOP_K = 16, 24, 5, 2
REFERENCES = {
    "swiglu": None,
    "gelu": lambda x, act: nn.functional.gelu(x),
    "relu2": lambda x, act: x.clamp(min=0) ** 2,
    "polyrelu": lambda x, act: reference.poly_relu(x, act.weight, act.bias),
    "polynorm": lambda x, act: reference.poly_norm(x, act.weight, act.bias),
    "polynorm-4": lambda x, act: reference.poly_norm(x, act.weight, act.bias),
    "polyrelunorm": lambda x, act: reference.poly_relu_norm(x, act.weight, act.bias),
    "polyprelu": lambda x, act: reference.poly_prelu(x, act.weight, act.bias, act.slope),
}


ODD = (9, 33)
"""d_model and FFN width whose rows are no multiple of 16 bytes in any type."""


def make(activation: str, width: int = WIDTH, **changes: object) -> tuple[SimpleNamespace, MoE, nn.Module]:
    """A configuration, a layer with random weights and the activation of its block."""
    settings = {
        "d_model": D_MODEL,
        "mlp_hidden_size": 2 * width if parse(activation)[0].gated else width,
        "activation_type": activation,
        "init_device": "cpu",
        "include_bias": False,
        "moe_num_experts": EXPERTS,
        "moe_top_k": TOP_K,
        "moe_shared_expert": False,
        "moe_loss_weight": 0.01,
        "moe_zloss_weight": 0.001,
        "moe_lbl_in_fp32": False,
        "moe_log_expert_assignment": True,
    }
    config = SimpleNamespace(**(settings | changes))
    torch.manual_seed(0)
    moe = MoE(config, width)
    act = build_activation(config)
    for parameter in [*moe.parameters(), *act.parameters()]:
        nn.init.normal_(parameter, std=0.5)
    return config, moe, act


def textbook(x: Tensor, moe: MoE, act: nn.Module, name: str) -> tuple[Tensor, Routing]:
    """Token by token, expert by expert."""
    apply = REFERENCES[name]
    mlp, logits = moe.experts.mlp, x @ moe.router.layer.weight.T
    scores = logits.softmax(-1)
    w1, w2 = (w.view(EXPERTS, -1, x.shape[-1]) for w in (mlp.w1, mlp.w2))
    v1 = w1 if mlp.v1 is None else mlp.v1.view_as(w1)
    rows, counts = [], torch.zeros(EXPERTS)
    for token, score in zip(x, scores, strict=True):
        total = torch.zeros_like(token)
        for e in score.topk(TOP_K).indices.tolist():
            h = w1[e] @ token
            if apply is None:
                h = nn.functional.silu(h) * (v1[e] @ token)
            else:
                h = apply(h, act)
            total = total + score[e] * (h @ w2[e])
            counts[e] += 1
        rows.append(total)
    return torch.stack(rows), Routing(counts, scores, logits)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> bool:
    """By the ratio of norms."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item() <= tolerance


@pytest.mark.parametrize(
    ("name", "sizes"),
    [*((name, (D_MODEL, WIDTH)) for name in REFERENCES), ("swiglu", ODD), ("polynorm", ODD)],
)
def test_outputs_and_gradients_are_the_textbooks(name: str, sizes: tuple[int, int]) -> None:
    d_model, width = sizes
    _, moe, act = make(name, width, d_model=d_model)
    exact, exact_act = copy.deepcopy(moe).double(), copy.deepcopy(act).double()
    x = torch.randn(3, 7, d_model, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    y = moe(x, act)
    expected, routing = textbook(exact_x.view(-1, d_model), exact, exact_act, name)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.view(y.shape).backward(grad.double())
    assert close(y, expected.view(y.shape))
    assert close(gradient(x), gradient(exact_x))
    ours = {**dict(moe.named_parameters()), **{f"act.{n}": p for n, p in act.named_parameters()}}
    theirs = {**dict(exact.named_parameters()), **{f"act.{n}": p for n, p in exact_act.named_parameters()}}
    for key, parameter in ours.items():
        assert close(gradient(parameter), gradient(theirs[key]), 2e-6), key
    assert moe.routing is not None
    assert moe.routing.tokens_per_expert.tolist() == routing.tokens_per_expert.tolist()


@pytest.mark.parametrize("name", ["swiglu", "polynorm"])
def test_experts_without_a_token_are_legal(name: str) -> None:
    _, moe, act = make(name)
    with torch.no_grad():
        moe.router.layer.weight.zero_()
        moe.router.layer.weight[1:3] = 1.0  # positive inputs go to experts 1 and 2
    x = torch.rand(6, D_MODEL) + 0.1
    moe(x, act).square().sum().backward()
    assert moe.routing is not None
    assert moe.routing.tokens_per_expert.tolist() == [0, 6, 6, 0, 0]
    grad = gradient(moe.experts.mlp.w1).view(EXPERTS, WIDTH, D_MODEL)
    assert grad.isfinite().all()
    assert not grad[[0, 3, 4]].any()
    assert grad[1].any()


@pytest.mark.parametrize("sizes", [(D_MODEL, WIDTH), ODD, (36, 68)])
def test_bfloat16_under_autocast_rounds_and_nothing_else(sizes: tuple[int, int]) -> None:
    d_model, width = sizes
    _, moe, act = make("polynorm", width, d_model=d_model)
    x = torch.randn(64, d_model)
    expected = moe(x, act)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe(x, act)
    assert y.dtype == torch.bfloat16
    assert moe.routing is not None
    assert moe.routing.scores.dtype == torch.float32
    routed_alike = (moe.router(x)[3] == moe.router(x.bfloat16().float())[3]).all(dim=1)
    assert close(y[routed_alike], expected[routed_alike], 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_compiled_layer_is_the_same(dtype: torch.dtype) -> None:
    _, moe, act = make("polynorm")
    compiled, compiled_act = copy.deepcopy(moe).to(dtype), copy.deepcopy(act)
    moe.to(dtype)
    x = torch.randn(3, 7, D_MODEL, dtype=dtype, requires_grad=True)
    compiled_x = x.detach().requires_grad_()
    y = moe(x, act)
    compiled.compile(backend="aot_eager", fullgraph=True)
    compiled_y = compiled(compiled_x, compiled_act)
    y.square().sum().backward()
    compiled_y.square().sum().backward()
    assert torch.equal(compiled_y, y)
    assert torch.equal(gradient(compiled_x), gradient(x))
    for plain, other in ((moe, compiled), (act, compiled_act)):
        for (name, p), q in zip(plain.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(gradient(q), gradient(p)), name


def test_a_shared_expert_and_a_bias_are_added() -> None:
    _, moe, act = make("polynorm", moe_shared_expert=True, include_bias=True)
    x = torch.randn(9, D_MODEL)
    shared, bias = moe.shared_expert, moe.experts.bias
    assert shared is not None
    y = moe(x, act)
    moe.shared_expert, moe.experts.bias = None, None
    assert isinstance(act, PolyNorm)
    h = reference.poly_norm(shared.up_proj(x), act.weight, act.bias)
    expected = (
        moe(x, act) + bias + nn.functional.linear(h.float(), shared.down_proj.weight, shared.down_proj.bias)
    )
    assert close(y, expected)


def test_router_losses_are_the_formulas() -> None:
    routings = []
    for seed in range(3):
        torch.manual_seed(seed)
        logits = torch.randn(11, EXPERTS)
        counts = torch.bincount(logits.topk(TOP_K).indices.flatten(), minlength=EXPERTS)
        routings.append(Routing(counts, logits.softmax(-1), logits))
    balance = sum(float((r.tokens_per_expert.double() * r.scores.double().mean(0)).sum()) for r in routings)
    square = sum(float(r.logits.double().logsumexp(-1).square().sum()) for r in routings)
    assert load_balancing_loss(routings, TOP_K).item() == pytest.approx(balance * EXPERTS / (3 * 11 * TOP_K))
    assert z_loss(routings, TOP_K).item() == pytest.approx(square / (3 * 11 * TOP_K))
    even = Routing(
        torch.full((EXPERTS,), 4), torch.full((10, EXPERTS), 1 / EXPERTS), torch.zeros(10, EXPERTS)
    )
    assert load_balancing_loss([even], TOP_K).item() == pytest.approx(1.0)


@pytest.mark.parametrize("weights", [(0.01, None), (None, 0.001), (0.0, 0.001), (0.01, 0.001), (None, None)])
def test_each_loss_can_be_left_out(weights: tuple[float | None, float | None]) -> None:
    config, moe, act = make("swiglu", moe_loss_weight=weights[0], moe_zloss_weight=weights[1])
    model: Any = nn.ModuleList([moe])
    model.config = config
    losses = RouterLosses(model)
    moe(torch.randn(8, D_MODEL), act)
    routing = moe.routing
    assert routing is not None
    loss = losses.micro_batch(2)
    expected = torch.zeros(())
    if weights[0]:
        expected = expected + weights[0] / 2 * load_balancing_loss([routing], TOP_K)
    if weights[1]:
        expected = expected + weights[1] / 2 * z_loss([routing], TOP_K)
    assert loss.item() == pytest.approx(expected.item())
    names = set(losses.batch(reduce=False))
    assert names == {
        name
        for name, weight in zip(("train/LoadBalancingLoss", "train/MoEZLoss"), weights, strict=True)
        if weight
    }
    assert moe.routing is None


def test_nothing_is_kept_for_losses_in_evaluation() -> None:
    _, moe, act = make("swiglu")
    moe.eval()(torch.randn(8, D_MODEL), act)
    assert moe.routing is None
