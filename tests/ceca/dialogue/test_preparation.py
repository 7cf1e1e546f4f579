"""What is prepared of an image: its place in prompts, and its way to the engine. tests/drills/test_vllm.py runs it."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ceca.dialogue.preparation import Prepared, _reduce

ids = st.lists(st.integers(0, 9), max_size=8)


@given(ids, ids, st.lists(st.integers(10, 19), min_size=1, max_size=3), st.lists(st.integers(20, 29), max_size=9))
def test_an_image_is_expanded_where_the_first_prompt_had_it(before, after, mark, tokens):
    place = SimpleNamespace(offset=len(before), length=len(tokens))
    prepared = Prepared(None, place, [*before, *tokens], mark)
    assert prepared.expand([*before, *mark, *after]) == [*before, *tokens, *after]


@pytest.mark.parametrize("mark", [None, [7]])
def test_a_prompt_with_the_image_elsewhere_is_prepared_anew(mark):
    prepared = Prepared(None, SimpleNamespace(offset=1, length=2), [0, 5, 5], mark)
    assert prepared.expand([0, 0, 7]) is None
    assert prepared.expand([]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(2, 3), (), (0, 4)])
def test_tensors_are_the_same_in_another_process(dtype, shape):
    tensor = torch.arange(6).reshape(3, 2).T.to(dtype) if shape == (2, 3) else torch.ones(shape, dtype=dtype)
    rebuild, parts = pickle.loads(pickle.dumps(_reduce(tensor)))
    found = rebuild(*parts)
    assert found.dtype == dtype
    assert found.shape == tensor.shape
    assert torch.equal(found, tensor)
