#!/bin/sh
# upstream.sh NAME…: fetch, patch and verify upstreams; the downloads are not kept.
set -eu
POLYCOM_CACHE=$(mktemp -d)
export POLYCOM_CACHE
trap 'rm -rf "$POLYCOM_CACHE"' EXIT
polycom upstream apply "$@"
polycom upstream verify "$@"
