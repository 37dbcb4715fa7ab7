# Sourced by pack.sh and train.sh: what travels to a GPU machine without a network, in small pieces.

cd "$(dirname "${BASH_SOURCE[0]}")/../.."

die() { printf 'error: %s\n' "$*" >&2; exit 2; }

# pieces OUT FOLDER: the folder's content as OUT/piece.* of at most 48 MiB, with their sums
pieces() {
    mkdir -p "$1"
    tar -C "$2" -cz . | split --bytes 48M --numeric-suffixes --suffix-length 2 - "$1/piece."
    (cd "$1" && sha256sum piece.* >SHA256SUMS)
}

# unpack PIECES WORK PYTHON: into WORK, where they are not yet; wheels are installed into WORK/site
unpack() {
    local mark; mark=$2/unpacked-$(basename "$1")
    if [ -e "$mark" ] && { [ ! -e "$1" ] || [ "$(cat "$1/SHA256SUMS")" = "$(cat "$mark")" ]; }; then return; fi
    [ -f "$1/SHA256SUMS" ] || die "there are no pieces in $1; scripts/gpu/pack.sh makes them"
    (cd "$1" && sha256sum --quiet --check SHA256SUMS) || die "pieces are missing or damaged in $1"
    mkdir -p "$2"
    cat "$1"/piece.* | tar -C "$2" -xz
    if [ -d "$2/wheels" ]; then
        "$3" -m pip --quiet --disable-pip-version-check install --no-index --no-deps --upgrade --target "$2/site" \
            "$2"/wheels/*.whl || die "pip cannot install the packages of $1"
        rm -r "$2/wheels"
    fi
    cp "$1/SHA256SUMS" "$mark"
}
