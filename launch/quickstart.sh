#!/usr/bin/env bash
# The whole cycle in minutes on a CPU: text, shards, LexMAE pre-training, two stages of fine-tuning, search, a table.
#   bash launch/quickstart.sh            on the docstrings of the installed packages
#   bash launch/quickstart.sh FOLDER     on a folder in BEIR or MS MARCO layout, with train and dev judgements
# Everything lands in runs/; a second call goes on where the first one stopped.
set -euo pipefail
[ "$#" -le 1 ] || { echo "usage: bash launch/quickstart.sh [FOLDER]" >&2; exit 2; }
if [ "$#" -eq 1 ]; then
    [ -d "$1" ] || { echo "error: $1: no such folder" >&2; exit 2; }
    input="$(cd "$1" && pwd)"
fi
quoted() { # as YAML reads a text, whatever is in it
    local mark="'"
    printf '%s' "$mark${1//$mark/$mark$mark}$mark"
}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/install.sh
install_lexmae ""
if [ "$#" -eq 1 ]; then
    exec .venv/bin/python launch/pipeline.py recipes/toy \
        --set "input=$(quoted "$input")" "work=$(quoted "runs/toy-$(basename "$input")")"
fi
exec .venv/bin/python launch/pipeline.py recipes/toy
