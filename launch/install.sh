# Makes .venv with what lexmae needs; sourced by quickstart.sh and tests/run.sh, from the root of the project.
# usage: install_lexmae EXTRAS   (for example "" or "[dev,anserini]"); a second call installs nothing.
install_lexmae() {
    local extras="$1" stamp wanted python="${PYTHON:-python3}"
    if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; then
        echo "error: Python 3.11, 3.12 or 3.13 is needed; name one with PYTHON=/path/to/python3" >&2
        return 2
    fi
    if [ ! -x .venv/bin/python ]; then
        echo "making .venv with $("$python" --version)" >&2
        "$python" -m venv .venv || return 1
    fi
    wanted="$(cat setup.py constraints.txt | cksum)"
    stamp=".venv/installed-$(echo "$extras" | tr -dc 'a-z0-9-')"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return 0
    fi
    echo "installing lexmae$extras into .venv (a few minutes the first time)" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
        setuptools wheel || return 1
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
        --editable ".$extras" || return 1
    echo "$wanted" > "$stamp"
}
