#!/usr/bin/env bash
# What RGD costs on an accelerator, and how far its arithmetic moves D. In two parts, as a machine
# with an accelerator may reach no package registry and have no TensorFlow:
#
#     benchmarks/accelerator.sh prepare FOLDER [--python 3.12] [--tiny] [--no-wheels]
#     benchmarks/accelerator.sh run FOLDER [--minutes 8] [--tiny]
#
# `prepare` runs in the package's environment. It puts into FOLDER steps lowered from TensorFlow,
# the images of a data set if CIFAR-10 is on disk, and the wheels of Keras, this package and what
# they need for the Python of the other machine: some 50 MiB. `run` runs there, in a copy of this
# repository with FOLDER, and needs Python, JAX with the accelerator, numpy and h5py. It prints its
# tables as they come, and begins no row that would take it past the minutes. --tiny is for trying
# both on a CPU, in two minutes.
set -euo pipefail

usage() {
    sed -n '2,/^set /{/^set /!p}' "$0" | sed 's/^# \{0,1\}//'
    exit 2
}

[ $# -ge 2 ] || usage
command=$1 folder=$2
shift 2
python=3.12 minutes=8 tiny="" wheels=yes
while [ $# -gt 0 ]; do
    case $1 in
        --python) python=$2; shift ;;
        --minutes) minutes=$2; shift ;;
        --tiny) tiny=--tiny ;;
        --no-wheels) wheels="" ;;
        *) usage ;;
    esac
    shift
done
here=$(cd "$(dirname "$0")" && pwd)

prepare() {
    mkdir -p "$folder"
    models=(mlp cnn resnet20-gn transformer) sizes=(128 512)
    [ -z "$tiny" ] || { models=(mlp) sizes=(8); }
    KERAS_BACKEND=tensorflow python "$here/xla_device.py" --out "$folder/steps" \
        --models "${models[@]}" --batch-sizes "${sizes[@]}"
    [ -n "$tiny" ] || KERAS_BACKEND=tensorflow python "$here/on_accelerator.py" images "$folder"
    [ -n "$wheels" ] || return 0
    python -m pip wheel --quiet --no-deps --wheel-dir "$folder/wheels" "$here/.."
    platforms=()
    for version in 2_39 2_35 2_34 2_31 2_28 2_27 2_24 2_17; do
        platforms+=(--platform "manylinux_${version}_x86_64")
    done
    python -m pip download --quiet --no-deps --only-binary=:all: --python-version "$python" \
        --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 \
        --dest "$folder/wheels" keras namex optree absl-py rich markdown-it-py mdurl pygments \
        packaging typing-extensions ml-dtypes
    du -sm "$folder"
}

run() {
    until=$(($(date +%s) + minutes * 60))
    if [ -d "$folder/wheels" ]; then
        site=$(mktemp -d)
        python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" \
            "$folder"/wheels/*.whl
        export PYTHONPATH=$site
    fi
    export KERAS_BACKEND=jax
    # Not all of the memory at once: what a step takes is to be seen.
    export XLA_PYTHON_CLIENT_PREALLOCATE=false
    python3 "$here/xla_device_run.py" "$folder/steps"
    python3 "$here/on_accelerator.py" run "$folder" --until "$until" $tiny
}

case $command in
    prepare) prepare ;;
    run) run ;;
    *) usage ;;
esac
