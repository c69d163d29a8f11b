"""Heat maps of attention: what they show is what the model read."""

import sys

import pytest
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForMaskedLM, AutoTokenizer

import bigbird_plus
from bigbird_plus.demo import document
from bigbird_plus.heatmap import MOST_CELLS, MOST_LABELS, layer_attention, plot_attention, pool_attention

from .peers import make_model, random_ids


@pytest.fixture(scope="module")
def model():
    return AutoModelForMaskedLM.from_pretrained(bigbird_plus.demo_checkpoint(), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bigbird_plus.demo_checkpoint())


@pytest.fixture(scope="module")
def input_ids(tokenizer):
    return tokenizer(document(), truncation=True, max_length=401, return_tensors="pt").input_ids


def random_probabilities(length):
    return torch.rand(length, length, generator=torch.Generator().manual_seed(0)).softmax(-1)


def drawn(axes):
    (image,) = axes.get_images()
    return torch.from_numpy(image.get_array().filled(0))


def labels(axis):
    return {
        int(place): text.get_text() for place, text in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    }


def test_one_layer_is_as_the_model_returns_it(model, input_ids):
    with torch.no_grad():
        every = model(input_ids, output_attentions=True).attentions
    for layer, expected in enumerate(every):
        torch.testing.assert_close(layer_attention(model, input_ids, layer), expected[0].mean(0), rtol=0, atol=0)
    assert torch.equal(layer_attention(model, input_ids, head=2), every[-1][0, 2])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("settings", [{"num_extra_global_tokens": 3}, {"is_decoder": True}, {"num_random_blocks": 0}])
@pytest.mark.parametrize("length", [40, 131])
def test_all_kinds_of_models(settings, length):
    model = make_model(**settings)
    ids = random_ids(1, length)
    expected = model(ids, output_attentions=True).attentions[0][0].mean(0)
    torch.testing.assert_close(layer_attention(model, ids, layer=0), expected[:length, :length], rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [{"layer": 4}, {"layer": -1}, {"head": 4}, {"head": -1}])
def test_no_such_layer_or_head(model, input_ids, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be between 0 and 3, but is {value}"):
        layer_attention(model, input_ids, **wrong)


def test_pooled_cells_are_means_of_sums():
    probabilities = random_probabilities(700)
    pooled = pool_attention(probabilities, 3)
    assert pooled.shape == (234, 234)
    torch.testing.assert_close(pooled.sum(1), torch.ones(234))
    torch.testing.assert_close(pooled[5, 7], probabilities[15:18, 21:24].sum(1).mean())
    torch.testing.assert_close(pooled[233, 233], probabilities[699, 699])  # the last cell has one token


def test_a_real_document_is_pooled_and_labelled(model, tokenizer):
    ids = tokenizer(document(), return_tensors="pt").input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids[0])
    probabilities = layer_attention(model, ids)
    axes = plot_attention(probabilities, tokens, ax=Figure().add_subplot())
    size = -(-len(tokens) // MOST_CELLS)
    assert size == 8
    torch.testing.assert_close(drawn(axes), pool_attention(probabilities, size))
    assert labels(axes.xaxis) == labels(axes.yaxis)
    assert MOST_LABELS / 2 < len(labels(axes.xaxis)) <= MOST_LABELS
    for place, label in labels(axes.xaxis).items():
        assert label == f"{place * size}: {tokens[place * size]}"


def test_every_token_of_a_short_text_has_its_label(tmp_path):
    tokens = ["[CLS]", "▁$x_", "$", "\\frac", "[SEP]"]
    probabilities = random_probabilities(5)
    axes = plot_attention(probabilities, tokens)
    assert torch.equal(drawn(axes), probabilities)
    assert labels(axes.xaxis) == labels(axes.yaxis) == dict(enumerate(tokens))
    axes.figure.savefig(tmp_path / "a.png")  # formulas, had they been read as such, would fail here


def test_what_is_not_read_is_left_blank():
    axes = plot_attention(torch.eye(6), list("abcdef"))
    (image,) = axes.get_images()
    colours = image.to_rgba(image.get_array())
    assert (colours[0, 1] == 1).all()
    assert (colours[0, 0] != 1).any()


@pytest.mark.parametrize(("shape", "tokens"), [((3, 3), "ab"), ((2, 3), "ab"), ((0, 0), ""), ((1, 2, 2), "ab")])
def test_tokens_must_fit(shape, tokens):
    with pytest.raises(ValueError, match=r"probabilities must have the shape \[length, length\]"):
        plot_attention(torch.ones(shape), list(tokens))


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'bigbird-plus\[plot\]'"):
        plot_attention(torch.eye(2), ["a", "b"])
