from diva_lab.machine import generator
from diva_lab.objectives.negatives import draw_others


def test_others_are_other_images_each_at_most_once():
    for k in (1, 2, 4, 9):
        others = draw_others(5, k, generator(k))
        assert others.shape == (5, min(k, 4))
        for i, row in enumerate(others.tolist()):
            assert len({i, *row}) == 1 + len(row) and set(row) <= set(range(5))
