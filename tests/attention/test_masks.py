"""Masks of full attention: what users pass becomes what attention functions add."""

import pytest
import torch

from bigbird_plus.attention import common, masks

MIN = torch.finfo(torch.float32).min


def full_mask(*args, **kwargs):
    return make_mask(*args, **kwargs).added


def make_mask(attention_mask, *, batch=2, queries=4, past=0, keys=None, causal=False, implementation="sdpa"):
    return masks.full_attention_mask(
        attention_mask,
        masks.ScoreShape(batch, 3, queries, past + queries if keys is None else keys),
        query_positions=torch.arange(past, past + queries),
        past=past,
        is_causal=causal,
        dtype=torch.float32,
        implementation=implementation,
    )


def test_padding_mask():
    mask = masks.padding_mask(torch.tensor([[1, 1, 0]]), 1, 3)
    assert mask.tolist() == [[True, True, False]]
    assert masks.padding_mask(None, 1, 3) is None
    assert masks.padding_mask(torch.ones(2, 3), 2, 3) is None


@pytest.mark.parametrize("shape", [(2, 3), (1, 4), (1, 3, 3), (3,)])
def test_padding_mask_of_a_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"attention_mask.*\[1, 3\]"):
        masks.padding_mask(torch.ones(shape), 1, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_additive_masks_are_finite(dtype):
    added = common.additive_mask(torch.tensor([True, False]), dtype)
    assert added.tolist() == [0, torch.finfo(dtype).min]
    assert added.dtype is dtype


def test_nothing_is_added_where_all_is_read():
    assert full_mask(None) is None
    assert full_mask(torch.ones(2, 4)) is None
    assert full_mask(None, causal=True) is None  # the attention function is causal itself
    assert full_mask(None, queries=1, past=5, causal=True) is None


def test_two_dimensions():
    added = full_mask(torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]))
    expected = [[0, 0, 0, MIN], [MIN, 0, 0, 0]]
    assert added.expand(2, 1, 4, 4)[:, 0, 2].tolist() == expected


def test_causality_and_padding_together():
    added = full_mask(torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), causal=True)
    readable = (added == 0).expand(2, 1, 4, 4)[:, 0].int().tolist()
    assert readable[0] == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    assert readable[1] == torch.ones(4, 4).tril().tolist()


@pytest.mark.parametrize("implementation", ["eager", "flex_attention", "my_attention"])
def test_other_attention_than_sdpa_is_told_of_causality(implementation):
    added = full_mask(None, causal=True, implementation=implementation)
    assert (added == 0)[0, 0].int().tolist() == torch.ones(4, 4).tril().tolist()


def test_free_places_of_a_static_cache_are_not_read():
    added = full_mask(torch.ones(2, 5), queries=2, past=3, keys=8, causal=True)
    assert (added == 0).expand(2, 1, 2, 8)[0, 0].int().tolist() == [[1] * 4 + [0] * 4, [1] * 5 + [0] * 3]


def test_three_dimensions():
    mask = torch.randint(0, 2, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    assert ((full_mask(mask) == 0)[:, 0] == (mask != 0)).all()
    causal = full_mask(mask, causal=True)
    assert ((causal == 0)[:, 0] == (mask != 0) & torch.ones(4, 4).tril().bool()).all()


def test_four_dimensions_of_truth_values():
    mask = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    assert ((full_mask(mask) == 0) == mask).all()
    assert ((full_mask(mask.long(), causal=True) == 0) == mask).all()  # such a mask says itself what is causal


def test_four_dimensions_of_numbers_are_added_as_they_are():
    mask = torch.tensor([0.0, -1.5, float("-inf"), MIN]).expand(1, 1, 4, 4)
    assert full_mask(mask)[0, 0, 0].tolist() == [0.0, -1.5, MIN, MIN]


@pytest.mark.parametrize(
    "shape",
    [
        (2, 5),
        (3, 4),
        (4,),
        (2, 3, 4),
        (2, 1, 3, 4),
        (3, 1, 4, 4),
        (2, 4, 4, 4),
        (2, 3, 4, 5),
        (2, 4, 3),
        (1, 1, 1, 1, 1),
    ],
)
def test_wrong_shapes_are_named(shape):
    with pytest.raises(ValueError, match="attention_mask") as error:
        full_mask(torch.zeros(shape, dtype=torch.long))
    assert str(list(shape)) in str(error.value)


def test_flash_attention_gets_two_dimensions():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert full_mask(mask, implementation="flash_attention_2").tolist() == (mask != 0).tolist()
    with pytest.raises(ValueError, match="flash attention"):
        full_mask(torch.ones(2, 1, 4, 4), implementation="flash_attention_2")


@pytest.mark.parametrize("implementation", ["flex_attention", "my_attention"])
def test_other_attention_than_sdpa_gets_all_pairs(implementation):
    mask = torch.tensor([[1, 1, 1, 0]])
    assert full_mask(mask, batch=1, implementation=implementation).shape == (1, 1, 4, 4)
    assert full_mask(mask[:, None, None].bool(), implementation=implementation).shape == (2, 1, 4, 4)
    assert full_mask(None, causal=True, implementation=implementation).shape == (2, 1, 4, 4)
    with pytest.raises(ValueError, match=rf"for each head.*sdpa.*{implementation}"):
        full_mask(torch.ones(2, 3, 4, 4).bool(), implementation=implementation)


def test_mask_of_an_encoder():
    def cross(mask):
        shape = masks.ScoreShape(batch=2, heads=3, queries=3, keys=4)
        return masks.cross_attention_mask(mask, shape, dtype=torch.float32, implementation="sdpa").added

    assert cross(None) is None
    assert cross(torch.ones(2, 4)) is None
    added = cross(torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])).expand(2, 1, 3, 4)
    assert added[0, 0].tolist() == [[0, 0, 0, MIN]] * 3
    assert cross(torch.tensor([0.0, -1.5, 0.0, float("-inf")]).expand(2, 1, 3, 4))[0, 0, 0].tolist() == [
        0,
        -1.5,
        0,
        MIN,
    ]
    for shape in [(2, 5), (2, 3, 5), (2, 2, 3, 4)]:
        with pytest.raises(ValueError, match="encoder_attention_mask"):
            cross(torch.zeros(shape))
