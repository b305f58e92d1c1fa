"""What Kubernetes makes of a container's command before it starts it."""

from __future__ import annotations

import re
from collections.abc import Mapping


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` is a variable's value where there is one, `$$` a dollar; everything else stays."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else variables.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", value, text)
