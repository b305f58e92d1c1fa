#!/bin/sh
# megablocks.sh PINS WHEELS: wheels of the pinned fork of megablocks, with its kernels, and of the sparse products under it.
set -eu

pinned() {
    python3 -c "import sys, tomllib; print(tomllib.load(open(sys.argv[1], 'rb'))['megablocks']['git'][sys.argv[2]])" "$@"
}

source=$(mktemp -d)
git clone --quiet "$(pinned "$1" url)" "$source"
git -C "$source" checkout --quiet "$(pinned "$1" commit)"
# CUDA 13's CUB no longer takes this last argument, which was false.
sed -i -z 's/,[[:space:]]*debug_synchronous))/))/g' "$source/csrc/cumsum.h"
python3 -m pip wheel --no-deps --no-build-isolation --wheel-dir "$2" "$source" stanford-stk==0.7.1
