"""OLMo's Trainer with its metrics written to metrics.jsonl, and its coefficients to coefficients.json."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import wandb
from olmo.torch_util import get_global_rank
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from polycom_ext.integrations.olmo.activation import coefficient_modules
from polycom_ext.integrations.olmo.stopping import StoppingTrainer
from polycom_ext.runs import record
from polycom_ext.runs.efficiency import Efficiency, peak_memory

TRAIN_NAMES = {
    "train/CrossEntropyLoss": record.TRAIN_LOSS,
    "optim/total_grad_norm": record.GRAD_NORM,
    "train/ZLoss": record.Z_LOSS,
    "train/LoadBalancingLoss": record.LOAD_BALANCING_LOSS,
    "train/MoEZLoss": record.ROUTER_Z_LOSS,
}
"""OLMo's names -> the record's."""
DEVICE_SPEED = "throughput/device/tokens_per_second"
"""OLMo's, of its last steps with what lies between them; of the first one it has none."""
ACCURACIES = ("acc", "len_norm", "pmi_dc")
"""OLMo scores a downstream task in one way; these are accuracies, by likelihoods compared in some way."""

MMLU = ("stem", "humanities", "social_sciences", "other")
"""OLMo evaluates MMLU by group, as mmlu_GROUP_var; papers quote the mean of the four."""


class RecordingTrainer(StoppingTrainer):
    """OLMo's Trainer; where `output` is set, rank 0 appends the metrics of logged steps to a file there."""

    output: Path | None = None
    efficiency: Efficiency | None = None
    _seconds = 0.0
    _steps = 0
    _logged: dict[str, float] | None = None
    """The metrics of the step that is being logged, as upstream has them."""

    def train_step(self, batch: dict[str, Any], reduce_global_loss: bool = True) -> dict[str, float]:
        start = time.perf_counter()
        metrics: dict[str, float] = super().train_step(batch, reduce_global_loss)
        self._seconds += time.perf_counter() - start
        self._steps += 1
        if reduce_global_loss:
            self._logged = metrics
        return metrics

    def system_metrics(self) -> dict[str, float]:
        """Upstream asks for these once a logged step, on all ranks, right after it has told its speed."""
        found: dict[str, float] = super().system_metrics()
        if self._logged is not None:
            logged, self._logged = self._logged, None
            values = {TRAIN_NAMES[name]: value for name, value in logged.items() if name in TRAIN_NAMES}
            values[record.LEARNING_RATE] = self.optim.param_groups[0]["lr"]
            values[record.STEP_SECONDS] = self._seconds / self._steps
            values[record.PEAK_MEMORY] = peak_memory()
            if self.efficiency is not None and DEVICE_SPEED in logged:  # not of the first step
                values |= self.efficiency.metrics(logged[DEVICE_SPEED] * self.efficiency.devices)
            self._seconds, self._steps = 0.0, 0
            self._record(values)
        return found

    def eval(self) -> dict[str, Any]:
        metrics: dict[str, Any] = super().eval()
        tasks = {
            f"eval/downstream/{evaluator.label}_{evaluator.eval_metric.metric_type}": evaluator
            for evaluator in self.evaluators
            if hasattr(evaluator.eval_metric, "metric_type")
        }
        values = {}
        for name, value in metrics.items():
            if name in tasks:
                metric = tasks[name].eval_metric.metric_type
                what = record.ACCURACY if metric in ACCURACIES else metric
                values[record.evaluated(record.EVAL, tasks[name].label, what)] = value
            elif name.endswith("/CrossEntropyLoss"):
                label = name.removeprefix("eval/").removesuffix("/CrossEntropyLoss")
                values[record.evaluated(record.VALID, label, record.LOSS)] = value
        groups = [record.evaluated(record.EVAL, f"mmlu_{group}_var", record.ACCURACY) for group in MMLU]
        if all(group in values for group in groups):
            mmlu = record.evaluated(record.EVAL, "mmlu", record.ACCURACY)
            values[mmlu] = fmean(values[group] for group in groups)
        self._record(values)
        return metrics

    def close(self, exit_code: int = 0) -> None:
        """Upstream ends Weights & Biases' run with an option which later versions refuse: end it before."""
        if wandb.run is not None:
            wandb.finish(exit_code=exit_code)
        super().close(exit_code)

    def _record(self, metrics: dict[str, float]) -> None:
        if self.output is None or not metrics or get_global_rank() != 0:
            return
        record.append(record.Record(self.output).metrics, self.global_step, metrics)

    def write_coefficients(self) -> None:
        """Write the learned coefficients, if any, to coefficients.json; called on all ranks."""
        layers = gather_coefficients(self.model, self.dist_model)
        if self.output is None or get_global_rank() != 0 or not layers:
            return
        learned = record.coefficients(self.global_step, str(self.cfg.model.activation_type), layers)
        record.Record(self.output).write_coefficients(learned)


def gather_coefficients(model: nn.Module, dist_model: nn.Module) -> list[tuple[str, dict[str, list[float]]]]:
    """[(module, {parameter: its values})], in the model's order, on every rank.

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
        (name.replace("_fsdp_wrapped_module.", ""), values[activation])
        for name, activation in coefficient_modules(model).items()
    ]
