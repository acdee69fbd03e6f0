"""Heads of .npy files: what numpy writes is read as numpy reads it, anything else is told."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from switchdit.data.npy_header import parse_npy_header, write_npy


def saved(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@given(
    arrays.arrays(
        st.sampled_from(["<f4", "<f2", "<f8", "<i8", "<i4", "|u1", ">f4", "|b1"]),
        arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4),
    )
)
def test_what_numpy_writes(array):
    array = np.ascontiguousarray(array).reshape(array.shape)
    content = saved(array)
    header = parse_npy_header(content)
    assert (header.dtype, header.shape, header.file_size) == (array.dtype, array.shape, len(content))
    assert content[header.offset :] == array.tobytes()


@given(
    arrays.arrays(
        st.sampled_from(["<f4", "<f2", "<i8", "|u1"]),
        arrays.array_shapes(min_dims=1, max_dims=5, min_side=0, max_side=4),
    )
)
def test_what_is_written_is_what_numpy_writes(array):
    file = io.BytesIO()
    write_npy(file, array.T)
    assert file.getvalue() == saved(np.ascontiguousarray(array.T))


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_versions(version):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.zeros((3, 2)), version=version)
    assert parse_npy_header(file.getvalue()).shape == (3, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin"),
        (saved(np.zeros(3))[:60], "does not begin"),
        (saved(np.array([{}], object), allow_pickle=True), "pickled Python objects"),
        (saved(np.zeros((2, 3)).T), "Fortran order"),
        (saved(np.zeros(3, [("a", "f4")])), "no plain numbers"),
        (saved(np.zeros(3)).replace(b"<f8", b"<q8"), "type <q8 is unknown"),
        (saved(np.zeros(3)).replace(b"v\x00", b"w\x00"), "not as long as it says"),
        (saved(np.zeros(3)).replace(b"(3,)", b"(-3,"), "does not begin"),
    ],
)
def test_what_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        parse_npy_header(content)


@given(st.data())
def test_any_damage_is_a_value_error_or_gives_plain_numbers(data):
    content = bytearray(saved(np.zeros((1, 4, 3, 3), np.float32)))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 127))] = data.draw(st.integers(0, 255))
    try:
        header = parse_npy_header(bytes(content))
    except ValueError:
        return
    assert not header.dtype.hasobject
    assert all(side >= 0 for side in header.shape)
    assert header.offset <= 128 and content[header.offset - 1] == ord("\n")


def test_huge_shapes_are_plain_arithmetic():
    huge = b"(999999999999, 999999999999), }"
    content = saved(np.zeros((1, 1))).replace(b"(1, 1), }".ljust(len(huge)), huge)
    assert parse_npy_header(content).file_size == 128 + 8 * 999999999999**2
