"""The groups of pairs whose log-probs are computed: whole ones as training makes them, the rest behind."""

from __future__ import annotations

import numpy as np

from megadpo.setup.reference_cache import missing_groups


def test_whole_groups_stay_as_training_makes_them_and_the_rest_comes_behind() -> None:
    order, known, first = np.array([5, 3, 0, 7, 6, 1, 2, 4]), np.zeros(8, np.bool_), np.ones(8, np.bool_)

    def groups() -> list[list[int]]:
        return [list(group) for group in missing_groups(order, known, first, 3)]

    assert groups() == [[5, 3, 0], [7, 6, 1], [2, 4]]
    known[[3, 1, 6]] = True
    assert groups() == [[2, 4], [5, 0, 7]]
    # 6 is the pair 3 again, 2 and 4 are 0 and 1: after a kill the second group is what it would have been.
    known[:], first[[6, 2, 4]] = False, False
    assert groups() == [[5, 3, 0], [7, 6, 1]]
    known[[5, 3, 0, 6, 2]] = True
    assert groups() == [[7, 6, 1]]
    known[:] = True
    assert groups() == []
