"""BigBird as a decoder: causal in every mode, the same with every cache, transformers' own where that is right."""

import threading

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.masking_utils import create_masks_for_generate

import bigbird_plus
from bigbird_plus import BigBirdConfig, BigBirdForCausalLM, BigBirdModel
from bigbird_plus._compat import CACHE

from .peers import make_pair, random_ids, scale_weights, tiny_settings

FULL_LENGTH = 88  # T * b of the tiny models: up to here a sparse decoder reads everything
PIECES = (1, 5, 60, 70, 7, 1, 1, 100, 20)
LENGTH = sum(PIECES)


def decoder(model_class=BigBirdForCausalLM, **overrides):
    config = BigBirdConfig(**tiny_settings(**{"is_decoder": True, "max_position_embeddings": 512, **overrides}))
    return scale_weights(model_class(config)).eval()


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **{"use_cache": False, **kwargs}).logits


def assert_close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def in_chunks(model, ids, cache, pieces=PIECES, mask=None, position_ids=None, **kwargs):
    """The logits of pieces, one after the other, and the last output."""
    results, past = [], 0
    for size in pieces:
        now = slice(past, past + size)
        if mask is not None:
            kwargs |= {"attention_mask": mask[:, : now.stop], "position_ids": position_ids[:, now]}
        with torch.no_grad():
            output = model(ids[:, now], past_key_values=cache, use_cache=True, **kwargs)
        results.append(output.logits)
        cache, past = output.past_key_values, now.stop
    return torch.cat(results, dim=1), output


def left_padded(short, length):
    """A sequence in a batch with a longer one: ids, mask, positions as `generate` counts them."""
    ids = torch.cat([torch.zeros(len(short), length - short.shape[1], dtype=torch.long), short], dim=1)
    mask = (ids != 0).long()
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


# ---------------------------------------------------------------------------------------------------------------------
# Causality, and equality with transformers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "overrides", [{"num_random_blocks": 0}, {"num_random_blocks": 3}, {"attention_type": "original_full"}]
)
def test_no_token_reads_later_ones(overrides, training):
    model = decoder(**overrides).train(training)
    ids = random_ids(1, LENGTH)
    before = logits(model, ids)
    for place in (3, 100, 200):
        changed = ids.clone()
        changed[:, place:] = (ids[:, place:] - 3 + 1) % 117 + 3
        after = logits(model, changed)
        assert_close(after[:, :place], before[:, :place], tolerance=1e-5)
        assert (after[:, place:] - before[:, place:]).abs().amax(dim=(0, 2)).min() > 1e-3


@pytest.mark.parametrize("training", [False, True])
def test_a_prefix_alone_gives_the_same(training):
    """Of any length, on and off the borders of blocks, and whatever stands behind it."""
    model = decoder().train(training)
    ids = random_ids(2, LENGTH)
    whole = logits(model, ids)
    for length in (1, 8, 87, 88, 89, 96, 97, 150, 264):
        assert_close(logits(model, ids[:, :length]), whole[:, :length])


def test_training_and_evaluation_agree():
    model, ids = decoder(), random_ids(2, LENGTH)
    assert_close(logits(model.train(), ids), logits(model.eval(), ids), tolerance=1e-5)


@pytest.mark.parametrize("attention_type, length", [("original_full", 200), ("block_sparse", FULL_LENGTH)])
def test_logits_are_those_of_transformers_dense_decoder(attention_type, length):
    ours, theirs = make_pair("BigBirdForCausalLM", is_decoder=True, attention_type="original_full")
    ours.set_attention_type(attention_type)
    ids = random_ids(2, length)
    mask = torch.ones_like(ids)
    mask[0, length - 20 :] = 0
    assert_close(logits(ours, ids), logits(theirs, ids))
    assert_close(
        logits(ours, ids, attention_mask=mask)[mask == 1], logits(theirs, ids, attention_mask=mask)[mask == 1]
    )


def test_sparse_and_dense_part_behind_the_first_blocks():
    model, ids = decoder(), random_ids(1, LENGTH)
    sparse = logits(model, ids)
    model.set_attention_type("original_full")
    difference = (logits(model, ids) - sparse).abs().amax(dim=(0, 2))
    assert difference[:FULL_LENGTH].max() < 1e-4
    assert difference[FULL_LENGTH:].min() > 1e-3


