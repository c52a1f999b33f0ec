#!/usr/bin/env bash
# CIDEr of a word-for-word right answer is 2.5, 5.0, 7.5 or 10.0, by how many words it has.
# Expected: a caption that equals its only reference gets the full score, which is 10 here.
# Happens: the score is the mean over 1- to 4-grams times 10, and a caption of one word has no 2-, 3- or 4-grams: each missing length
# counts as 0 of 2.5. "yes" for "yes" is 2.5, "a dog" for "a dog" is 5.0. BLEU-1 and ROUGE-L of the same pairs are 1.0.
# Versions: pycocoevalcap 1.2 (which lmms-eval uses for its caption tasks), numpy 2.4.6; seen 2026-11. No Java needed for this part.
# Matters: on sets with short references the ceiling is below 10, so "percent of the uncompressed model" and "percent of the maximum" are
# two different things, and a mean over short and long references is led by the long ones.
set -euo pipefail
PYTHON=${PYTHON:-python3}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"$PYTHON" -m venv "$tmp/venv"
pip() { "$tmp/venv/bin/pip" -q --disable-pip-version-check install "$@"; }
pip numpy==2.4.6
pip --no-deps pycocoevalcap==1.2
cd "$tmp"
cat > run.py <<'PY'
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

captions = ["yes", "a dog", "two red cars", "he rides a horse", "some people eat lunch outside today"]
pairs = {i: [caption] for i, caption in enumerate(captions)}
cider = Cider().compute_score(pairs, pairs)[1]
bleu = Bleu(1).compute_score(pairs, pairs, verbose=0)[1][0]
rouge = Rouge().compute_score(pairs, pairs)[1]
for i, caption in enumerate(captions):
    print(f"{caption!r}: CIDEr {cider[i]:.1f}, BLEU-1 {bleu[i]:.1f}, ROUGE-L {rouge[i]:.1f}")
PY
cat > expected <<'OUT'
'yes': CIDEr 2.5, BLEU-1 1.0, ROUGE-L 1.0
'a dog': CIDEr 5.0, BLEU-1 1.0, ROUGE-L 1.0
'two red cars': CIDEr 7.5, BLEU-1 1.0, ROUGE-L 1.0
'he rides a horse': CIDEr 10.0, BLEU-1 1.0, ROUGE-L 1.0
'some people eat lunch outside today': CIDEr 10.0, BLEU-1 1.0, ROUGE-L 1.0
OUT
venv/bin/python run.py > seen 2> log || { cat log >&2; exit 1; }
cat seen
diff expected seen || { echo "changed: pycocoevalcap scores short captions in another way now" >&2; exit 1; }
