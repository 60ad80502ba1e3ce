#!/usr/bin/env bash
# Runs a Python program on a GPU that does nothing: run.sh PROGRAM ARGUMENTS...
#
#   PYTHON              interpreter with a CUDA build of torch [python3]
#   NULLGPU             folder for the built libraries [a folder of temporary files]
#   NULLGPU_GIB         memory of the GPU [79.1]
#   NULLGPU_US          microseconds that each kernel takes, beside the host [0]
#   NULLGPU_COUNT       number of GPUs [1]
#   NULLGPU_DEVICE      kernels on another GPU than this one are reported
#   NULLGPU_CAPABILITY  compute capability [90]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
export NULLGPU=${NULLGPU:-${TMPDIR:-/tmp}/opsin-nullgpu-$(id -u)}

if [ ! -e "$NULLGPU/libcuda.so.1" ] || [ -n "$(find "$here" -newer "$NULLGPU/libcuda.so.1" -name '*.cpp')" ]; then
    site=$("$python" -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent.parent)" 2>/dev/null || true)
    headers=$(find "$site/nvidia" -name cuda_runtime_api.h 2>/dev/null | head -n 1 || true)
    if [ -z "$headers" ]; then
        echo "run.sh: PYTHON=$python has no CUDA build of torch; set it to an interpreter that has one" >&2
        exit 2
    fi
    if ! command -v g++ >/dev/null; then
        echo "run.sh: g++ is not installed; the null GPU is compiled with it" >&2
        exit 2
    fi
    mkdir -p "$NULLGPU"
    includes=(-I"$(dirname "$headers")" -I"$site/triton/backends/nvidia/include")
    g++ -O1 -shared -fPIC "${includes[@]}" "$here/runtime.cpp" "$here/libraries.cpp" -o "$NULLGPU/libnullgpu.so"
    g++ -O1 -shared -fPIC "$here/driver.cpp" -o "$NULLGPU/libcuda.so.1" -ldl
    ln -sf libcuda.so.1 "$NULLGPU/libcuda.so"
    ln -sf libcuda.so.1 "$NULLGPU/libnvidia-ml.so.1"
fi
# The interface of cuDNN 8 for convolutions is not stood in for; GEMMs of FP64 and cuSOLVER are not either.
export TORCH_CUDNN_V8_API_DISABLED=1
# As opsin sets it for itself; programs here may import torch first.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-expandable_segments:True}
export PYTHONPATH="$here/..:$here/../../src${PYTHONPATH:+:$PYTHONPATH}"
LD_PRELOAD="$NULLGPU/libnullgpu.so" LD_LIBRARY_PATH="$NULLGPU" exec "$python" "$@"
