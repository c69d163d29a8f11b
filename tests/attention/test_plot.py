"""`BlockPattern.plot` and the reasons for reading that it shows."""

import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from bigbird_plus.attention.pattern import KINDS_OF_READING, Sparsity

pytestmark = pytest.mark.torch_only

NONE, RANDOM, WINDOW, GLOBAL, REPEATED = range(len(KINDS_OF_READING))
SPARSITY = Sparsity(num_attention_heads=2, block_size=8)


@pytest.mark.parametrize("training", [False, True])
def test_kinds_agree_with_counts(training):
    pattern = SPARSITY.pattern(20, training=training)
    for head in range(2):
        counts, kinds = pattern.counts[head if training else 0], pattern.kinds(head)
        assert ((kinds == NONE) == (counts == 0)).all()
        assert (kinds[:, -1] == GLOBAL).all()
        assert (kinds[0] == GLOBAL).all()
        inner = np.arange(2, 18)
        assert (kinds[inner, inner + 1] == WINDOW).all()
        assert (kinds[1:-1, 0] == (GLOBAL if training else REPEATED)).all()
        assert (kinds == RANDOM).any() == training


def test_heads_differ_in_their_random_blocks():
    pattern = SPARSITY.pattern(20, training=True)
    assert (pattern.kinds(0) != pattern.kinds(1)).any()
    with pytest.raises(ValueError, match="head must be between 0 and 1, but is 2"):
        pattern.kinds(2)


def test_plot_draws_the_kinds():
    pattern = SPARSITY.pattern(20, training=True)
    axes = Figure().add_subplot()
    assert pattern.plot(axes, head=1) is axes
    (image,) = axes.get_images()
    assert (image.get_array() == pattern.kinds(1)).all()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["none", "random", "window", "global"]


def test_plot_makes_a_figure():
    assert len(SPARSITY.pattern(20).plot().get_images()) == 1


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'bigbird-plus\[plot\]'"):
        SPARSITY.pattern(20).plot()
