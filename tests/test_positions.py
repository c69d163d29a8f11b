"""More positions, or fewer: what short inputs get stays what it was."""

import pytest
import torch

from bigbird_plus import BigBirdConfig, BigBirdForMaskedLM, BigBirdModel

from .peers import make_pair, random_ids


@pytest.mark.parametrize("training", [False, True])
def test_tiling_keeps_the_outputs_of_short_inputs(training):
    # 1,024 tokens take the paper's plan, which is drawn for all positions that there are
    model, _ = make_pair("BigBirdForMaskedLM", max_position_embeddings=1024, block_size=32)
    model.train(training)
    ids = random_ids(1, 1024)
    with torch.no_grad():
        before = model(ids).logits
        model.resize_position_embeddings(3000)
        assert torch.equal(model(ids).logits, before)
        assert model(random_ids(1, 2900)).logits.shape == (1, 2900, 120)
    assert model.config.max_position_embeddings == 3000


def test_tiles_begin_anew():
    model, _ = make_pair(max_position_embeddings=100)
    old = model.get_position_embeddings().weight.detach().clone()
    model.resize_position_embeddings(250)
    assert torch.equal(model.get_position_embeddings().weight, torch.cat((old, old, old[:50])))


def test_interpolation_stretches():
    model, _ = make_pair(max_position_embeddings=100)
    old = model.get_position_embeddings().weight.detach().clone()
    model.resize_position_embeddings(199, method="interpolate")
    new = model.get_position_embeddings().weight
    torch.testing.assert_close(new[::2], old, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new[1::2], (old[1:] + old[:-1]) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["tile", "interpolate"])
def test_fewer_positions_are_the_first_ones(method):
    model, _ = make_pair(max_position_embeddings=100)
    old = model.get_position_embeddings().weight.detach().clone()
    model.resize_position_embeddings(60, method=method)
    assert torch.equal(model.get_position_embeddings().weight, old[:60])
    with pytest.raises(ValueError, match="61 tokens, but max_position_embeddings is 60"):
        model(random_ids(1, 61))


def test_saved_and_loaded(tmp_path):
    model, _ = make_pair("BigBirdForMaskedLM", max_position_embeddings=128)
    model.resize_position_embeddings(200)
    model.resize_position_embeddings(300)
    model.save_pretrained(tmp_path)
    again = BigBirdForMaskedLM.from_pretrained(tmp_path).eval()
    assert (again.config.max_position_embeddings, again.config.random_plan_positions) == (300, 128)
    ids = random_ids(1, 260)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_positions_still_train():
    model, _ = make_pair()
    model.resize_position_embeddings(300)
    assert isinstance(model, BigBirdModel)
    model(random_ids(1, 290)).last_hidden_state.sin().sum().backward()
    assert (model.get_position_embeddings().weight.grad[:290].abs().sum(-1) > 0).all()


@pytest.mark.parametrize(("arguments", "message"), [((0,), "new_num_position_embeddings"), ((9, "pad"), "method")])
def test_errors(arguments, message):
    model, _ = make_pair()
    with pytest.raises(ValueError, match=message):
        model.resize_position_embeddings(*arguments)


def test_tiled_positions_begin_anew_without_being_stored():
    model, _ = make_pair(max_position_embeddings=100)
    tiled = BigBirdModel(BigBirdConfig(**{**model.config.to_dict(), "tiled_positions": True})).eval()
    tiled.load_state_dict(model.state_dict())
    model.resize_position_embeddings(250)
    ids = random_ids(2, 250)
    assert torch.equal(tiled(ids).last_hidden_state, model(ids).last_hidden_state)
    assert tiled.get_position_embeddings().weight.shape[0] == 100
