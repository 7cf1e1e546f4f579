"""Keys of images as numbers."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ceca.data import keys
from ceca.data.keys import Positions, numbers, spelled
from tests.ceca.data.dataset import IDS


def test_a_key_is_the_number_that_its_digits_spell():
    assert numbers(IDS).tolist() == [int(one, 16) for one in IDS]
    assert spelled(numbers(IDS)) == IDS
    assert spelled(numbers(["00000000000000ff"])) == ["00000000000000ff"]


def test_a_slice_and_pieces_of_a_column_give_the_same_numbers():
    column = pa.chunked_array([IDS[:5], [], IDS[5:]])
    assert numbers(column).tolist() == numbers(IDS).tolist()
    assert numbers(column[3:7]).tolist() == numbers(IDS[3:7]).tolist()
    assert numbers(pa.array(IDS)[4:6]).tolist() == numbers(IDS[4:6]).tolist()
    assert numbers([]).tolist() == []


@pytest.mark.parametrize("wrong", ["abc", "", "g" * 16, "A" * 16, "é" * 8, None])
def test_what_is_no_key_is_an_error(wrong):
    with pytest.raises(ValueError, match="16 hex digits"):
        numbers(pa.array([IDS[0], wrong]))


@given(st.lists(st.integers(0, 30)), st.lists(st.integers(0, 40)), st.sampled_from([1, 3, 2**18]))
def test_a_key_is_found_at_its_last_position(there, wanted, at_once):
    expected = {key: position for position, key in enumerate(there)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "AT_ONCE", at_once)
        found = Positions(np.array(there, np.uint64)).find(np.array(wanted, np.uint64))
    assert found.tolist() == [expected.get(key, -1) for key in wanted]


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3)))
def test_keys_are_given_once_and_sorted(there):
    assert Positions(np.array(there, np.uint64)).unique().tolist() == sorted(set(there))
