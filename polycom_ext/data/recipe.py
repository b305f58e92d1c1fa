"""Recipes: where a corpus lies, what it is made into, how much is to come out. YAML, ours in `recipes/`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml

from polycom_ext import trainers
from polycom_ext.errors import PolycomError, did_you_mean

FOLDER = Path(__file__).with_name("recipes")
DTYPES = ("uint16", "uint32")
"""Of flat files of tokens."""


@dataclass(frozen=True)
class Source:
    """One part of a corpus: some files of a list of URLs, or of a data set on the Hugging Face hub."""

    tokens: float
    """How many are published; the corpus is mixed by them unless `weight` says otherwise."""
    match: str
    """Which URLs, or files of the data set: a pattern with `*`, which takes slashes too."""
    urls: str = ""
    """Of a text of URLs, one a line."""
    hub: str = ""
    """OWNER/NAME of a data set."""
    revision: str = "main"
    sha256: str = ""
    """Of a text as `sha256sum` writes it; the hub says hashes itself."""
    files: int | None = None
    gib: float | None = None
    """What is published about their number and size, before some are left out."""
    weight: float | None = None
    held_out: int = 0
    """Files for validation: the last ones by name."""


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer.json on the hub."""

    hub: str
    file: str = "tokenizer.json"
    revision: str = "main"
    eos: str | None = None


@dataclass(frozen=True)
class Validation:
    """Sets that are published as flat token files, made with a tokenizer of the same ids."""

    sets: Mapping[str, str] = field(default_factory=dict)
    """Label -> URL."""
    dtype: str = "uint16"
    eos_id: int = 0
    """The id at the end of their documents."""


@dataclass(frozen=True)
class Recipe:
    """A corpus."""

    name: str
    formats: list[str]
    """As in `--format`; the first is made unless another is asked for."""
    tokenizer: TokenizerFile
    train: Mapping[str, Source]
    text_key: str = "text"
    validation: Validation = field(default_factory=Validation)
    within: float = 0.1
    """By what part of the published number the tokens made may differ from it."""


Made = TypeVar("Made")


def names() -> list[str]:
    """The recipes that are shipped."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Recipe:
    """A shipped recipe by its name, or one of the user's by its path.

    Raises:
        PolycomError: there is none, or it says what no recipe may.
    """
    path = FOLDER / f"{name}.yaml" if name in names() else Path(name)
    if not path.is_file():
        known = ", ".join(names())
        raise PolycomError(
            f"no recipe {name}{did_you_mean(name, names())}; choose of {known}, or name a YAML file"
        )
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PolycomError(f"{path} is no YAML ({' '.join(str(error).split())})") from None
    parts = _mapping(said, str(path))
    train = _mapping(parts.get("train"), f"{path}: train")
    recipe = _made(
        Recipe,
        {
            **parts,
            "tokenizer": _made(TokenizerFile, parts.get("tokenizer"), f"{path}: tokenizer"),
            "train": {
                label: _made(Source, source, f"{path}: train.{label}") for label, source in train.items()
            },
            "validation": _made(Validation, parts.get("validation", {}), f"{path}: validation"),
        },
        str(path),
    )
    _check(recipe, str(path))
    return recipe


def _check(recipe: Recipe, where: str) -> None:
    for name in (recipe.name, *recipe.train, *recipe.validation.sets):
        if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
            raise PolycomError(
                f"{where}: {name!r} must be a plain name of a file: letters, digits, '_', '.', '+', '-'"
            )
    for label, source in recipe.train.items():
        if bool(source.urls) == bool(source.hub):
            raise PolycomError(f"{where}: train.{label} needs one of urls and hub")
        if not source.tokens:
            raise PolycomError(f"{where}: train.{label}: tokens 0 gives it no part of the mixture")
    if not recipe.train:
        raise PolycomError(f"{where}: train names no source")
    if not recipe.formats:
        raise PolycomError(f"{where}: formats names no form of token files")
    for format_ in recipe.formats:
        if format_ not in trainers.format_names():
            raise PolycomError(f"{where}: formats: {format_} is none of {', '.join(trainers.format_names())}")
    if recipe.validation.dtype not in DTYPES:
        raise PolycomError(
            f"{where}: validation.dtype {recipe.validation.dtype} is none of {', '.join(DTYPES)}"
        )


def _made(kind: type[Made], said: Any, where: str) -> Made:
    """The dataclass of a mapping, whose keys are its fields and whose values are of their types."""
    known = get_type_hints(kind)
    given = _mapping(said, where)
    for key, value in given.items():
        if key not in known:
            raise PolycomError(f"{where}: unknown key {key}{did_you_mean(key, known)}")
        if not _fits(value, known[key]):
            raise PolycomError(f"{where}: {key} {value!r} is not {WANTED[known[key]]}")
    missing = [one.name for one in fields(kind) if _needed(one) and one.name not in given]  # type: ignore[arg-type]
    if missing:
        raise PolycomError(f"{where}: {missing[0]} is missing")
    return kind(**given)


def _needed(one: Field[Any]) -> bool:
    return one.default is MISSING and one.default_factory is MISSING


WANTED: dict[Any, str] = {
    str: "a text",
    str | None: "a text",
    int: "a whole number, 0 or more",
    int | None: "a whole number, 0 or more",
    float: "a number, 0 or more",
    float | None: "a number, 0 or more",
    list[str]: "a list of texts",
    Mapping[str, str]: "a mapping of texts",
}
"""Types of the fields above that a YAML file gives by itself."""


def _fits(value: Any, wanted: Any) -> bool:
    if wanted not in WANTED:
        return True  # a dataclass, or some by name, which are made already
    if value is None:
        return type(None) in get_args(wanted)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
    if wanted in (int, int | None):
        return number and isinstance(value, int)
    if wanted in (float, float | None):
        return number
    texts = {list[str]: (list, list), Mapping[str, str]: (dict, dict.values)}.get(wanted)
    if texts is None:
        return isinstance(value, str)
    whole, values = texts
    return isinstance(value, whole) and all(isinstance(one, str) for one in values(value))


def _mapping(said: Any, where: str) -> dict[str, Any]:
    if not isinstance(said, dict) or not all(isinstance(key, str) for key in said):
        raise PolycomError(f"{where} is no mapping of names")
    return said
