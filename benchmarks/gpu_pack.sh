#!/usr/bin/env bash
# Pack what the GPU proof needs on a GPU machine without network: x86-64 Linux, Python 3.12, torch 2.11 with CUDA 13, and
# the packages of benchmarks/gpu_machine.txt. Run it in the root of a checkout, on a machine with a package index:
#
#     make .venv/.installed && bash benchmarks/gpu_pack.sh
#
# It writes .whl/ (wheels) and .gpu/ (unpacked packages, and the planned memory of the cells), together under 40 MB, and
# checks tags, size and requirements. Copy the checkout with both folders to the GPU machine and run there, in its root:
#
#     python3 -m pip install -q --no-index --no-deps --no-compile --target .gpu/wheels .whl/*.whl
#     export PYTHONPATH=.gpu/wheels:.gpu/site:.
#     python3 -u benchmarks/gpu.py proof --parts facts,sft --seconds 120 --json gpu.jsonl
#     python3 -u benchmarks/gpu.py proof --json gpu.jsonl
#
# PYTHON: the interpreter whose pip downloads. PLANNER: the interpreter with the kit, which plans the memory.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
PLANNER="${PLANNER:-.venv/bin/python}"

# Unpacked, because bitsandbytes' wheel contains a library for each version of CUDA: 43 MB, of which 8 are used.
UNPACKED=(bitsandbytes==0.50.2 datasets==4.8.5 trl==1.16.0 dill==0.4.1 multiprocess==0.70.19)
WHEELS=(peft==0.21.2 transformers==5.23.0 pydantic==2.14.3 pydantic_core==2.50.4 google-re2==1.1.20251105
    annotated-types==0.8.0 typing-extensions==4.16.0 typing-inspection==0.4.5)

download() {
    local folder="$1"
    shift
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform any --dest "$folder" "$@"
}

rm -rf .whl .gpu
mkdir -p .whl .gpu/site
echo "Downloading wheels"
download .whl "${WHEELS[@]}"
unpacked="$(mktemp -d)"
trap 'rm -rf "$unpacked"' EXIT
download "$unpacked" "${UNPACKED[@]}"
for wheel in "$unpacked"/*.whl; do
    "$PYTHON" -m zipfile -e "$wheel" .gpu/site
done
find .gpu/site/bitsandbytes -name 'libbitsandbytes_*.so' ! -name '*cuda130*' ! -name '*cpu*' -delete

if [ -x "$PLANNER" ]; then
    echo "Planning the memory of the cells (1 to 3 minutes)"
    PYTHONPATH=. "$PLANNER" benchmarks/gpu.py plan --out .gpu/plans.json >/dev/null
else
    echo "No plans: there is no $PLANNER. The proof then compares no planned memory."
fi

"$PYTHON" benchmarks/gpu_proof/pack.py .whl .gpu/site
