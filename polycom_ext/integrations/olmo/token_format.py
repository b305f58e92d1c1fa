"""OLMo's flat token files: written, and looked at before a run reads them.

`PREFIX.npy` holds the tokens alone, little-endian; despite the name it has no NumPy header
(`olmo.data.memmap_dataset.MemMapDataset`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from polycom_ext.data import token_files
from polycom_ext.data.formats import TokenFormat, write_tokens
from polycom_ext.data.token_files import Model, TokenFile
from polycom_ext.errors import PolycomError

NUMPY_MAGIC = b"\x93NUMPY"


def token_dtype(vocab_size: int) -> str:
    """uint16, OLMo's default.

    Raises:
        PolycomError: the vocabulary does not fit.
    """
    if vocab_size > 1 << 16:
        raise PolycomError(
            f"a vocabulary of {vocab_size} does not fit into the 16-bit tokens of --format olmo; "
            "take a tokenizer of at most 65536 tokens or --format megatron"
        )
    return "<u2"


def read(prefix: str, vocab_size: int) -> npt.NDArray[Any]:
    """The tokens of `PREFIX.npy`, mapped. Raises PolycomError as `problem` says."""
    name = f"{prefix}.npy"
    if said := problem(
        {name: "uint16"}, "the type of the tokens", Model(vocab_size, "the model's vocab_size")
    ):
        raise PolycomError(said)
    return np.memmap(name, "<u2", mode="r") if Path(name).stat().st_size else np.empty(0, "<u2")


FLAT = TokenFormat(
    summary="flat 16-bit PREFIX.npy", files={".npy": write_tokens}, dtype=token_dtype, read=read
)


def problem(files: Mapping[str, str], dtype_name: str, model: Model) -> str:
    """What is wrong with files for a model, as a sentence for the user; empty if nothing is.

    Args:
        files: path of a file that exists -> NumPy's name of the type as which it will be read.
        dtype_name: what the user sets that type with.
        model: what will be trained on them.
    """
    found = []
    for name, dtype in files.items():
        if not isinstance(getattr(np, dtype, None), type) or not issubclass(getattr(np, dtype), np.integer):
            return f"{dtype_name} {dtype} is no integer type of NumPy's, such as uint16"
        suffix = Path(name).suffix
        file = TokenFile(name.removesuffix(suffix), suffix, dtype, dtype_name)
        size = file.path.stat().st_size
        if size % np.dtype(dtype).itemsize:
            return f"{file.path} has {size} bytes, which are not whole tokens of {dtype}"
        with file.path.open("rb") as stored:
            if stored.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC:
                return (
                    f"{file.path} has a NumPy header, which would be read as tokens; write it with `tofile`"
                )
        found.append(file)
    return token_files.problem(found, model)
