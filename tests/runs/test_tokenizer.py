"""The tokenizer of a run is found by its checkpoints, through the token files on which it trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from polycom_ext import cli, trainers
from polycom_ext.checkpoints.constants import described
from polycom_ext.checkpoints.forms import Options
from polycom_ext.checkpoints.model import Model, shapes
from polycom_ext.runs import document, spec, tokenizer
from polycom_ext.runs.record import Record

CONFIGS = Path(spec.__file__).parents[2] / "configs" / "tiny"
DATA = {"megatron": "megatron.train-data-path=[{}]", "olmo": "olmo.data.paths=[{}.npy]"}
SPECS = {"megatron": "dense.yaml", "olmo": "olmo-dense.yaml"}


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A tokenizer of three words and the end of a document, which is the second."""
    vocabulary = {"to": 0, "<|endoftext|>": 1, "be": 2, "or": 3}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="or"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "words.json"))
    return tmp_path / "words.json"


def checkpoint(folder: Path, trainer: str, words: Path) -> Path:
    """What lies in a run that trained on a text prepared with these words."""
    (folder / "text.txt").write_text("to be or be\n")
    prepared = ["data", "prepare", str(folder / "text.txt"), "--output", str(folder / "data.v1")]
    assert cli.main([*prepared, "--tokenizer", str(words), "--format", trainer]) == 0
    record = Record(folder / "run")
    record.checkpoints.mkdir(parents=True)
    resolved = spec.load(
        CONFIGS / SPECS[trainer], ["activation=polynorm", DATA[trainer].format(folder / "data.v1")]
    )
    record.spec.write_text(document.dump(resolved.as_mapping()))
    return record.checkpoints / "step5"


def test_a_tokenizer_that_is_not_the_one_is_not_taken(words: Path, tmp_path: Path) -> None:
    saved = checkpoint(tmp_path, "megatron", words)
    assert tokenizer.of_checkpoint(saved) == tokenizer.Tokenizer(words, 1)
    words.write_text("{}")
    assert tokenizer.of_checkpoint(saved) == tokenizer.Tokenizer(None, 1)
    words.unlink()
    assert tokenizer.of_checkpoint(saved) == tokenizer.Tokenizer(None, 1)
    Record(tmp_path / "run").spec.write_text("trainer: [")  # no obstacle to the checkpoint
    assert tokenizer.of_checkpoint(saved) is None


SMALL: dict[str, Any] = {
    **{"vocab_size": 4, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 8},
    **{"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-5},
    **{"rope_theta": 1e4, "initializer_range": 0.02, "eos_token_id": 1, "activation": described("polynorm")},
    **{"norm": {"kind": "rms", "affine": True, "bias": False}, "qk_norm": None, "clip_qkv": None},
    "norm_after": False,
    **{"num_experts": 0, "num_experts_per_tok": 0, "norm_topk_prob": False},
}


@pytest.mark.parametrize("trainer", SPECS)
def test_every_trainers_checkpoints_are_read_with_it(trainer: str, words: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path, trainer, words)
    form = trainers.checkpoint_forms()[trainer]
    tensors = {name: lambda shape=shape: torch.zeros(shape) for name, shape in shapes(SMALL).items()}
    form.write(
        Model(SMALL, tensors, "it"), Record(tmp_path / "run").checkpoints, Options(), lambda size: None
    )
    model = form.read(form.find(tmp_path / "run").path)
    assert model.files == {"tokenizer.json": words}
    assert model.config["eos_token_id"] == 1


def test_what_the_checkpoint_says_itself_stays(words: Path, tmp_path: Path) -> None:
    saved = checkpoint(tmp_path, "megatron", words)
    for said, kept in ((None, 1), (7, 7)):
        model = tokenizer.added(Model({"eos_token_id": said}, {}, "it"), saved)
        assert (model.config, model.files) == ({"eos_token_id": kept}, {"tokenizer.json": words})


def test_a_checkpoint_without_a_run_has_none(tmp_path: Path) -> None:
    assert tokenizer.of_checkpoint(tmp_path / "checkpoints" / "step5") is None
