#!/bin/sh
# Makes the environment of `make test-te` in the directory $1: the real Transformer Engine, without a GPU.
# Needs Python 3.12, a C++ compiler and the CUDA 13 toolkit (CUDA_HOME); takes 15 minutes on two cores and 6 GB.
set -eu
venv=$1
constraints=$(dirname "$(readlink -f "$0")")/../../constraints.txt
version=2.11.0 # the one whose signatures the stand-in has
[ ! -e "$venv/.installed" ] || exit 0
command -v "${PYTHON312:-python3.12}" >/dev/null || { echo "Python 3.12 is needed: give one with PYTHON312=..."; exit 1; }
[ -d "${CUDA_HOME:=/usr/local/cuda}/include" ] || { echo "$CUDA_HOME: no CUDA toolkit there; give CUDA_HOME=..."; exit 1; }
"${PYTHON312:-python3.12}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip "$@"; }
pip install --quiet torch==2.11.0 # the registry's build is for CUDA 13
pip install --quiet setuptools wheel pybind11 ninja packaging numpy pytest pydantic onnx onnxscript einops \
    nvdlfw-inspect importlib-metadata
pip install --quiet --no-deps "transformer-engine==$version" "transformer-engine-cu13==$version"
pip install --quiet --no-deps -c "$constraints" megatron-core
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# The part that is bound to torch exists as source only; the headers come with torch's own packages.
CPATH="$site/nvidia/cu13/include:$site/nvidia/cudnn/include:$site/nvidia/nccl/include" \
    CUDA_HOME=$CUDA_HOME NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS=${MAX_JOBS:-2} \
    "$venv/bin/python" -m pip install --no-deps --no-build-isolation --no-binary=:all: "transformer-engine-torch==$version"
touch "$venv/.installed"
