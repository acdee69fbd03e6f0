"""Line charts: axes that hold the numbers, lines where they belong."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tools.drawing import LINES, MARGIN, PANEL, TOP, line_chart, round_ticks


@given(st.floats(1e-6, 1e9))
def test_ticks_are_round_and_reach_far_enough(highest):
    end, ticks = round_ticks(highest)
    assert highest <= end * (1 + 1e-9) and end <= 1.5 * highest * (1 + 1e-9) + 1e-12
    assert 2 <= len(ticks) <= 7
    assert ticks[0] == (0.0, "0") and ticks[-1][0] == 1
    step = float(ticks[1][1])
    digits = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(digits - d) for d in (1, 2, 5)) < 1e-6


def test_points_are_where_their_numbers_say():
    series = {"one": {100: (4.0, 3.0, 5.0), 200: (1.0, 1.0, 1.0)}, "two": {200: (2.0, 2.0, 2.0)}}
    picture = np.asarray(line_chart(series, "title", "step", "distance"))
    for colour, x, y in ((LINES[0], 100, 4.0), (LINES[0], 200, 1.0), (LINES[1], 200, 2.0), (LINES[0], 100, 4.8)):
        column = round(MARGIN + x / 200 * 2 * PANEL) - (2 if x == 200 else 0)
        row = round(TOP + PANEL - y / 5 * PANEL)
        assert tuple(picture[row, column]) == colour, (x, y)
