#!/bin/bash
# Tests the integrations against other libraries' older releases, and under DeepSpeed. Usage: tests/versions/run.sh [FOLDER...], all by default.
# Each folder beside this file has an environment of its own, .venv-versions/FOLDER, of what its pins.txt and no_deps.txt
# name. Our package is the one in this tree, as `make` has built it. The tests of a folder run in a process each, as the
# libraries change one another.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- $(cd tests/versions && dirname -- */pins.txt)

for folder in "$@"; do
    tests=tests/versions/$folder
    venv=.venv-versions/$folder
    pip="$venv/bin/pip install --quiet"
    wanted=$(cat "$tests"/*.txt)
    if [ "$wanted" != "$(cat "$venv/installed.txt" 2> /dev/null)" ]; then
        rm -rf "$venv"
        ${PYTHON:-python3} -m venv "$venv"
        # torch comes first and alone: what depends on it must find it there.
        $pip "$(grep ^torch== constraints.txt)"
        $pip -r "$tests/pins.txt"
        [ ! -e "$tests/no_deps.txt" ] || $pip --no-deps -r "$tests/no_deps.txt"
        echo "$wanted" > "$venv/installed.txt"
    fi
    for test in "$tests"/*.py; do
        echo "== $test"
        "$venv/bin/python" -m pytest -q --show-capture=no --disable-warnings "$test"
    done
done
