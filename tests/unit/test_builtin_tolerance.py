"""The checker's tolerances are written down in pictures; these are their two sides."""

import pytest

from deployments.builtin.tolerance_sheet import BORDERS, Border, judged


@pytest.mark.parametrize("border", BORDERS, ids=lambda border: border.what)
def test_each_bound_lies_where_the_sheet_says(border: Border):
    assert judged(border, border.accepted).all_right
    refused = judged(border, border.refused).attributes
    # Only what the border is about is wrong.
    assert list(refused.values()).count(False) == 1
