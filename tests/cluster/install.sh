#!/usr/bin/env bash
# install.sh PACKAGE…: those that are not installed yet, by root on Debian; elsewhere the tests say what they miss.
set -euo pipefail
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "not root on Debian: tests of clusters skip what they do not find here"
    exit 0
fi
missing=()
for package in "$@"; do
    dpkg-query --show --showformat='${db:Status-Status}' "$package" 2> /dev/null | grep -qx installed || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    apt-get update --quiet=2
    # No daemon of theirs is to run: each test starts its own.
    DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install --yes --quiet=2 --no-install-recommends "${missing[@]}"
fi
