#!/bin/sh
# install.sh REQUIREMENT…: what pip is to add to the torch that is here, which it leaves alone. A container's own list
# of versions (PIP_CONSTRAINT) holds beside that.
set -eu

torch() {
    python3 -c 'from importlib.metadata import version; print(version("torch"))'
}

here=$(torch)
constraint=$(mktemp)
trap 'rm -f "$constraint"' EXIT
printf 'torch==%s\n' "$here" > "$constraint"
PIP_CONSTRAINT="${PIP_CONSTRAINT:+$PIP_CONSTRAINT }$constraint" \
    python3 -m pip install --no-cache-dir "$@"

now=$(torch)
if [ "$now" != "$here" ]; then
    echo "install.sh: pip has put torch $now before the base's own $here" >&2
    exit 1
fi
