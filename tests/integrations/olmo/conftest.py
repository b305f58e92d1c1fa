"""A shorthand for a tiny training run on a real OLMo tree, from one forking process a tree."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from polycom_ext import upstream
from polycom_ext.errors import PolycomError

from ..zygotes.forked_ranks import Zygote

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LOG_FILTER_TYPE": "rank0_only",
    "WANDB_MODE": "offline",
}
WORDS = "the quick brown fox jumps over a lazy dog and then it sleeps until the cock crows".split()

MODEL = {
    "d_model": 32,
    "n_heads": 2,
    "n_layers": 2,
    "mlp_hidden_size": 128,
    "rope": True,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "layer_norm_type": "rms",
    "bias_for_layer_norm": False,
    "include_bias": False,
    "weight_tying": False,
    "max_sequence_length": 32,
    "vocab_size": 257,
    "embedding_size": 257,
    "eos_token_id": 256,
    "pad_token_id": 256,
    "init_device": "cpu",
}
MOE = {
    "block_type": "moe",
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "moe_loss_weight": 0.01,
    "moe_zloss_weight": 0.001,
    "moe_mlp_impl": "grouped",
    "mlp_hidden_size": 64,
    "attention_layer_norm": True,
}


def flat(settings: dict, prefix: str = "") -> dict[str, object]:
    """Nested settings by dotted keys."""
    result: dict[str, object] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            result.update(flat(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value
    return result


@dataclass
class Run:
    """What a run left."""

    statuses: list[int]
    log: str
    folder: Path
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)

    def series(self, name: str) -> dict[int, float]:
        """One metric by step."""
        return {step: values[name] for step, values in self.metrics.items() if name in values}

    @property
    def coefficients(self) -> dict:
        """coefficients.json"""
        return json.loads((self.folder / "coefficients.json").read_text())

    @property
    def refusal(self) -> str:
        """What a refused run said, once for all ranks."""
        assert 2 in self.statuses, self.log[-3000:]
        lost = {1} if "Connection closed by peer" in self.log else set()
        assert set(self.statuses) <= {2, -9, *lost}, (
            "a rank refused, or was killed or lost its peer because another one did"
        )
        return next(line for line in self.log.splitlines() if line.startswith("polycom: error: "))


class Trainer:
    """Runs the training entry in forked ranks of one process that has imported it."""

    def __init__(self, paths: list[Path], inputs: dict[str, object], folder: Path) -> None:
        self._folder, self._inputs, self._count = folder, inputs, 0
        script = Path(__file__).with_name("zygote.py")
        self._zygote = Zygote(script, paths, ENVIRONMENT, stderr=subprocess.DEVNULL)

    def __call__(
        self,
        *,
        processes: int = 1,
        moe: bool = False,
        kill_at: int | None = None,
        stop_when: str | None = None,
        folder: Path | None = None,
        timeout: float = 240,
        **settings: object,
    ) -> Run:
        """Train the tiny model, with settings as nested mappings; `folder` is the run's, to go on with it."""
        folder = folder or self._folder / f"{self._count + 1}"
        folder.mkdir(exist_ok=True)
        options = flat(self._inputs) | flat({"model": MODEL | (MOE if moe else {})})
        options["save_folder"] = str(folder / "checkpoints")
        options |= flat(settings)
        arguments = [f"--{key}={json.dumps(value)}" for key, value in options.items()]
        return self.exactly(
            *arguments,
            f"--polycom-output={folder}",
            processes=processes,
            folder=folder,
            kill_at=kill_at,
            stop_when=stop_when,
            timeout=timeout,
        )

    def exactly(
        self,
        *arguments: str,
        processes: int,
        folder: Path,
        kill_at: int | None = None,
        stop_when: str | None = None,
        timeout: float = 240,
    ) -> Run:
        """Train with these arguments and no others, of which one names the folder."""
        self._count += 1
        log = self._folder / f"{self._count}.log"
        request = {
            "arguments": arguments,
            "processes": processes,
            "log": str(log),
            "kill_at": kill_at,
            "stop_when": stop_when,
            "timeout": timeout,
        }
        run = Run(self._zygote.run(request), log.read_text(), folder)
        metrics = folder / "metrics.jsonl"
        if metrics.exists():
            for line in metrics.read_text().splitlines():
                record = json.loads(line)
                run.metrics.setdefault(record["step"], {}).update(record["metrics"])
        if kill_at is None and any(run.statuses) and 2 not in run.statuses:
            pytest.fail(f"training failed with {run.statuses}:\n{run.log[-6000:]}")
        return run

    def close(self) -> None:
        """End the forking process."""
        self._zygote.close()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A byte-level tokenizer, tokens of a small made-up text, and the settings that every run shares."""
    folder = tmp_path_factory.mktemp("inputs")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    words = random.Random(0)
    for name, count in (("train", 4000), ("valid", 400)):
        ids = tokenizer.encode(" ".join(words.choices(WORDS, k=count))).ids
        np.array(ids, dtype="<u2").tofile(folder / f"{name}.npy")
    return {
        "valid_path": str(folder / "valid.npy"),
        "run_name": "tiny",
        "seed": 3,
        "tokenizer": {"identifier": str(folder / "tokenizer.json")},
        "data": {"paths": [str(folder / "train.npy")], "drop_last": True},
        "evaluators": [],
        "optimizer": {"name": "adamw", "learning_rate": 5e-3, "weight_decay": 0.1, "betas": [0.9, 0.95]},
        "scheduler": {"name": "cosine_with_warmup", "t_warmup": 2, "alpha_f": 0.1},
        "max_grad_norm": 1.0,
        "max_duration": 6,
        "eval_interval": 100,
        "global_train_batch_size": 4,
        "device_train_microbatch_size": 4,
        "precision": "fp32",
        "distributed_strategy": "fsdp",
        "fsdp": {"wrapping_strategy": "by_block", "precision": "mixed"},
        "save_overwrite": True,
        "save_interval": 100,
        "try_load_latest_save": True,
        "no_pre_train_checkpoint": True,
        "console_log_interval": 1,
    }


@pytest.fixture(scope="session")
def valid_path(inputs: dict[str, object]) -> str:
    """Token file for evaluators."""
    return str(inputs["valid_path"])


@pytest.fixture(scope="session")
def tree() -> Path:
    """The patched OLMo 0.6.0."""
    return upstream.ensure_applied("olmo")


@pytest.fixture(scope="session")
def olmo(tree: Path) -> Iterator[None]:
    """The patched OLMo 0.6.0 in this process."""
    sys.path.insert(0, str(tree))
    yield
    sys.path.remove(str(tree))


@pytest.fixture(scope="session")
def train_on(
    inputs: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[list[Path]], Trainer]]:
    """Run the training entry on the OLMo that lies in these folders."""
    settings = {key: value for key, value in inputs.items() if key != "valid_path"}
    trainers: dict[tuple[Path, ...], Trainer] = {}

    def on(paths: list[Path]) -> Trainer:
        key = tuple(paths)
        if key not in trainers:
            trainers[key] = Trainer(paths, settings, tmp_path_factory.mktemp("runs"))
        return trainers[key]

    yield on
    for trainer in trainers.values():
        trainer.close()


@pytest.fixture(scope="session")
def train(tree: Path, train_on: Callable[[list[Path]], Trainer]) -> Trainer:
    """Run the training entry on the patched OLMo 0.6.0."""
    return train_on([tree])


@pytest.fixture(scope="session")
def branch_paths(tree: Path) -> list[Path]:
    """The patched MoE branch, its megablocks, and 0.6.0 behind them for the evaluation data."""
    try:
        return [upstream.ensure_applied("olmo-moe"), upstream.ensure_applied("megablocks"), tree]
    except PolycomError as error:
        pytest.skip(f"OLMo's MoE branch is on GitHub only: {error}")


@pytest.fixture(scope="session")
def train_branch(branch_paths: list[Path], train_on: Callable[[list[Path]], Trainer]) -> Trainer:
    """Run the training entry on the patched MoE branch."""
    return train_on(branch_paths)
