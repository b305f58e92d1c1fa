"""Recipes: where a corpus lies, what it is made into, how much is to come out. YAML, ours in `recipes/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from polycom_ext import trainers
from polycom_ext.errors import PolycomError, did_you_mean

FOLDER = Path(__file__).with_name("recipes")


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
    recipe = _made(Recipe, said, str(path))
    train = {
        label: _made(Source, source, f"{path}: train.{label}")
        for label, source in _mapping(recipe.train, f"{path}: train").items()
    }
    for label, source in train.items():
        if bool(source.urls) == bool(source.hub):
            raise PolycomError(f"{path}: train.{label} needs one of urls and hub")
    if not train:
        raise PolycomError(f"{path}: train names no source")
    for format_ in recipe.formats:
        if format_ not in trainers.format_names():
            raise PolycomError(f"{path}: formats: {format_} is none of {', '.join(trainers.format_names())}")
    return Recipe(
        **{
            **vars(recipe),
            "train": train,
            "tokenizer": _made(TokenizerFile, recipe.tokenizer, f"{path}: tokenizer"),
            "validation": _made(Validation, recipe.validation or {}, f"{path}: validation")
            if not isinstance(recipe.validation, Validation)
            else recipe.validation,
        }
    )


def _made(kind: type[Made], said: Any, where: str) -> Made:
    """The dataclass of a mapping, whose keys are its fields."""
    known = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]
    given = _mapping(said, where)
    for key in given:
        if key not in known:
            raise PolycomError(f"{where}: unknown key {key}{did_you_mean(key, known)}")
    try:
        return kind(**given)
    except TypeError as error:
        raise PolycomError(f"{where}: {str(error).partition('__init__() ')[2]}") from None


def _mapping(said: Any, where: str) -> dict[str, Any]:
    if not isinstance(said, dict) or not all(isinstance(key, str) for key in said):
        raise PolycomError(f"{where} is no mapping of names")
    return said
