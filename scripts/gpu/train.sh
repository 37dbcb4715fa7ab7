#!/usr/bin/env bash
# Train kv routers and LoRA on one GPU for MINUTES (4), from the packaged adapter on, and judge them in that time.
#
#   scripts/gpu/train.sh PIECES WORK OUT    # PIECES: of scripts/gpu/pack.sh; WORK: a folder for what they hold
#
# TRAIN (routers,lora): what is trained, one after the other. BATCH (8) sequences of LENGTH (2048) tokens a step: fewer take
# less memory. TOKENS: the most that a training gets. COUNT (4): sequences of 2048 to judge by, of each text. PYTHON
# (python3): one with torch, transformers and accelerate. WORK/start, where it is there, is the adapter to start from. OUT
# gets train.json, the adapters and a log of each step. Exit code 1: a step failed or had no time.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pieces.sh"
[ $# = 3 ] || die "usage: scripts/gpu/train.sh PIECES WORK OUT"
pieces=$(realpath -m "$1") work=$(realpath -m "$2") out=$(realpath -m "$3") python=${PYTHON:-python3}
"$python" -c 'import sys; from importlib.util import find_spec
sys.exit(not all(map(find_spec, ("torch", "transformers", "accelerate", "click"))))' 2>/dev/null || die "$python lacks torch, transformers, accelerate or click"
unpack "$pieces" "$work" "$python"
mkdir -p "$out"
export PYTHONPATH=$PWD:$work/site MOD_EXPORT_CACHE=${MOD_EXPORT_CACHE:-$work/cache}
exec "$python" -u scripts/gpu/train.py "$work" "$out" "${MINUTES:-4}"