def test_the_number_of_positions_changes_nothing():
    model, ids = decoder(), random_ids(1, 200)
    longer = decoder(max_position_embeddings=4096)
    state = model.state_dict()
    name = "bert.embeddings.position_embeddings.weight"
    state[name] = torch.cat([state[name], torch.randn(4096 - 512, 32)])
    longer.load_state_dict(state)
    assert_close(logits(longer, ids), logits(model, ids), tolerance=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Engines and gradients
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_engines_agree_in_training(padding):
    ids = random_ids(2, 200)
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[1, :60] = 0
        mask = mask if padding == "left" else mask.flip(1)
    results = {}
    for implementation in ("eager", "sdpa"):
        model = decoder(attn_implementation=implementation).train()
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        results[implementation] = {"loss": loss.detach(), **grads}
    assert results["eager"].keys() == results["sdpa"].keys()
    for name, value in results["eager"].items():
        assert_close(results["sdpa"][name], value)
        assert value.abs().max() > 0


def test_gradient_checkpointing_changes_nothing():
    ids, grads = random_ids(1, 150), []
    for checkpointing in (False, True):
        model = decoder().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        grads.append(model.bert.embeddings.word_embeddings.weight.grad)
    assert_close(*grads)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_probabilities(implementation):
    model, ids = decoder(attn_implementation=implementation), random_ids(2, 200)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    with torch.no_grad():
        plain = model(ids, attention_mask=mask, use_cache=False)
        whole = model(ids, attention_mask=mask, use_cache=False, output_attentions=True)
        first = model(ids[:, :190], attention_mask=mask[:, :190], output_attentions=True)
        last = model(ids[:, 190:], attention_mask=mask, past_key_values=first.past_key_values, output_attentions=True)
    assert_close(plain.logits, whole.logits, tolerance=1e-5)
    assert len(whole.attentions) == 2
    for attention, early, late in zip(whole.attentions, first.attentions, last.attentions, strict=True):
        assert attention.shape == (2, 4, 200, 200)
        assert late.shape == (2, 4, 10, 200)
        assert_close(attention.sum(-1), mask[:, None].expand(-1, 4, -1).float())
        assert attention.triu(1).abs().max() == 0
        assert_close(early, attention[:, :, :190, :190])
        assert_close(late, attention[:, :, 190:])


def test_heads_can_be_masked_and_pruned():
    """A pruned head and one that counts nothing are the same, and leave the others their random blocks."""
    model = decoder(BigBirdModel)
    model._prune_heads({0: [1, 2]})
    head_mask = torch.ones(2, 4)
    head_mask[0, 1:3] = 0
    ids = random_ids(1, 200)
    with torch.no_grad():
        pruned = model(ids, use_cache=False).last_hidden_state
        masked = decoder(BigBirdModel)(ids, head_mask=head_mask, use_cache=False).last_hidden_state
    assert_close(pruned, masked)


# ---------------------------------------------------------------------------------------------------------------------
# Caches
# ---------------------------------------------------------------------------------------------------------------------


def new_cache(kind, config):
    if kind == "static":
        return StaticCache(config=config, max_cache_len=LENGTH + 30)
    if kind == "encoder-decoder":
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return {"none": None, "dynamic": DynamicCache(), "tuple": ()}[kind]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["none", "dynamic", "static", "encoder-decoder", "tuple"])
def test_pieces_equal_the_whole(kind, implementation):
    model, ids = decoder(attn_implementation=implementation), random_ids(2, LENGTH)
    actual, output = in_chunks(model, ids, new_cache(kind, model.config))
    assert_close(actual, logits(model, ids))
    expected = {"static": StaticCache, "encoder-decoder": EncoderDecoderCache, "tuple": tuple}.get(kind, DynamicCache)
    assert isinstance(output.past_key_values, expected)


@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_pieces_of_a_left_padded_batch_equal_each_sequence_alone(kind, attention_type):
    model = decoder(attention_type=attention_type)
    long, short = random_ids(1, LENGTH), random_ids(1, LENGTH - 77, seed=1)
    padded, mask, position_ids = left_padded(short, LENGTH)
    mask, position_ids = (
        torch.cat([make(tensor), tensor])
        for make, tensor in (
            (torch.ones_like, mask),
            (lambda tensor: torch.arange(LENGTH)[None], position_ids),
        )
    )
    ids = torch.cat([long, padded])
    whole = logits(model, ids, attention_mask=mask, position_ids=position_ids)
    pieces, _ = in_chunks(model, ids, new_cache(kind, model.config), mask=mask, position_ids=position_ids)
    for result in (whole, pieces):
        assert_close(result[:1], logits(model, long))
        assert_close(result[1:, 77:], logits(model, short))


