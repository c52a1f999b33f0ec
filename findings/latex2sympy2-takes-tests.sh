#!/usr/bin/env bash
# Installing latex2sympy2 takes the name `tests` away from your project.
# Expected: a maths parser (lmms-eval depends on it) adds its own module, and `import tests.helpers` in a project finds ./tests.
# Happens: the wheel has a regular package `tests` (and `gen` and `asciimath_printer`) at the top of site-packages. A project whose tests
# folder has no __init__.py, as pytest allows, is a namespace package, and a regular package wins over it even though the project's
# folder stands first on sys.path. After the install the same import finds the parser's tests, or nothing.
# Versions: latex2sympy2 1.9.1 (--no-deps: only its files matter), Python 3.11; seen 2026-11.
# Matters: adding a public benchmark to the environment breaks test helpers that have nothing to do with it.
set -euo pipefail
PYTHON=${PYTHON:-python3}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"$PYTHON" -m venv "$tmp/venv"
pip() { "$tmp/venv/bin/pip" -q --disable-pip-version-check install "$@"; }
cd "$tmp"
mkdir -p project/tests
echo 'MINE = True' > project/tests/helpers.py
cat > run.py <<'PY'
import sys

sys.path.insert(0, "project")
try:
    import tests.helpers

    print("tests.helpers: the project's")
except ModuleNotFoundError as error:
    import tests

    print(f"{error}; tests is in {tests.__file__.split('/')[-3]}")
PY
cat > expected <<'OUT'
tests.helpers: the project's
No module named 'tests.helpers'; tests is in site-packages
OUT
venv/bin/python run.py > seen
pip --no-deps latex2sympy2==1.9.1
venv/bin/python run.py >> seen
cat seen
diff expected seen || { echo "changed: latex2sympy2 no longer installs a package named tests" >&2; exit 1; }
