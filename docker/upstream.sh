#!/bin/sh
# upstream.sh NAME…: fetch, patch, verify and compile upstreams; the downloads are not kept.
set -eu
POLYCOM_CACHE=$(mktemp -d)
export POLYCOM_CACHE
trap 'rm -rf "$POLYCOM_CACHE"' EXIT
polycom upstream apply "$@"
polycom upstream verify "$@"
python3 -m compileall -q "$POLYCOM_UPSTREAM_DIR"
