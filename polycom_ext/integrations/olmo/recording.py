"""OLMo's Trainer with its metrics written to metrics.jsonl, and its coefficients to coefficients.json."""

from __future__ import annotations

import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

from olmo.torch_util import get_global_rank
from olmo.train import Trainer
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from polycom_ext.integrations.olmo.activation import coefficient_modules

TRAIN_NAMES = {
    "train/CrossEntropyLoss": "train/loss",
    "optim/total_grad_norm": "train/grad_norm",
    "train/ZLoss": "train/z_loss",
    "train/LoadBalancingLoss": "train/load_balancing_loss",
    "train/MoEZLoss": "train/router_z_loss",
}
"""OLMo's names -> ours."""
ACCURACIES = ("acc", "len_norm", "pmi_dc")
"""OLMo scores a downstream task in one way; these are accuracies, by likelihoods compared in some way."""

MMLU = ("stem", "humanities", "social_sciences", "other")
"""OLMo evaluates MMLU by group, as mmlu_GROUP_var; papers quote the mean of the four."""


class RecordingTrainer(Trainer):
    """OLMo's Trainer; where `output` is set, rank 0 appends the metrics of logged steps to a file there."""

    output: Path | None = None
    _seconds = 0.0
    _steps = 0

    def train_step(self, batch: dict[str, Any], reduce_global_loss: bool = True) -> dict[str, float]:
        start = time.perf_counter()
        metrics: dict[str, float] = super().train_step(batch, reduce_global_loss)
        self._seconds += time.perf_counter() - start
        self._steps += 1
        if reduce_global_loss:
            record = {TRAIN_NAMES[name]: value for name, value in metrics.items() if name in TRAIN_NAMES}
            record["train/learning_rate"] = self.optim.param_groups[0]["lr"]
            record["train/step_seconds"] = self._seconds / self._steps
            self._seconds, self._steps = 0.0, 0
            self._record(record)
        return metrics

    def eval(self) -> dict[str, Any]:
        metrics: dict[str, Any] = super().eval()
        tasks = {
            f"eval/downstream/{evaluator.label}_{evaluator.eval_metric.metric_type}": evaluator
            for evaluator in self.evaluators
            if hasattr(evaluator.eval_metric, "metric_type")
        }
        record = {}
        for name, value in metrics.items():
            if name in tasks:
                metric = tasks[name].eval_metric.metric_type
                record[f"eval/{tasks[name].label}/{'acc' if metric in ACCURACIES else metric}"] = value
            elif name.endswith("/CrossEntropyLoss"):
                label = name.removeprefix("eval/").removesuffix("/CrossEntropyLoss")
                record[f"valid/{label}/loss"] = value
        groups = [f"eval/mmlu_{group}_var/acc" for group in MMLU]
        if all(group in record for group in groups):
            record["eval/mmlu/acc"] = fmean(record[group] for group in groups)
        self._record(record)
        return metrics

    def _record(self, metrics: dict[str, float]) -> None:
        if self.output is None or not metrics or get_global_rank() != 0:
            return
        with (self.output / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.global_step, "metrics": metrics}) + "\n")

    def write_coefficients(self) -> None:
        """Write the learned coefficients, if any, to coefficients.json; called on all ranks."""
        layers = gather_coefficients(self.model, self.dist_model)
        if self.output is None or get_global_rank() != 0 or not layers:
            return
        content = {
            "step": self.global_step,
            "activation": str(self.cfg.model.activation_type),
            "layers": layers,
        }
        path = self.output / "coefficients.json"
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, path)


def gather_coefficients(model: nn.Module, dist_model: nn.Module) -> list[dict[str, Any]]:
    """[{"name": …, "weight": [r floats], "bias": [1 float], …}], in the model's order, on every rank.

    FSDP units are unsharded one at a time, so that never more than one block is whole.
    """
    values: dict[nn.Module, dict[str, list[float]]] = {}
    units: list[nn.Module] = list(FSDP.fsdp_modules(dist_model))
    for unit in units or [dist_model]:
        with FSDP.summon_full_params(unit, recurse=False, writeback=False) if units else nullcontext():
            # a unit sees the shards of the units inside it, which come later and whole
            for activation in coefficient_modules(unit).values():
                values[activation] = {
                    name: parameter.detach().double().tolist()
                    for name, parameter in activation.named_parameters()
                }
    return [
        {"name": name.replace("_fsdp_wrapped_module.", ""), **values[activation]}
        for name, activation in coefficient_modules(model).items()
    ]