def test_a_right_padded_sequence_gives_what_it_gives_alone():
    model = decoder()
    ids, short = random_ids(2, 200), 130
    mask = torch.ones_like(ids)
    mask[1, short:] = 0
    result = logits(model, ids, attention_mask=mask)
    assert_close(result[:1], logits(model, ids[:1]))
    assert_close(result[1:, :short], logits(model, ids[1:, :short]))


def test_a_masked_token_is_read_by_none():
    model, ids = decoder(), random_ids(1, 200)
    mask = torch.ones_like(ids)
    mask[:, 150:153] = 0
    changed = ids.clone()
    changed[:, 150:153] = random_ids(1, 3, seed=9)
    expected = logits(model, ids, attention_mask=mask)
    actual = logits(model, changed, attention_mask=mask)
    real = mask[0] == 1
    assert_close(actual[:, real], expected[:, real])
    pieces, _ = in_chunks(model, ids, None, (100, 60, 1, 39), mask=mask, position_ids=torch.arange(200)[None])
    assert_close(pieces[:, real], expected[:, real])


def test_masks_may_go_on_beyond_the_keys():
    model, ids = decoder(), random_ids(2, 150)
    mask = torch.ones(2, 180, dtype=torch.long)
    mask[1, :40] = 0
    expected = logits(model, ids, attention_mask=mask[:, :150])
    assert_close(logits(model, ids, attention_mask=mask), expected)
    actual, _ = in_chunks(model, ids, None, (149,), mask=mask, position_ids=torch.arange(150)[None])
    with torch.no_grad():
        cache = model(ids[:, :149], attention_mask=mask[:, :149]).past_key_values
        last = model(ids[:, 149:], attention_mask=mask, past_key_values=cache).logits
    assert_close(torch.cat([actual, last], dim=1), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_four_dimensional_masks_that_transformers_makes_for_a_static_cache(implementation):
    """`generate` asks our class for its masks; wrappers of it ask transformers."""
    model, ids = decoder(attn_implementation=implementation), random_ids(2, 150)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    expected = logits(model, ids, attention_mask=mask)
    cache, results = StaticCache(config=model.config, max_cache_len=170), []
    for start, stop in ((0, 120), (120, 150)):
        places = torch.arange(start, stop)
        arguments = {"attention_mask": mask[:, :stop], "past_key_values": cache, "config": model.config}
        embeds = torch.zeros(2, stop - start, 32)
        try:
            ready = create_masks_for_generate(inputs_embeds=embeds, **arguments)
        except TypeError:  # transformers 4
            ready = create_masks_for_generate(input_embeds=embeds, cache_position=places, **arguments)
        assert ready.shape == (2, 1, stop - start, 170)
        with torch.no_grad():
            output = model(ids[:, start:stop], attention_mask=ready, past_key_values=cache, cache_position=places)
        results.append(output.logits)
    real = mask == 1
    assert_close(torch.cat(results, dim=1)[real], expected[real])


def test_a_cropped_cache_goes_on_from_there():
    model, ids = decoder(), random_ids(1, LENGTH)
    with torch.no_grad():
        cache = model(ids[:, :200]).past_key_values
        cache.crop(-60)
        output = model(ids[:, 140:], past_key_values=cache)
    assert_close(output.logits, logits(model, ids)[:, 140:])


def test_a_reordered_cache_gives_each_sequence_its_past():
    model, ids = decoder(), random_ids(3, 130)
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        cache = model(ids[:, :120]).past_key_values
        cache.reorder_cache(order)
        output = model(ids[:, 120:], past_key_values=cache)
    expected = logits(model, torch.cat([ids[order, :120], ids[:, 120:]], dim=1))
    assert_close(output.logits, expected[:, 120:])


def test_tuples_of_earlier_versions_come_back_as_tuples():
    model, ids = decoder(), random_ids(2, 130)
    with torch.no_grad():
        cache = model(ids[:, :120]).past_key_values
        tuples = tuple((layer.keys, layer.values) for layer in cache.layers)
        output = model(ids[:, 120:], past_key_values=tuples)
    assert [tuple(part.shape for part in layer) for layer in output.past_key_values] == 2 * [2 * ((2, 4, 130, 8),)]
    assert_close(output.logits, logits(model, ids)[:, 120:])
    assert tuples[0][0].shape == (2, 4, 120, 8)


@pytest.mark.parametrize("model_class", [BigBirdForCausalLM, BigBirdModel])
def test_the_cache_has_the_names_of_all_versions(monkeypatch, model_class):
    """And nobody is told to use another one, who has used none."""
    said = []
    monkeypatch.setattr(transformers.utils.generic.logger, "warning_once", said.append)
    model, ids = decoder(model_class), random_ids(1, 130)
    results = []
    with torch.no_grad():
        for name in ("past_key_values", "cache"):
            first = model(ids[:, :120])
            results.append(model(ids[:, 120:], **{name: first[CACHE]})[0])
            assert first[CACHE].get_seq_length() == 130
        with pytest.raises(ValueError, match=r"past_key_values and cache .* Give one of them"):
            model(ids[:, 120:], past_key_values=first[CACHE], cache=first[CACHE])
        assert_close(results[0], model(ids)[0][:, 120:])
    assert torch.equal(*results)
    assert not said
    assert model.config.keys_to_ignore_at_inference == [CACHE]


def test_no_cache_unless_wanted():
    model, ids = decoder(), random_ids(1, 100)
    with torch.no_grad():
        assert model(ids, use_cache=False).past_key_values is None
        assert model(ids).past_key_values.get_seq_length() == 100
        model.config.use_cache = False
        assert model(ids).past_key_values is None


def test_logits_to_keep():
    model, ids = decoder(), random_ids(2, 120)
    expected = logits(model, ids)
    assert_close(logits(model, ids, logits_to_keep=3), expected[:, -3:])
    assert_close(logits(model, ids, logits_to_keep=torch.tensor([5, 100])), expected[:, [5, 100]])


# ---------------------------------------------------------------------------------------------------------------------
# Cross-attention
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cross_attention_with_and_without_a_cache(attention_type, implementation):
    """The source is longer than what the decoder reads of itself, and padded."""
    model = decoder(add_cross_attention=True, attention_type=attention_type, attn_implementation=implementation)
    ids, source = random_ids(2, 150), torch.randn(2, 300, 32)
    source_mask = torch.ones(2, 300, dtype=torch.long)
    source_mask[1, 250:] = 0
    how = {"encoder_hidden_states": source, "encoder_attention_mask": source_mask}
    expected = logits(model, ids, **how)
    pieces, output = in_chunks(model, ids, None, (100, 1, 9, 40), **how)
    assert_close(pieces, expected)
    assert isinstance(output.past_key_values, EncoderDecoderCache)
    assert output.past_key_values.cross_attention_cache.get_seq_length() == 300
    plain, _ = in_chunks(model, ids, DynamicCache(), (100, 50), **how)
    assert_close(plain, expected)

    source[1, 250:] = 7.0
    assert_close(logits(model, ids, **how), expected, tolerance=1e-5)
    source[:, 10] += 1.0
    assert (logits(model, ids, **how) - expected).abs().amax(-1).min() > 1e-4


def test_cross_attention_is_that_of_transformers_bert():
    """A dense BigBird decoder is BERT's, which reads an encoder as it should; transformers' own BigBird does not."""
    settings = tiny_settings(
        is_decoder=True, add_cross_attention=True, attention_type="original_full", hidden_act="gelu"
    )
    ours = scale_weights(BigBirdForCausalLM(BigBirdConfig(**settings))).eval()
    bert_settings = {
        name: value
        for name, value in settings.items()
        if name not in ("block_size", "num_random_blocks", "attention_type")
    }
    theirs = transformers.BertLMHeadModel(transformers.BertConfig(**bert_settings)).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing == []
    assert all("pooler" in name for name in unexpected)
    ids, source = random_ids(2, 40), torch.randn(2, 60, 32)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, 30:] = 0
    how = {"encoder_hidden_states": source, "encoder_attention_mask": mask, "output_attentions": True}
    ours.set_attn_implementation("eager")
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        actual, expected = ours(ids, **how), theirs(ids, **how)
    assert_close(actual.logits, expected.logits)
    for one, other in zip(actual.cross_attentions, expected.cross_attentions, strict=True):
        assert one.shape == (2, 4, 40, 60)
        assert_close(one, other)


