"""Pictures and grids, without a run."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from switchdit.engine.generate import balanced_labels, class_rows, image_grid
from switchdit.engine.monitors import routing_picture
from switchdit.moe.diffusion_prior import prior_mask


def test_a_map_that_equals_its_prior_looks_the_same_on_both_sides_whatever_the_order_of_its_columns():
    prior = prior_mask(6, 4, 3).numpy()
    assignment = np.random.default_rng(0).permutation(24)
    picture = routing_picture(prior[:, assignment], prior, assignment)
    width = (picture.shape[1] - 20) // 2
    assert picture.dtype == np.uint8
    assert np.array_equal(picture[:, :width], picture[:, -width:])
    assert len(np.unique(picture[:, :width].reshape(-1, 3), axis=0)) == 2
    other = routing_picture(1 - prior[:, assignment], prior, assignment)
    assert not np.array_equal(other[:, :width], other[:, -width:])


@given(st.integers(1, 500), st.integers(1, 20))
def test_labels_are_balanced(num_images, num_classes):
    labels = balanced_labels(num_images, num_classes)
    counts = np.bincount(labels, minlength=num_classes)
    assert counts.max() - counts.min() <= 1


def test_grid_has_a_row_for_each_class():
    labels = balanced_labels(23, 4)
    images = np.broadcast_to((60 * labels)[:, None, None, None], (23, 5, 5, 3)).astype(np.uint8)
    chosen, columns = class_rows(labels, max_rows=3, columns=9)
    picture = image_grid(images[chosen], columns)
    assert picture.shape == (3 * 7 + 2, 6 * 7 + 2, 3)  # these classes have six images each
    for row in range(3):
        for column in range(6):
            assert (picture[2 + 7 * row : 7 + 7 * row, 2 + 7 * column : 7 + 7 * column] == 60 * row).all()
    assert image_grid(images[:1], columns=1).shape == (9, 9, 3)
