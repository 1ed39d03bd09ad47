#!/usr/bin/env bash
# Installs megadpo into an environment that has its own torch, as NVIDIA's images do: packages that were compiled for
# each other are kept, the others come from constraints.txt. Fails and names the package where that is not possible.
# PYTHON names the interpreter of the environment.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

python="${PYTHON:-python}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

"$python" docker/brought.py write --pins constraints.txt --out "$work"
# The image's own PIP_CONSTRAINT pins every package in it, also those that may be upgraded; it would apply in the
# isolated environments of builds, too.
env -u PIP_CONSTRAINT "$python" -m pip install --no-cache-dir --constraint "$work/constraints.txt" --editable .
"$python" docker/brought.py verify --out "$work"
