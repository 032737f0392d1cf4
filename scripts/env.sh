# Sourced by the other scripts: makes .venv with kq and the extras named in KQ_EXTRAS installed.
# Nothing is installed twice: a stamp remembers which setup.cfg the environment was made from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"
VENV="${KQ_VENV:-.venv}"

if ! "$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info)' 2>/dev/null; then
    echo "kq needs Python 3.10 or newer; set PYTHON to one, e.g. PYTHON=python3.12 $0" >&2
    exit 1
fi
if ! [ -x "$VENV/bin/python" ]; then
    echo "making $VENV with $("$PYTHON" --version)" >&2
    "$PYTHON" -m venv "$VENV" 2>/dev/null || {
        # Debian keeps venv in a package of its own.
        apt-get -qq update && apt-get -qq install -y python3-venv >&2 && "$PYTHON" -m venv "$VENV"
    }
fi
stamp="$VENV/.kq-installed-${KQ_EXTRAS:-none}"
if ! [ "$stamp" -nt setup.cfg ]; then
    echo "installing kq${KQ_EXTRAS:+ with $KQ_EXTRAS} (once)" >&2
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".${KQ_EXTRAS:+[$KQ_EXTRAS]}" \
        2> >(grep -viE 'warning|notice|editable|\*\*\*|!!|strategy|precedence|careful|^[[:space:]]*$' >&2 || true)
    touch "$stamp"
fi
PATH="$PWD/$VENV/bin:$PATH"
export PATH
