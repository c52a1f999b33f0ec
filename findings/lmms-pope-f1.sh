#!/usr/bin/env bash
# lmms-eval's POPE: six right answers, one of them scored as right, and precision, recall and F1 are 1.0.
# Expected: an answer that is not scored right lowers recall or precision as well as accuracy, and yes_ratio is the share of "yes" among
# the model's answers (POPE's measure of a model's bias).
# Happens: an answer counts only if it is the bare word. "Yes." or "No, there is not." is wrong for the accuracy and does not exist for
# precision, recall and F1, where it is neither a false negative nor a false positive. yes_ratio counts the gold answers, so it is 0.5 on
# balanced questions whatever a model says. The prompt asks for "a single word or phrase", so a full stop is a valid answer.
# Versions: lmms_eval 0.7.3; seen 2026-11. Only the task's own file is run: nothing else need be installed.
# Matters: a compressed model that starts to answer in sentences loses accuracy and keeps, or even gains, F1.
set -euo pipefail
PYTHON=${PYTHON:-python3}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"$PYTHON" -m venv "$tmp/venv"
pip() { "$tmp/venv/bin/pip" -q --disable-pip-version-check install "$@"; }
pip --no-deps lmms_eval==0.7.3
cd "$tmp"
cat > run.py <<'PY'
import importlib.util
import sysconfig

path = sysconfig.get_path("purelib") + "/lmms_eval/tasks/pope/utils.py"
spec = importlib.util.spec_from_file_location("pope", path)
pope = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pope)
GOLD = ["yes", "yes", "yes", "no", "no", "no"]


def scores(answers):
    rows = [pope.pope_process_results({"question_id": i, "answer": g}, [a]) for i, (g, a) in enumerate(zip(GOLD, answers))]
    for name in ("accuracy", "precision", "recall", "f1_score", "yes_ratio"):
        value = getattr(pope, f"pope_aggregate_{name}")([row[f"pope_{name}"] for row in rows])
        yield f"{name} {value:.3f}"


for name, answers in {
    "bare words, all right": GOLD,
    "all right, one of them bare": ["yes", "Yes.", "Yes, there is.", "No.", "No.", "No, there is not."],
    "yes to everything": ["yes"] * 6,
}.items():
    print(f"{name}: {', '.join(scores(answers))}")
PY
cat > expected <<'OUT'
bare words, all right: accuracy 1.000, precision 1.000, recall 1.000, f1_score 1.000, yes_ratio 0.500
all right, one of them bare: accuracy 0.167, precision 1.000, recall 1.000, f1_score 1.000, yes_ratio 0.500
yes to everything: accuracy 0.500, precision 0.500, recall 1.000, f1_score 0.667, yes_ratio 0.500
OUT
venv/bin/python run.py > seen 2> log || { cat log >&2; exit 1; }
cat seen
diff expected seen || { echo "changed: lmms-eval scores POPE in another way now" >&2; exit 1; }
