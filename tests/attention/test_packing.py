"""Packed batches: the same outputs at lower cost, and documents read as they are alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbird_plus import BigBirdConfig
from bigbird_plus.attention.parts import Tokens
from bigbird_plus.attention.plan import make_plan

from ..peers import make_pair, random_ids

pytestmark = pytest.mark.torch_only


def mask_of(lengths, total, side):
    """`[batch, total]`, with real tokens at the left or the right, or with holes among them."""
    mask = torch.zeros(len(lengths), total, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if side == "right" else slice(total - length, total)] = 1
    if side == "holes":
        mask *= (torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) > 0.3).long()
    return mask


def unpacked(model, *args, **kwargs):
    return model(*args, computes_padding=True, **kwargs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize(("attention_type", "total"), [("block_sparse", 203), ("original_full", 60)])
def test_packing_changes_no_output_and_no_gradient(attention_type, total, side, training):
    model, _ = make_pair(attention_type=attention_type, eval_random_blocks=True)
    model.train(training)
    model.freeze_pooler()  # else it wants the state of the first place, even of padding
    ids, mask = random_ids(4, total), mask_of([total, total // 2, 30, 0], total, side)
    results = []
    for run in (model, lambda *args, **kwargs: unpacked(model, *args, **kwargs)):
        model.zero_grad()
        output = run(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
        (output.last_hidden_state * mask[..., None]).sin().sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((output, grads))
    (packed, packed_grads), (padded, padded_grads) = results
    real = mask.bool()
    assert (packed.last_hidden_state[~real] == 0).all()
    for ours, theirs in zip(packed.hidden_states, padded.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(packed.attentions, padded.attentions, strict=True):
        ours, theirs = (probabilities.transpose(1, 2)[real] for probabilities in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for name, grad in padded_grads.items():
        assert (packed_grads[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-4, name


def test_padding_is_not_embedded_unless_a_hook_watches():
    model, _ = make_pair()
    model.freeze_pooler()
    ids, mask = random_ids(3, 203), mask_of([203, 90, 20], 203, "right")
    tokens = []
    embed = torch.nn.functional.embedding
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional, "embedding", lambda ids, *rest: tokens.append(ids.numel()) or embed(ids, *rest)
        )
        packed = model(ids, attention_mask=mask).last_hidden_state
        assert max(tokens) < ids.numel()
        shapes = []
        model.embeddings.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
        assert torch.equal(model(ids, attention_mask=mask).last_hidden_state, packed)
    assert shapes == [(3, 203, model.config.hidden_size)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_pattern_per_document_gives_each_document_its_own_outputs(implementation, side, training):
    model, _ = make_pair(pattern_per_document=True)
    model.set_attn_implementation(implementation)
    model.train(training)
    lengths = [200, 130, 89, 88, 7]
    ids, mask = random_ids(5, 200), mask_of(lengths, 200, side)
    with torch.no_grad():
        together = model(ids, attention_mask=mask)
        for row, length in enumerate(lengths):
            alone = model(ids[row][mask[row].bool()][None])
            actual = together.last_hidden_state[row][mask[row].bool()]
            torch.testing.assert_close(actual, alone.last_hidden_state[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(together.pooler_output[row], alone.pooler_output[0], rtol=1e-5, atol=1e-5)
            assert alone.last_hidden_state.shape[1] == length


@pytest.mark.parametrize("name", ["BigBirdForSequenceClassification", "BigBirdForQuestionAnswering"])
def test_heads_find_the_first_token_of_each_document(name):
    model, _ = make_pair(name, pattern_per_document=True)
    ids, mask = random_ids(2, 200), mask_of([200, 120], 200, "left")
    ids[ids == 66] = 65
    ids[:, 150] = 66  # [SEP]
    positions = (
        {}
        if "Sequence" in name
        else {"start_positions": torch.tensor([160, 170]), "end_positions": torch.tensor([165, 171])}
    )
    with torch.no_grad():
        together = model(ids, attention_mask=mask, **positions)
        alone = model(ids[1:, 80:], **{key: value[1:] - 80 for key, value in positions.items()})
        first_alone = model(ids[:1], **{key: value[:1] for key, value in positions.items()})
    if positions:
        torch.testing.assert_close(together.start_logits[1, 80:], alone.start_logits[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.loss, (alone.loss + first_alone.loss) / 2, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(together.logits[1], alone.logits[0], rtol=1e-5, atol=1e-5)


def test_a_document_longer_than_the_positions_may_be_padded_further():
    model, _ = make_pair(pattern_per_document=True, max_position_embeddings=128)
    ids, mask = random_ids(1, 200), mask_of([100], 200, "left")
    with torch.no_grad():
        assert model(ids, attention_mask=mask).last_hidden_state.shape == (1, 200, 32)
    with pytest.raises(ValueError, match="130 tokens, but max_position_embeddings is 128"):
        model(ids, attention_mask=mask_of([130], 200, "left"))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_packing_and_unpacking_keeps_every_real_token(data):
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 90))
    mask = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch))
    )
    alone, block_size = data.draw(st.booleans()), data.draw(st.integers(1, 9))
    config = BigBirdConfig(
        block_size=block_size, num_random_blocks=0, pattern_per_document=alone, attn_implementation="sdpa"
    )
    attention_type = data.draw(st.sampled_from(["block_sparse", "original_full"]))
    tokens = Tokens(batch, torch.arange(length), torch.float32, attention_mask=mask)
    plan = make_plan(config, attention_type, tokens)
    states = torch.randn(batch, length, 3)
    assert torch.equal(plan.leave(plan.enter(states)), states * mask[..., None])
    if plan.packing is None:
        return
    assert plan.packing.is_real.sum() == mask.sum()
    assert plan.parts[-1].end == len(plan.packing.sources)
    assert sum(part.documents for part in plan.parts) == len(plan.packing.spans) == mask.any(-1).sum()
    for span in plan.packing.spans:
        if span.num_blocks is not None:
            assert span.size % block_size == 0
        if alone:
            first = span.first
            expected = torch.arange(span.length)
            assert torch.equal(plan.positions[span.row, first : first + span.length], expected)
    if not alone:
        assert torch.equal(plan.positions, torch.arange(length)[None])


def test_cost_follows_the_real_tokens():
    """The largest tensor of a padded batch is no larger than that of its tokens, and no padded one is made inside."""
    model, _ = make_pair()
    seen = []
    for layer in model.encoder.layer:
        layer.intermediate.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:2].numel()))
    lengths = [256, 96, 40, 8]
    with torch.no_grad():
        model(random_ids(4, 256), attention_mask=mask_of(lengths, 256, "right"))
    assert seen == [sum(lengths)] * 2  # whole blocks of 8