def test_tuples_with_cross_attention():
    model, ids, source = decoder(add_cross_attention=True), random_ids(2, 130), torch.randn(2, 20, 32)
    expected = logits(model, ids, encoder_hidden_states=source)
    pieces, output = in_chunks(model, ids, (), (120, 1, 9), encoder_hidden_states=source)
    assert_close(pieces, expected)
    assert isinstance(output.past_key_values, tuple)
    with torch.no_grad():
        cache = model(ids[:, :120], encoder_hidden_states=source).past_key_values
        tuples = tuple(
            (own.keys, own.values, cross.keys, cross.values)
            for own, cross in zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
        )
        # The source's keys are in the tuples: its states themselves are not asked for them again.
        last = model(ids[:, 120:], past_key_values=tuples, encoder_hidden_states=torch.zeros_like(source))
    assert_close(last.logits, expected[:, 120:])
    assert [len(layer) for layer in last.past_key_values] == [4, 4]


# ---------------------------------------------------------------------------------------------------------------------
# Cost, threads, refusals
# ---------------------------------------------------------------------------------------------------------------------


def test_a_step_with_a_static_cache_costs_the_same_at_every_length():
    model, flops = decoder(max_position_embeddings=4096), []
    for past in (600, 3_900):
        cache = StaticCache(config=model.config, max_cache_len=4_000)
        ids = random_ids(1, past + 1)
        with torch.no_grad():
            model(ids[:, :past], past_key_values=cache, cache_position=torch.arange(past))
            with FlopCounterMode(display=False) as counter:
                model(ids[:, past:], past_key_values=cache, cache_position=torch.tensor([past]))
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


