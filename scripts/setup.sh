#!/usr/bin/env bash
# Makes a virtual environment in .venv with this project and the named extras: bash scripts/setup.sh [EXTRA ...]
# Commas between extras are fine, too. A second call with the same extras and pins returns at once.
set -euo pipefail
cd "$(dirname "$0")/.."
for candidate in "${PYTHON:-}" python3.12 python3.11 python3; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
        "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
        python="$candidate"
        break
    fi
done
if [ -z "${python:-}" ]; then
    echo "error: Python 3.11 or 3.12 is needed and was not found; install it or name it with PYTHON=/path/to/python" >&2
    exit 2
fi
extras="$("$python" - "$@" <<'EOF'
import sys
import tomllib

known = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
extras = sorted(set(",".join(sys.argv[1:]).replace(" ", ",").split(",")) - {""})
for extra in extras:
    if extra not in known:
        sys.exit(f"error: there is no extra {extra}; choose from {', '.join(known)}")
print(",".join(extras))
EOF
)" || exit 2
stamp=".venv/ready-$(cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)-${extras//,/-}"
if [ ! -f "$stamp" ]; then
    echo "setting up .venv (a few minutes, once) ..."
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}"
    touch "$stamp"
fi
