"""The random blocks: those that transformers' own BigBird draws, without touching anybody's generator."""

import threading

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

from bigbird_plus import Sparsity
from bigbird_plus.attention.random_blocks import (
    NO_BLOCK,
    draw_random_blocks,
    draw_uniform_blocks,
    read_random_blocks,
    write_random_blocks,
)

PAPER_LENGTHS = [1024, 3072, 4096]


def draw(length, *, heads=2, block_size=64, r=3, max_positions=4096, layer_idx=0):
    return draw_random_blocks(
        num_heads=heads,
        num_blocks=length // block_size,
        block_size=block_size,
        num_random_blocks=r,
        max_position_embeddings=max_positions,
        layer_idx=layer_idx,
    )


def draw_as_transformers_does(length, *, heads=2, block_size=64, r=3, max_positions=4096, layer_idx=0):
    """What its layer draws in training for an input of so many tokens, rows 1 to m - 2: `[heads, m - 2, r]`."""
    config = transformers.BigBirdConfig(
        hidden_size=heads, num_attention_heads=heads, block_size=block_size, num_random_blocks=r,
        max_position_embeddings=max_positions,
    )  # fmt: skip
    layer = BigBirdBlockSparseAttention(config, seed=layer_idx).train()
    state = np.random.get_state()  # noqa: NPY002 (the generator that it uses)
    try:
        np.random.seed(layer_idx)  # noqa: NPY002
        if length in PAPER_LENGTHS:
            sizes = (max_positions, max_positions, block_size, block_size, r)
            plans = [layer._bigbird_block_rand_mask(*sizes, last_idx=1024) for _ in range(heads)]
            return np.stack(plans)[:, : length // block_size - 2]
        plan_lengths, plan_counts = layer._get_rand_attn_plan(length, block_size, r)
        sizes = (length, length, block_size, block_size)
        return np.stack(layer._bigbird_block_rand_mask_with_head(*sizes, heads, plan_lengths, plan_counts))
    finally:
        np.random.set_state(state)  # noqa: NPY002


@pytest.mark.parametrize("length", [*PAPER_LENGTHS, 768, 832, 1088, 2048, 3008])
@pytest.mark.parametrize("layer_idx", [0, 5])
def test_base_size(length, layer_idx):
    ours = draw(length, heads=12, layer_idx=layer_idx)
    theirs = draw_as_transformers_does(length, heads=12, layer_idx=layer_idx)
    np.testing.assert_array_equal(ours[:, 1:-1], theirs)
    assert (ours[:, [0, -1]] == NO_BLOCK).all()


@given(
    block_size=st.sampled_from([8, 16, 32, 64, 128]),
    r=st.integers(1, 4),
    heads=st.integers(1, 3),
    layer_idx=st.integers(0, 30),
    length=st.sampled_from(PAPER_LENGTHS),
    max_positions=st.sampled_from([1024, 2048, 3072, 4096, 8192]),
)
@settings(max_examples=40)
def test_plan_of_the_paper(block_size, r, heads, layer_idx, length, max_positions):
    assume(length <= max_positions)
    arguments = {"heads": heads, "block_size": block_size, "r": r, "max_positions": max_positions}
    try:
        theirs = draw_as_transformers_does(length, layer_idx=layer_idx, **arguments)
    except ValueError:  # fewer candidates than it wants
        assume(False)
    np.testing.assert_array_equal(draw(length, layer_idx=layer_idx, **arguments)[:, 1:-1], theirs)


@given(
    block_size=st.sampled_from([4, 8, 16, 64]),
    r=st.integers(1, 5),
    heads=st.integers(1, 3),
    layer_idx=st.integers(0, 30),
    extra_blocks=st.integers(1, 40),
)
@example(block_size=64, r=3, heads=2, layer_idx=0, extra_blocks=1)
@settings(max_examples=60)
def test_two_stage_plan(block_size, r, heads, layer_idx, extra_blocks):
    length = (2 * r + 5 + extra_blocks) * block_size
    assume(length not in PAPER_LENGTHS)
    arguments = {"heads": heads, "block_size": block_size, "r": r, "layer_idx": layer_idx}
    try:
        theirs = draw_as_transformers_does(length, **arguments)
    except ValueError:  # fewer candidates than it wants
        assume(False)
    np.testing.assert_array_equal(draw(length, **arguments)[:, 1:-1], theirs)


@pytest.mark.parametrize("length", [1024, 1088, 4096])
def test_no_random_blocks(length):
    assert draw(length, r=0).shape == (2, length // 64, 0)


def test_fewer_candidates_than_wanted_are_all_taken():
    """With blocks of 256 tokens row 1 can draw from the first 1,024 only block 3: transformers raises."""
    with pytest.raises(ValueError, match="broadcast"):
        draw_as_transformers_does(4096, block_size=256, r=3)
    plan = draw(4096, block_size=256, r=3)
    assert plan[:, 1].tolist() == [[3, NO_BLOCK, NO_BLOCK]] * 2
    assert [sorted(blocks) for blocks in plan[:, 14].tolist()] == [[1, 2, 3]] * 2


def test_only_blocks_of_the_input_are_drawn():
    plan = draw(1024, block_size=512, r=1, max_positions=4096, heads=20)
    assert (plan < 2).all()


@given(
    num_blocks=st.integers(8, 24), r=st.integers(0, 6), heads=st.integers(1, 3), half_window=st.integers(0, 2),
    layer_idx=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=30)
def test_uniform_plan(num_blocks, r, heads, half_window, layer_idx):
    block = np.arange(num_blocks)
    eligible = abs(block[:, None] - block) > half_window
    eligible[0] = False
    plan = draw_uniform_blocks(num_heads=heads, num_random_blocks=r, layer_idx=layer_idx, eligible=eligible)
    assert plan.shape == (heads, num_blocks, r)
    for head, row in np.ndindex(heads, num_blocks):
        taken = plan[head, row][plan[head, row] != NO_BLOCK]
        assert len(set(taken)) == len(taken) == min(r, eligible[row].sum())
        assert eligible[row, taken].all()


def test_uniform_plan_is_uniform():
    eligible = np.ones((40, 40), dtype=bool)
    plan = draw_uniform_blocks(num_heads=50, num_random_blocks=4, layer_idx=0, eligible=eligible)
    drawn = np.bincount(plan.flatten(), minlength=40)
    expected = plan.size / 40  # 200, with a standard deviation of about 14
    assert abs(drawn - expected).max() < 5 * expected**0.5


def test_global_generators_are_untouched():
    numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    draw(1024)
    draw(1088)
    draw_uniform_blocks(num_heads=2, num_random_blocks=2, layer_idx=0, eligible=np.ones((9, 9), dtype=bool))
    for before, after in zip(numpy_state, np.random.get_state(), strict=True):  # noqa: NPY002
        np.testing.assert_array_equal(before, after)
    assert torch.equal(torch_state, torch.get_rng_state())


def test_threads_draw_the_same():
    expected, drawn = draw(1088, heads=8), []
    threads = [threading.Thread(target=lambda: drawn.append(draw(1088, heads=8))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(drawn) == 16
    assert all((plan == expected).all() for plan in drawn)


# -------------------------------------------------------------------------------------------------------------------
# Those of a configuration
# -------------------------------------------------------------------------------------------------------------------


def test_written_and_read_again():
    reads = np.random.RandomState(0).rand(2, 9, 9) < 0.2
    text = write_random_blocks(reads)
    plan = read_random_blocks(text, 2, 9)
    assert plan.shape == (2, 9, 9)
    for head, row in np.ndindex(2, 9):
        assert [block for block in plan[head, row] if block != NO_BLOCK] == np.flatnonzero(reads[head, row]).tolist()


def test_longer_inputs_repeat_them_and_shorter_ones_cut_them():
    sparsity = Sparsity(2, global_block_indices=[0, 7], num_random_blocks=2, random_blocks=",,0,1 3;,3,,")
    blocks = sparsity.pattern(10).random_blocks
    drawn = [[block for block in row if block != NO_BLOCK] for row in blocks[0].tolist()]
    assert drawn == [[], [], [], [1], [], [], [4], [5], [], []]  # 0 and 7 are global, 3 is in the window
    assert blocks[1, :, 0].tolist() == [-1, 3, -1, -1, -1, -1, -1, -1, -1, -1]  # there is no block 11
    assert sparsity.pattern(3).random_blocks.max() == NO_BLOCK
    assert sparsity.pattern(10).counts.max() == 1


def test_what_they_read_in_full_in_any_case():
    blocks = {"num_random_blocks": 1, "random_blocks": ",,,,", "different_layout_per_head": False}
    assert Sparsity(2, num_sliding_window_blocks=5, **blocks).full_attention_length == 3 * 64
    assert Sparsity(2, num_global_blocks=4, **blocks).full_attention_length == 4 * 64
    assert Sparsity(2, global_block_indices=[1, 3, 5], **blocks).full_attention_length == 2 * 64


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [{}, {"global_block_indices": [0, 1]}])
def test_all_layers_read_them_in_training_and_in_evaluation(shape, training):
    sparsity = Sparsity(1, num_random_blocks=1, random_blocks=",,,,,2,,", **shape)
    pattern = sparsity.pattern(8, training=training)
    assert sparsity.pattern(8, layer_idx=3, training=training) is pattern
    assert (pattern.first_block_extra, pattern.counts[0, 5, 2]) == (0, 1)


@pytest.mark.parametrize(
    "blocks", ["", "0", "0,1;1,0,", "0,1;1 0,0", "0,2;,", "0,-1;,", "0,a;,", "0 1.5;0", ";;", ["0,1", "1,0"], 3]
)
def test_what_names_no_blocks(blocks):
    with pytest.raises(ValueError, match="random_blocks must"):
        Sparsity(2, num_random_blocks=1, random_blocks=blocks)
