"""What looks like a secret, and so is written into no record, script or page."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from polycom_ext.errors import PolycomError

_ENDINGS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS")
_LAST_WORDS = ("AUTH", "PASS", "PWD")
_LOGIN = re.compile(r"://[^/\s:@]*:[^/\s@]+@")
"""`scheme://user:password@host`, as in the address of a proxy."""

_ASSIGNMENT = re.compile(r"""(\w+)=(?=['"]?[^\s'"$`])""")
"""NAME=VALUE, the value written out."""


def is_secret(name: str, value: str = "") -> bool:
    """Whether an environment variable looks like one that holds a secret: by its name, or by a login in it.

    >>> [is_secret(name) for name in ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "TOKENIZERS_PARALLELISM", "PWD")]
    [True, True, False, False]
    """
    words = [word for word in re.split(r"[^A-Za-z0-9]+", name.upper()) if word]
    if any(word.endswith(_ENDINGS) for word in words) or (len(words) > 1 and words[-1] in _LAST_WORDS):
        return True
    return _LOGIN.search(value) is not None


def in_text(text: str) -> str | None:
    """What looks like a secret that is written out in a shell line or an option; None where nothing does.

    >>> [in_text(text) for text in ("export HF_TOKEN=abc", "export HF_TOKEN=$(cat token)", "--env=HF_TOKEN")]
    ['HF_TOKEN', None, None]
    """
    if _LOGIN.search(text):
        return "a login in an address"
    names = (name for name in _ASSIGNMENT.findall(text) if is_secret(name))
    return next(names, None)


def reference(name: str) -> str:
    """What stands for the value of a secret: `${NAME}`, to be taken from the environment of who runs it."""
    return f"${{{name}}}"


def masked(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables with each secret's value replaced by its `reference`."""
    return {name: reference(name) if is_secret(name, value) else value for name, value in environment.items()}


def values(environment: Mapping[str, str]) -> dict[str, str]:
    """The secrets among the variables whose values stand there: what no record tells to who runs it."""
    return {
        name: value
        for name, value in environment.items()
        if is_secret(name, value) and value != reference(name)
    }


def check(environment: Mapping[str, str]) -> None:
    """Raise PolycomError for a secret that is to be taken from the caller's environment and is not there."""
    for name, value in environment.items():
        if value == reference(name) and name not in os.environ:
            raise PolycomError(
                f"environment.{name} is to be taken from your environment, where it is not set: "
                f"`export {name}=…` first (the record of a run keeps no secrets)"
            )
