#!/usr/bin/env bash
# Checks of the source that need no model: format, lint, types, docs.
#
#   scripts/dev.sh                 # all of them
#   scripts/dev.sh lint types      # some of them
#   scripts/dev.sh fix             # format the files, repair what ruff can repair, write generated pages
#
# PYTHON (.venv/bin/python): an interpreter with the extra `dev`. The exit code is 1 where a check fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}

run() { printf '%s: ' "$1"; "${@:2}"; }

check() {
    case $1 in
        format) run format "$python" -m ruff format --check . ;;
        lint)
            run lint "$python" -m ruff check --output-format concise . || return 1
            run spelling "$python" -m codespell_lib . && echo clean
            ;;
        types) run types "$python" -m mypy ;;
        docs) run docs "$python" -m pytest -q --no-header tests/unit/test_docs.py tests/unit/test_imports.py ;;
        fix)
            "$python" -m ruff check --fix --quiet . || true
            run format "$python" -m ruff format .
            run docs "$python" -m scripts.docs.cli
            "$python" -m scripts.docs.training_memory
            ;;
        *) echo "usage: scripts/dev.sh [format] [lint] [types] [docs] [fix]" >&2; exit 2 ;;
    esac
}

[ $# -gt 0 ] || set -- format lint types docs
code=0
for part; do check "$part" || code=1; done
exit "$code"
