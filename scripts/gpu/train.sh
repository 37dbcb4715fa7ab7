#!/usr/bin/env bash
# Train routers on one GPU for some minutes, from the packaged adapter on, and judge them; call it again to go on.
#
#   scripts/gpu/train.sh PIECES WORK [TOKENS]     # PIECES: of scripts/gpu/pack.sh; WORK: a folder that stays between calls
#
# MINUTES (8): after so long the run saves and stops, exit 3. BATCH (8) sequences of LENGTH (2048) tokens a step: fewer
# take less memory. COUNT (8): sequences of 2048 to judge by, of each text. PYTHON (python3): one with torch,
# transformers and accelerate. WORK/start, where it is there, is the adapter to start from. Results in WORK: trained (an
# adapter), trained.run (metrics, plots), eval-smollm2-kv.json (or eval-start.json) and eval-trained.json beside them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pieces.sh"
[ $# -ge 2 ] || die "usage: scripts/gpu/train.sh PIECES WORK [TOKENS]"
pieces=$(realpath -m "$1") work=$(realpath -m "$2") tokens=${3:-20000000} python=${PYTHON:-python3}
"$python" -c 'import sys; from importlib.util import find_spec
sys.exit(not all(map(find_spec, ("torch", "transformers", "accelerate", "click"))))' 2>/dev/null || die "$python lacks torch, transformers, accelerate or click"
unpack "$pieces" "$work" "$python"
export PYTHONPATH=$PWD:$work/site MOD_EXPORT_CACHE=${MOD_EXPORT_CACHE:-$work/cache}
mod() { "$python" -m mod_export "$@"; }
cd "$work"

start=smollm2-kv
[ ! -e start ] || start=./start # another adapter
if [ ! -e trained ]; then
    share=$("$python" -c 'import sys; from mod_export.formats import adapter_files as files
print(files.read(files.resolve(sys.argv[1])).config.calibration["training"]["target"])' "$start")
    data=(); for path in data/*; do [ "$path" = data/dev ] || data+=(-d "$path"); done
    more=(); [ ! -e trained.run/checkpoint.pt ] || more=(--resume)
    code=0
    timeout --signal TERM "${MINUTES:-8}m" "$python" -m mod_export train "$start" -o trained "${data[@]}" "${more[@]}" \
        --target-activation "$share" --tokens "$tokens" --length "${LENGTH:-2048}" --batch "${BATCH:-8}" --router-lr 2e-3 \
        || code=$?
    if [ "$code" = 124 ]; then
        [ -e trained.run/checkpoint.pt ] || die "time was up before the first step; give more MINUTES"
        echo "time is up, the checkpoint is in $work/trained.run: call again to go on"
        exit 3
    fi
    [ "$code" = 0 ] || exit "$code"
fi
texts=(); for file in data/dev/*.txt; do texts+=(--text "$file"); done
device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
for name in "$start" trained; do
    mod eval "$name" "${texts[@]}" --device "$device" --count "${COUNT:-8}" --json "eval-$(basename "$name").json" --force
done
