#!/usr/bin/env bash
# Makes a virtual environment in .venv with this project and the named extras: bash scripts/setup.sh [EXTRA ...]
# Commas between extras are fine, too. A second call with the same extras and pins returns at once.
set -euo pipefail
cd "$(dirname "$0")/.."
for candidate in "${PYTHON:-}" python3.12 python3.11 python3.13 python3; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
        "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
        python="$candidate"
        break
    fi
done
if [ -z "${python:-}" ]; then
    echo "error: Python 3.11 to 3.13 is needed and was not found; install it or name it with PYTHON=/path/to/python" >&2
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
show() { # what pip does: in place on a terminal, else a line for each download
    local line
    while IFS= read -r line; do
        if [ -t 1 ]; then
            printf '\r\033[K%.*s' "$(($(tput cols 2>/dev/null || echo 80) - 1))" "$line"
        elif [[ "$line" =~ ^\ *(Downloading|Building|Installing) ]]; then
            printf '%.100s\n' "${line#"${line%%[! ]*}"}"
        fi
    done
    if [ -t 1 ]; then printf '\r\033[K'; fi
}
install() {
    .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt "$@" | show
}
stamp=".venv/ready-$(cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)-${extras//,/-}"
if [ ! -f "$stamp" ]; then
    if [ -x .venv/bin/python ]; then
        echo "adding ${extras:-what has changed} to .venv (mostly downloads)"
    else
        echo "making .venv with $("$python" --version) (once; a few minutes, mostly downloads)"
    fi
    "$python" -m venv .venv
    install -e ".${extras:+[$extras]}"
    case ",$extras," in *,prepare,*) install --no-deps clearvoice ;; esac # it asks for numpy 1, but runs with 2
    case ",$extras," in *,flash,*) install --no-build-isolation flash-attn ;; esac # its build imports torch
    touch "$stamp"
    echo "ready: source .venv/bin/activate"
fi
