#!/usr/bin/env bash
# Create .venv with everything that the project needs. Where an interpreter already brings a CUDA build of torch 2.11 or
# later (NVIDIA's images do), the environment builds on it; elsewhere it installs the versions of constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."

candidates() {
    [ -n "${PYTHON:-}" ] && echo "$PYTHON"
    local name
    for name in python3.12 python3.13 python3 python; do
        type -ap "$name" 2>/dev/null || true
    done
    # Version managers keep interpreters that their shims on the PATH may not resolve to.
    ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23]*/bin/python3 \
        "$HOME"/.local/share/uv/python/cpython-3.1[23]*/bin/python3 \
        "$HOME"/*conda3/bin/python3 /opt/*/bin/python3 2>/dev/null || true
}

works() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }

has_cuda_torch() {
    # Not from inside another virtual environment: ours would see its base's packages, not its own.
    "$1" -c 'import sys, torch; v = torch.__version__.split(".")
assert sys.prefix == sys.base_prefix and torch.version.cuda and (int(v[0]), int(v[1])) >= (2, 11)' >/dev/null 2>&1
}

chosen="" system_torch=""
while read -r python; do
    works "$python" || continue
    if has_cuda_torch "$python"; then
        chosen=$python system_torch=yes
        break
    fi
    [ -n "$chosen" ] || chosen=$python
done < <(candidates)

if [ -z "$chosen" ]; then
    echo "megatron-dmc needs Python 3.12 or later with the venv module, and found none." >&2
    echo "Install one (Debian and Ubuntu: apt-get install python3.12-venv), or name one: make PYTHON=/path/to/python3.12" >&2
    exit 1
fi

rm -rf .venv
if [ -n "$system_torch" ]; then
    echo "building on the torch of $chosen"
    "$chosen" -m venv --system-site-packages .venv
    grep -v '^torch==' constraints.txt >.venv/constraints.txt
    .venv/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
        >>.venv/constraints.txt
else
    echo "creating .venv with $chosen"
    "$chosen" -m venv .venv
    cp constraints.txt .venv/constraints.txt
fi
# torch first: building the CUDA extension needs its headers.
.venv/bin/pip install --quiet --disable-pip-version-check -c .venv/constraints.txt torch
.venv/bin/pip install --quiet --disable-pip-version-check -c .venv/constraints.txt -e '.[test]'
touch .venv/.ready .venv/.built
