"""The benchmark's own font: capital letters and digits on 5 x 7 cells."""

from __future__ import annotations

import numpy as np

from ..scenes import DIGITS

COLUMNS, ROWS = 5, 7  # cells of a glyph; one more column lies between two glyphs
_LETTERS = """
A .###. #...# #...# ##### #...# #...# #...#
B ####. #...# #...# ####. #...# #...# ####.
C .#### #.... #.... #.... #.... #.... .####
D ####. #...# #...# #...# #...# #...# ####.
E ##### #.... #.... ####. #.... #.... #####
F ##### #.... #.... ####. #.... #.... #....
G .#### #.... #.... #..## #...# #...# .####
H #...# #...# #...# ##### #...# #...# #...#
I .###. ..#.. ..#.. ..#.. ..#.. ..#.. .###.
J ..### ...#. ...#. ...#. ...#. #..#. .##..
K #...# #..#. #.#.. ##... #.#.. #..#. #...#
L #.... #.... #.... #.... #.... #.... #####
M #...# ##.## #.#.# #.#.# #...# #...# #...#
N #...# ##..# ##..# #.#.# #..## #..## #...#
O .###. #...# #...# #...# #...# #...# .###.
P ####. #...# #...# ####. #.... #.... #....
R ####. #...# #...# ####. #.#.. #..#. #...#
S .#### #.... #.... .###. ....# ....# ####.
T ##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..
U #...# #...# #...# #...# #...# #...# .###.
V #...# #...# #...# #...# .#.#. .#.#. ..#..
W #...# #...# #...# #.#.# #.#.# ##.## #...#
X #...# #...# .#.#. ..#.. .#.#. #...# #...#
Y #...# #...# .#.#. ..#.. ..#.. ..#.. ..#..
Z ##### ....# ...#. ..#.. .#... #.... #####
"""


def _glyphs() -> dict[str, np.ndarray]:
    """bool (ROWS, COLUMNS) of every character."""
    out = {str(value): np.array([[row >> (4 - c) & 1 for c in range(COLUMNS)] for row in rows], bool) for value, rows in enumerate(DIGITS)}
    for line in _LETTERS.strip().splitlines():
        letter, *rows = line.split()
        out[letter] = np.array([[cell == "#" for cell in row] for row in rows])
    return out


GLYPHS = _glyphs()


def bitmap(text: str) -> np.ndarray:
    """A line of text in capitals as bool (ROWS, 6 n - 1). Raises KeyError for a character without a glyph."""
    gap = np.zeros((ROWS, 1), bool)
    return np.concatenate([part for c in text.upper() for part in (GLYPHS[c], gap)][:-1], axis=1)


def text_width(text: str) -> int:
    """Columns of cells that a line of text takes."""
    return 6 * len(text) - 1
