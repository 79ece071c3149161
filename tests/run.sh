#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them all.
#   bash tests/run.sh            everything
#   bash tests/run.sh --fast     without the slow ones; further arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/install.sh
install_lexmae "[all]"
if [ "${1:-}" = "--fast" ]; then
    shift
    exec .venv/bin/python -m pytest -n 2 --dist loadfile -m "not slow" "$@"
fi
.venv/bin/python -m ruff check .
[ "$#" -eq 0 ] && set -- -n 2 --dist loadfile  # two files of tests at a time
exec .venv/bin/python -m pytest "$@"
