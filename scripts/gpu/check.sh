#!/usr/bin/env bash
# The runtime's GPU work, in parts: build it, compare it with the CPU, sanitize it, measure it. See docs/how-to/run-on-a-gpu-machine.md.
#
#   scripts/gpu/check.sh [--rehearse] PART PIECES WORK
#
# PART: build, ops, parity, sanitize, bench or report; PIECES: of scripts/gpu/pack.sh; WORK: a folder that stays between calls.
# A part ends after MINUTES (8); exit 3: call it again, it goes on. 1: a check failed. RESULTS (docs/results/data/gpu): JSON
# files and plots. PYTHON (python3): one with numpy, jinja2 and typing_extensions, such as one with torch.
# --rehearse: the same on a CPU build with the smallest sizes, results in WORK/results.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pieces.sh"
[ "${1:-}" != --rehearse ] || { export MOD_REHEARSE=1; shift; }
usage="usage: scripts/gpu/check.sh [--rehearse] build|ops|parity|sanitize|bench|report PIECES WORK"
[ $# = 3 ] || die "$usage"
case $1 in build | ops | parity | sanitize | bench | report) part=$1 ;; *) die "$usage" ;; esac
pieces=$(realpath -m "$2") work=$(realpath -m "$3") python=${PYTHON:-python3}
"$python" -c 'import sys, numpy, jinja2, typing_extensions; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
    || die "$python is no Python 3.11 or later with numpy, jinja2 and typing_extensions"

[ "$part" = report ] || unpack "$pieces/build" "$work" "$python"
[ "$part" != parity ] || unpack "$pieces/model" "$work" "$python"
export PYTHONUNBUFFERED=1 MOD_EXPORT_CACHE=$work/cache MINUTES=${MINUTES:-8} GPU_WORK=$work
kind=patched-cuda
[ "${MOD_REHEARSE:-}" != 1 ] || { kind=patched RESULTS=$work/results; }
export GPU_RESULTS=$(realpath -m "${RESULTS:-docs/results/data/gpu}")
# llama_cpp is used from its source, with the library that was built: nothing is installed into the machine's Python
export PYTHONPATH=$PWD:$work/site PATH=$work/site/bin:$PATH
source=$("$python" -c 'from mod_export.llamacpp import source as s; print(s.source_dir() if s.is_unpacked() else "")')
[ "$part" = report ] || [ -n "$source" ] || die "the pieces are of other patches than this checkout; pack them again"
export PYTHONPATH=$PYTHONPATH:$source
if [ "$part" != build ] && [ "$part" != report ]; then
    [ -f "$work/cache/log/last-$kind" ] || die "the library is not built; run the part build first"
    export LLAMA_CPP_LIB_PATH=$work/cache/lib/$(cat "$work/cache/log/last-$kind")
fi

code=0
timeout --signal INT --kill-after 20 "${MINUTES}m" "$python" "scripts/gpu/$part.py" || code=$?
if [ "$code" = 124 ]; then
    echo "time is up: call again to go on"
    exit 3
fi
exit "$code"
