"""The indexed dataset against upstream's own builder and reader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from polycom_ext.data.prepare import prepare
from polycom_ext.data.settings import Settings
from polycom_ext.upstream import ensure_applied

from .conftest import read_documents, write_jsonl

UPSTREAM = """
import json, sys
import numpy, torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

result = {}
for prefix, (vocab_size, documents) in json.load(sys.stdin).items():
    builder = IndexedDatasetBuilder(prefix + "-upstream.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(prefix + "-upstream.idx")
    dataset = IndexedDataset(prefix)
    result[prefix] = {
        "documents": [dataset[index].tolist() for index in range(len(dataset))],
        "document_indices": dataset.document_indices.tolist(),
        "dtype": numpy.dtype(dataset.index.dtype).name,
    }
json.dump(result, sys.stdout)
"""


@pytest.fixture(scope="module")
def large_tokenizer(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 66000 tokens: too many for uint16, and the texts use the last ones."""
    large = Tokenizer.from_file(str(tokenizer))
    fillers = [f"filler{index}" for index in range(66000 - large.get_vocab_size() - 2)]
    large.add_tokens([AddedToken(token) for token in [*fillers, "sea", "naïve"]])
    path = tmp_path_factory.mktemp("large") / "tokenizer.json"
    large.save(str(path))
    return path


def test_upstream_writes_the_same_bytes_and_reads_the_same_documents(
    tokenizer: Path, large_tokenizer: Path, texts: Sequence[str], tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*texts, "", "one"])
    expected = {}
    for name, file in (("small", tokenizer), ("large", large_tokenizer)):
        prefix = tmp_path / name
        metadata = prepare(Settings([source], prefix, tokenizer=file, shard_bytes=3000))
        expected[str(prefix)] = (metadata["vocab_size"], read_documents(prefix))
        assert len(expected[str(prefix)][1]) == len(texts) + 1

    read = subprocess.run(
        [sys.executable, "-c", UPSTREAM],
        input=json.dumps(expected),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ensure_applied("megatron")), "TORCHDYNAMO_DISABLE": "1"},
    )
    assert read.returncode == 0, read.stderr
    result = json.loads(read.stdout[read.stdout.index("{") :])
    for name, (_, documents) in expected.items():
        assert result[name]["documents"] == documents
        assert result[name]["document_indices"] == list(range(len(documents) + 1))
        for suffix in (".bin", ".idx"):
            assert Path(name + suffix).read_bytes() == Path(f"{name}-upstream{suffix}").read_bytes()
    assert [result[str(tmp_path / name)]["dtype"] for name in ("small", "large")] == ["uint16", "int32"]
    assert max(max(document) for document in expected[str(tmp_path / "large")][1]) > 65535