def test_packed_documents_do_not_read_each_other():
    model, ids = decoder(), random_ids(1, 120)
    position_ids = torch.cat([torch.arange(70), torch.arange(50)])[None]
    together = logits(model, ids, position_ids=position_ids)
    assert_close(together, torch.cat([logits(model, ids[:, :70]), logits(model, ids[:, 70:])], dim=1))
    assert_close(logits(model, ids[:, :80], position_ids=position_ids[:, :80])[:, :70], logits(model, ids[:, :70]))


def test_too_many_tokens():
    model = decoder()
    with pytest.raises(ValueError, match="input has 513 tokens, but max_position_embeddings is 512"):
        model(random_ids(1, 513))
    with torch.no_grad():
        cache = model(random_ids(1, 512)).past_key_values
    with pytest.raises(ValueError, match="input has 513 tokens"):
        model(random_ids(1, 1), past_key_values=cache)


@pytest.mark.parametrize(
    "name", ["BigBirdForPreTraining", "BigBirdForSequenceClassification", "BigBirdForMultipleChoice"]
)
def test_heads_that_read_the_first_token_refuse_decoders(name):
    with pytest.raises(ValueError, match=f"{name} classifies .* is_decoder must be False"):
        getattr(bigbird_plus, name)(BigBirdConfig(**tiny_settings(is_decoder=True)))


@pytest.mark.parametrize(
    "name", ["BigBirdForMaskedLM", "BigBirdForTokenClassification", "BigBirdForQuestionAnswering"]
)
def test_heads_that_read_each_token_are_causal_in_a_decoder(name):
    config = BigBirdConfig(**tiny_settings(is_decoder=True))
    model = scale_weights(getattr(bigbird_plus, name)(config)).eval()
    ids = random_ids(1, 150)
    changed = ids.clone()
    changed[:, 120:] = (ids[:, 120:] - 3 + 1) % 117 + 3
    with torch.no_grad():
        before, after = (model(tokens) for tokens in (ids, changed))
    before, after = (
        output.start_logits if hasattr(output, "start_logits") else output.logits for output in (before, after)
    )
    assert_close(after[:, :120], before[:, :120], tolerance=1e-5)
    assert (after[:, 120:] - before[:, 120:]).abs().max() > 1e-3


def test_many_threads_decode_with_one_model():
    model, wrong = decoder(), []
    all_ids = [random_ids(1, 150 + 20 * index, seed=index) for index in range(6)]
    expected = [logits(model, ids) for ids in all_ids]

    def decode(index):
        actual, _ = in_chunks(model, all_ids[index], None, (100, *[10] * (5 + 2 * index)))
        if not torch.allclose(actual, expected[index], rtol=1e-4, atol=1e-4):
            wrong.append(index)

    threads = [threading.Thread(target=decode, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
