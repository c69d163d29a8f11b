"""The backbone: it keeps no state, needs linear memory, names what is wrong, and survives low precision."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from bigbird_plus import BigBirdConfig, BigBirdModel
from bigbird_plus import modeling_big_bird as modeling
from bigbird_plus._compat import CACHE, tokens_in_cache
from bigbird_plus.attention import common
from bigbird_plus.modeling_big_bird import BigBirdLayer

from .peers import make_model, random_ids, random_inputs, scale_weights, tiny_settings

SPARSE, FULL = 131, 40  # lengths at which a block-sparse model reads sparsely, and in full
HALF = [torch.bfloat16, torch.float16]


def padded_inputs(length, batch=3):
    return random_inputs("BigBirdModel", batch, length)


# ---------------------------------------------------------------------------------------------------------------------
# No state
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_same_input_gives_the_same_output_whatever_came_between(implementation):
    model = make_model(attn_implementation=implementation)
    calls = [padded_inputs(length) for length in (SPARSE, FULL, 200, 256)]
    with torch.no_grad():
        first = [model(**inputs).last_hidden_state for inputs in calls]
        model(**calls[1])
        model(**calls[0], output_attentions=True, output_hidden_states=True)
        model(**calls[2], head_mask=torch.tensor([0.0, 1.0, 1.0, 1.0]))
        model.train()(**calls[3])
        model.set_attention_type("original_full")
        model(**calls[0])
        model.set_attention_type("block_sparse")
        copy.deepcopy(model)
        again = [model.eval()(**inputs).last_hidden_state for inputs in calls]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_training_draws_the_same_random_blocks_in_every_call():
    model = make_model().train()
    with torch.no_grad():
        outputs = [model(random_ids(1, SPARSE)).last_hidden_state for _ in range(3)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("training", [False, True])
def test_global_generators_are_untouched(training):
    model = make_model(eval_random_blocks=True, block_size=7).train(
        training
    )  # a pattern that no other test has cached
    numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    model(random_ids(2, SPARSE)).last_hidden_state.sum().backward()
    assert torch.equal(torch_state, torch.get_rng_state())
    for before, after in zip(numpy_state, np.random.get_state(), strict=True):  # noqa: NPY002
        np.testing.assert_array_equal(before, after)


def test_threads_give_the_serial_answers():
    model = make_model(eval_random_blocks=True)
    calls = [padded_inputs(length) for length in [FULL, SPARSE, 150, 256, 89, 88, 200, 3] * 4]

    def answer(inputs):
        with torch.no_grad():
            return model(**inputs, output_attentions=True)

    serial = [answer(inputs) for inputs in calls]
    with ThreadPoolExecutor(32) as pool:
        threaded = list(pool.map(answer, calls))
    for one, other in zip(serial, threaded, strict=True):
        assert torch.equal(one.last_hidden_state, other.last_hidden_state)
        assert torch.equal(one.attentions[1], other.attentions[1])


# ---------------------------------------------------------------------------------------------------------------------
# What is returned
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
@pytest.mark.parametrize("length", [FULL, 96, SPARSE])
@pytest.mark.parametrize("training", [False, True])
def test_hidden_states_and_attentions(implementation, attention_type, length, training):
    model = make_model(attention_type=attention_type, attn_implementation=implementation).train(training)
    inputs = padded_inputs(length)
    with torch.no_grad():
        plain = model(**inputs)
        asked = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert torch.equal(plain.last_hidden_state, asked.last_hidden_state)
    assert torch.equal(plain.pooler_output, asked.pooler_output)
    assert plain.attentions is None
    assert plain.hidden_states is None
    assert [states.shape for states in asked.hidden_states] == [(3, length, 32)] * 3
    assert torch.equal(asked.hidden_states[-1], asked.last_hidden_state)
    real = inputs["attention_mask"].bool()
    for attentions in asked.attentions:
        assert attentions.shape == (3, 4, length, length)
        sums = attentions.sum(-1).transpose(1, 2)
        torch.testing.assert_close(sums[real], torch.ones_like(sums[real]))
        assert (attentions.transpose(1, 3)[~real] == 0).all()  # padding is not read
        if attention_type == "block_sparse" and length > 88:
            assert (sums[~real] == 0).all()


@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
@pytest.mark.parametrize("where", ["right", "inside", "left"])
@pytest.mark.parametrize("idle_pooler", [False, True])
def test_states_of_padding_are_zero(attention_type, where, idle_pooler):
    """Whether or not the batch is packed (with padding inside documents there is nothing to gain from it), but for the
    place that the pooling layer looks at."""
    model = make_model(attention_type=attention_type)
    if idle_pooler:
        model.freeze_pooler()
    mask = torch.ones(2, SPARSE, dtype=torch.bool)
    mask[1, {"right": slice(50, None), "inside": slice(60, 64), "left": slice(None, 50)}[where]] = False
    with torch.no_grad():
        output = model(random_ids(2, SPARSE), attention_mask=mask, output_hidden_states=True)
        everything = model(random_ids(2, SPARSE), attention_mask=mask, computes_padding=True)
    for states in output.hidden_states:
        assert (states[:, 1:][~mask[:, 1:]] == 0).all()
        assert (states[1, 0] == 0).all() == (idle_pooler and where == "left")
    assert (everything.last_hidden_state != 0).all()
    states = [states.last_hidden_state[mask] for states in (output, everything)]
    torch.testing.assert_close(*states, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attentions_are_those_that_were_used(implementation):
    model = make_model(attn_implementation=implementation)
    values = {}
    attention = model.encoder.layer[0].attention.self
    attention.value.register_forward_hook(lambda module, inputs, output: values.update(v=output))
    attention.register_forward_hook(lambda module, inputs, output: values.update(context=output[0]))
    with torch.no_grad():
        probabilities = model(random_ids(2, 128), output_attentions=True).attentions[0]
    value = values["v"].view(2, 128, 4, 8).transpose(1, 2)
    context = (probabilities @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(context, values["context"], atol=1e-5, rtol=1e-5)


def test_attentions_in_sparse_attention_have_the_patterns_zeros():
    model = make_model()
    with torch.no_grad():
        attentions = model(random_ids(1, 128), output_attentions=True).attentions[0]
    reads = attentions[0, 0].unflatten(0, (16, 8)).unflatten(2, (16, 8)).sum((1, 3)) > 0
    assert reads[5].nonzero().flatten().tolist() == [0, 4, 5, 6, 15]
    assert reads[0].all()
    assert reads[15].all()


def test_both_implementations_agree():
    inputs = padded_inputs(SPARSE)
    for training in (False, True):
        for attention_type in ("block_sparse", "original_full"):
            outputs = []
            for name in ("sdpa", "eager"):
                model = make_model(attn_implementation=name, attention_type=attention_type).train(training)
                outputs.append(model(**inputs).last_hidden_state[inputs["attention_mask"].bool()])
            torch.testing.assert_close(*outputs, atol=2e-5, rtol=1e-5)


def test_without_pooling_layer():
    model = BigBirdModel(BigBirdConfig(**tiny_settings()), add_pooling_layer=False)
    output = model(random_ids(1, FULL))
    assert output.pooler_output is None
    assert list(output) == ["last_hidden_state"]
    assert not any("pooler" in name for name, _ in model.named_parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor has that any operation returns, backward included."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def largest_tensor(length, *, training, **arguments):
    model = make_model(
        hidden_size=16, num_attention_heads=2, intermediate_size=32, num_random_blocks=1, max_position_embeddings=4096
    ).train(training)
    inputs = {"input_ids": random_ids(1, length), "attention_mask": (torch.arange(length) < length - 9)[None]}
    with torch.set_grad_enabled(training), LargestTensor() as largest:
        output = model(**inputs, **arguments).last_hidden_state
        if training:
            output.square().sum().backward()
    return largest.numel


@pytest.mark.parametrize("training", [False, True])
def test_memory_is_linear_in_the_length(training):
    numels = [largest_tensor(length, training=training) for length in (1000, 2000, 4000)]
    assert numels[1] <= 2.1 * numels[0]
    assert numels[2] <= 2.1 * numels[1]
    assert numels[2] < 4000 * 4000 / 8


def test_memory_is_quadratic_only_where_attentions_are_asked_for():
    """Guards the test above: it does see such tensors."""
    assert largest_tensor(1000, training=False, output_attentions=True) >= 2 * 1000 * 1000


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
@pytest.mark.parametrize("fields", [{}, {"pattern_per_document": True}, {"num_extra_global_tokens": 2}])
def test_what_takes_each_token_by_itself_is_done_in_pieces(monkeypatch, given, fields):
    """Without gradients, for so many tokens at once that malloc keeps the memory; the same numbers."""
    model = make_model(**fields).eval()
    sizes = set()
    layer_norm = torch.nn.functional.layer_norm

    def note(states, *others):
        sizes.add(states.shape[:-1].numel())
        return layer_norm(states, *others)

    monkeypatch.setattr(torch.nn.functional, "layer_norm", note)
    ids = random_ids(3, 200)
    inputs = {given: ids if given == "input_ids" else model.get_input_embeddings()(ids).detach()}
    inputs["attention_mask"] = torch.arange(200) < torch.tensor([[200], [SPARSE], [7]])
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        assert max(sizes) > 60
        sizes.clear()
        monkeypatch.setattr(common, "CHUNK_BYTES", 60 * model.config.hidden_size * 4)
        actual = model(**inputs).last_hidden_state
    assert max(sizes) <= 60
    torch.testing.assert_close(actual, expected)


def streamed(monkeypatch, model, inputs, blocks=4):
    """What a model makes of inputs, so many blocks at once, without gradients; and how many layers did it so."""
    layers, stream = set(), BigBirdLayer.stream
    monkeypatch.setattr(BigBirdLayer, "stream", lambda layer, *others: layers.add(layer) or stream(layer, *others))
    size = blocks * model.config.block_size * model.config.intermediate_size * 4
    monkeypatch.setattr(common, "CHUNK_BYTES", size)
    with torch.no_grad():
        output = model(**inputs)
    monkeypatch.undo()
    return output, len(layers)


@pytest.mark.parametrize("length", [SPARSE, 200, 256])
@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_random_blocks": 0, "num_sliding_window_blocks": 5, "num_global_blocks": 3},
        {"num_random_blocks": 0, "num_global_blocks": 0},
    ],
)
@pytest.mark.parametrize("blocks", [1, 4])
def test_long_documents_are_read_some_blocks_after_others(monkeypatch, length, given, fields, blocks):
    """In inference; the same numbers, and nothing that was given is written over."""
    model = make_model(**fields)
    embeddings = model.get_input_embeddings()(random_ids(2, length)).detach()
    inputs = {"input_ids": random_ids(2, length)} if given == "input_ids" else {"inputs_embeds": embeddings.clone()}
    output, layers = streamed(monkeypatch, model, inputs, blocks)
    assert layers == 2
    if given == "inputs_embeds":
        assert torch.equal(inputs["inputs_embeds"], embeddings)
    model.set_attn_implementation("eager")
    expected = model(**inputs)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-4)


def test_padding_is_no_part_of_what_is_read_after_other_blocks(monkeypatch):
    model, inputs = make_model(), padded_inputs(200)
    output, layers = streamed(monkeypatch, model, {**inputs, "computes_padding": True})
    assert layers == 2
    expected = model(**inputs).last_hidden_state
    is_real = inputs["attention_mask"] != 0
    torch.testing.assert_close(output.last_hidden_state[is_real], expected[is_real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"eval_random_blocks": True}, {"is_decoder": True}])
def test_pruned_heads_and_autocast_are_read_after_other_blocks(monkeypatch, fields):
    model, inputs = make_model(**fields), {"input_ids": random_ids(2, 200)}
    model.encoder.layer[0].attention.prune_heads([1])
    model.encoder.layer[1].attention.prune_heads([0, 2])
    output, layers = streamed(monkeypatch, model, inputs)
    expected = model(**inputs).last_hidden_state
    torch.testing.assert_close(output.last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        reduced, reduced_layers = streamed(monkeypatch, model, inputs)
        whole = model(**inputs).last_hidden_state
    assert layers == reduced_layers == 2
    assert reduced.last_hidden_state.dtype is whole.dtype
    error, allowed = ((states - expected).abs().max() for states in (reduced.last_hidden_state, whole))
    assert error <= 2 * allowed + 1e-3


@pytest.mark.parametrize(
    "watched", ["", "embeddings", "encoder.layer.1", "encoder.layer.0.attention.self.key", "embeddings.LayerNorm"]
)
def test_what_somebody_watches_is_not_written_over(monkeypatch, watched):
    model, inputs, seen = make_model(), {"input_ids": random_ids(1, SPARSE)}, []
    model.get_submodule(watched).register_forward_hook(lambda _, __, output: seen.append(output[0]))
    with torch.no_grad():
        model(**inputs)
    layers = streamed(monkeypatch, model, inputs)[1]
    assert layers == (0 if watched else 2)
    torch.testing.assert_close(seen[1][:1], seen[0][:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "asked",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"head_mask": torch.tensor([0.0, 1.0, 1.0, 1.0])},
        {"global_attention_mask": torch.eye(1, SPARSE)},
    ],
)
def test_what_needs_whole_layers_gets_them(monkeypatch, asked):
    model, inputs = make_model(), {"input_ids": random_ids(1, SPARSE), **asked}
    output, layers = streamed(monkeypatch, model, inputs)
    assert layers == 0
    with torch.no_grad():
        expected = model(**inputs)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pattern_per_document": True},
        {"eval_random_blocks": True},
        {"global_block_indices": [0, 3]},
        {"num_random_blocks": 0, "num_global_blocks": 0},
        {"attention_type": "original_full"},
    ],
)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("blocks", [1, 4, 20, 40])
def test_batches_are_read_some_documents_after_others(monkeypatch, fields, side, blocks):
    """Long documents by themselves, short ones together, whatever they read; padding stays zero."""
    model = make_model(**fields)
    mask = torch.arange(250) < torch.tensor([250, 9, 180, 100, 60, 249, 1])[:, None]
    mask = (mask if side == "right" else mask.flip(1)).long()
    inputs = {"input_ids": random_ids(7, 250) * mask, "attention_mask": mask}
    output, layers = streamed(monkeypatch, model, inputs, blocks)
    # the pooler reads what is left of the padding, which is there only if nothing is packed
    assert layers == (0 if side == "left" and fields == {"attention_type": "original_full"} else 2)
    with torch.no_grad():
        expected = model(**inputs)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4)
    assert side == "left" or not output.last_hidden_state[mask == 0].any()
    torch.testing.assert_close(output.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [100, 250])
def test_batches_without_padding_are_read_some_documents_after_others(monkeypatch, length):
    model, inputs = make_model(), {"input_ids": random_ids(7, length)}
    output, layers = streamed(monkeypatch, model, inputs, blocks=32)
    assert layers == 2
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    torch.testing.assert_close(output.last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_in_training_reads_its_random_blocks(monkeypatch):
    """Also if the others are not, and documents are long."""
    model, inputs = make_model(), {"input_ids": random_ids(1, 200)}
    with torch.no_grad():
        evaluated = model(**inputs).last_hidden_state
        model.encoder.layer[1].train()
        expected = model(**inputs).last_hidden_state
    output, layers = streamed(monkeypatch, model, inputs)
    assert layers == 0
    torch.testing.assert_close(output.last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    assert (expected - evaluated).abs().max() > 1e-2


@pytest.mark.parametrize("fields", [{"num_extra_global_tokens": 2}, {"attn_implementation": "eager"}])
@pytest.mark.parametrize("padded", [False, True])
def test_other_models_are_not_written_over(monkeypatch, fields, padded):
    model, inputs = make_model(**fields), padded_inputs(200) if padded else {"input_ids": random_ids(1, 200)}
    assert streamed(monkeypatch, model, inputs)[1] == 0


def decoder_inputs(side, length):
    """One document, or several of which the first is the longest."""
    if side == "none":
        return {"input_ids": random_ids(1, length)}
    mask = torch.arange(length) < torch.tensor([length, 150, 40, length - 1])[:, None]
    return {"input_ids": random_ids(4, length), "attention_mask": (mask if side == "right" else mask.flip(1)).long()}


TURNED = {"position_embedding_type": "rotary", "norm_position": "pre"}


@pytest.mark.parametrize("fields", [{}, {"num_random_blocks": 0}, TURNED, {**TURNED, "num_random_blocks": 0}])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("blocks", [1, 5])
def test_decoders_are_read_some_blocks_after_others(monkeypatch, fields, side, blocks):
    """The same numbers, padding included."""
    model, inputs = make_model(is_decoder=True, **fields), decoder_inputs(side, 203)
    output, layers = streamed(monkeypatch, model, {**inputs, "use_cache": False}, blocks)
    assert layers == 2
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    torch.testing.assert_close(output.last_hidden_state, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, TURNED])
@pytest.mark.parametrize("kind", ["dynamic", "static", "of encoder and decoder"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_a_cache_is_filled_some_blocks_after_others(monkeypatch, kind, side, fields):
    """A text goes on behind what it holds as behind what whole layers have put there."""
    model, inputs = make_model(is_decoder=True, **fields), decoder_inputs(side, 203)
    expected, states = make_cache(kind, model), []
    with torch.no_grad():
        states.append(model(**inputs, past_key_values=expected).last_hidden_state)
    cache = make_cache(kind, model)
    output, layers = streamed(monkeypatch, model, {**inputs, "past_key_values": cache})
    assert layers == 2
    assert output[CACHE] is cache
    torch.testing.assert_close(output.last_hidden_state, states[0], rtol=1e-4, atol=1e-4)
    assert tokens_in_cache(cache) == 203
    more = {"input_ids": random_ids(len(states[0]), 9, seed=1)}
    if side != "none":
        more["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 9), value=1)
    with torch.no_grad():
        actual, wanted = (model(**more, past_key_values=own).last_hidden_state for own in (cache, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "of encoder and decoder"])
def test_a_cache_keeps_the_keys_that_were_read(monkeypatch, kind):
    """Without a copy."""
    model, cached, run = make_model(is_decoder=True), [], modeling.stream_document
    monkeypatch.setattr(modeling, "stream_document", lambda *args: cached.append(args[-1]) or run(*args))
    cache = make_cache(kind, model)
    streamed(monkeypatch, model, {"input_ids": random_ids(1, 203), "past_key_values": cache})
    layers = getattr(cache, "self_attention_cache", cache).layers
    for layer, read in zip(layers, cached, strict=True):
        assert [layer.keys.data_ptr(), layer.values.data_ptr()] == [tensor.data_ptr() for tensor in read]
        assert layer.keys.shape == layer.values.shape == (1, 4, 203, model.config.hidden_size // 4)


def make_cache(kind, model):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=220)
    return DynamicCache() if kind == "dynamic" else EncoderDecoderCache(DynamicCache(), DynamicCache())


def test_decoders_with_cross_attention_are_not_written_over(monkeypatch):
    model = make_model(is_decoder=True, add_cross_attention=True)
    inputs = {"input_ids": random_ids(1, 200), "encoder_hidden_states": torch.randn(1, 7, model.config.hidden_size)}
    assert streamed(monkeypatch, model, inputs)[1] == 0
    assert streamed(monkeypatch, model, inputs | {"encoder_hidden_states": None})[1] == 2


@pytest.mark.parametrize("name", ["intermediate", "output", "output.dense", "attention.output.LayerNorm"])
def test_modules_that_are_watched_are_called_once(monkeypatch, name):
    monkeypatch.setattr(common, "CHUNK_BYTES", 1000)
    model, lengths = make_model().eval(), []
    layer = model.encoder.layer[1]
    layer.get_submodule(name).register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    with torch.no_grad():
        length = model(random_ids(1, SPARSE)).last_hidden_state.shape[1]
    assert len(lengths) == 1
    assert lengths[0] >= length


# ---------------------------------------------------------------------------------------------------------------------
# Wrong input
# ---------------------------------------------------------------------------------------------------------------------


def test_too_long():
    model = make_model()
    with pytest.raises(ValueError, match=r"257.*max_position_embeddings.*256.*truncation=True"):
        model(random_ids(1, 257))
    assert model(random_ids(1, 256)).last_hidden_state.shape == (1, 256, 32)


def test_as_long_as_there_are_positions_but_no_multiple_of_the_block():
    model = make_model(max_position_embeddings=250)
    assert model(random_ids(1, 250)).last_hidden_state.shape == (1, 250, 32)


@pytest.mark.parametrize("length", [FULL, SPARSE])
def test_both_or_neither_of_ids_and_embeddings(length):
    model = make_model()
    for arguments in ({}, {"input_ids": random_ids(1, length), "inputs_embeds": torch.zeros(1, length, 32)}):
        with pytest.raises(ValueError, match=r"input_ids.*inputs_embeds"):
            model(**arguments)


@pytest.mark.parametrize("length", [FULL, SPARSE])
@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
def test_mask_of_a_wrong_shape(attention_type, length):
    model = make_model(attention_type=attention_type)
    for shape in [(2, length - 1), (2, length + 1), (1, length), (3, length), (length,)]:
        with pytest.raises(ValueError, match="attention_mask") as error:
            model(random_ids(2, length), attention_mask=torch.zeros(shape, dtype=torch.long))
        assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize("shape", [(2, SPARSE, SPARSE), (2, 1, SPARSE, SPARSE)])
def test_masks_of_pairs_need_full_attention(shape):
    with pytest.raises(ValueError, match=r"attention_mask.*original_full"):
        make_model()(random_ids(2, SPARSE), attention_mask=torch.ones(shape))
    output = make_model(attention_type="original_full")(random_ids(2, SPARSE), attention_mask=torch.ones(shape).bool())
    assert output.last_hidden_state.isfinite().all()


def test_masks_of_pairs_for_another_number_of_heads():
    model = make_model(attention_type="original_full")
    with pytest.raises(ValueError, match=r"attention_mask.*heads 4"):
        model(random_ids(2, FULL), attention_mask=torch.ones(2, 3, FULL, FULL).bool())


@pytest.mark.parametrize("shape", [(3,), (4, 4), (3, 4), (1, 2, 4), ()])
def test_head_mask_of_a_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"head_mask.*\[4\].*\[2, 4\]"):
        make_model()(random_ids(1, FULL), head_mask=torch.ones(shape))


def test_no_width():
    """A configuration may leave it open, a model may not."""
    config = BigBirdConfig(hidden_size=0)
    with pytest.raises(ValueError, match=r"hidden_size.*0"):
        BigBirdModel(config)


def test_heads_that_do_not_divide_the_hidden_size():
    with pytest.raises(ValueError, match=r"hidden_size.*num_attention_heads"):
        BigBirdModel(BigBirdConfig(**tiny_settings(hidden_size=30)))


def test_attention_types():
    model = make_model()
    with pytest.raises(ValueError, match=r"attention_type.*'sparse'"):
        model.set_attention_type("sparse")
    with pytest.raises(ValueError, match="sparse"):
        model.set_attn_implementation("sparse")


# ---------------------------------------------------------------------------------------------------------------------
# Switches
# ---------------------------------------------------------------------------------------------------------------------


def test_set_attention_type():
    sparse, full = make_model(), make_model(attention_type="original_full")
    head = make_model("BigBirdForMaskedLM")
    ids = random_ids(1, SPARSE)
    with torch.no_grad():
        was, wanted = sparse(ids).last_hidden_state, full(ids).last_hidden_state
        sparse.set_attention_type("original_full")
        assert torch.equal(sparse(ids).last_hidden_state, wanted)
        sparse.set_attention_type("block_sparse")
        assert torch.equal(sparse(ids).last_hidden_state, was)
        before = head(ids).logits
        head.bert.set_attention_type("original_full")
        assert (head(ids).logits - before).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["BigBirdModel", "BigBirdForSequenceClassification"])
def test_set_attn_implementation(name):
    model = make_model(name)
    assert model.config._attn_implementation == "sdpa"
    ids = random_ids(1, SPARSE)
    with torch.no_grad():
        outputs = {}
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            assert model.base_model.encoder.layer[0].attention.self.config._attn_implementation == implementation
            outputs[implementation] = model(ids)[0]
    torch.testing.assert_close(outputs["sdpa"], outputs["eager"], atol=2e-5, rtol=1e-5)
    assert not torch.equal(outputs["sdpa"], outputs["eager"])


@pytest.mark.parametrize("how", ["constructor", "loading"])
def test_implementation_at_construction(tmp_path, how):
    if how == "constructor":
        model = BigBirdModel(BigBirdConfig(**tiny_settings(attn_implementation="eager")))
    else:
        make_model().save_pretrained(tmp_path)
        model = BigBirdModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("is_decoder", [False, True])
def test_flex_attention_in_full_attention(padded, is_decoder):
    """Not compiled here, which takes long and is torch's matter."""
    settings = {"is_decoder": is_decoder, "attention_type": "original_full"}
    inputs = random_inputs("BigBirdModel", 2, FULL, padded=padded)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    outputs = []
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for name in ("flex_attention", "sdpa"):
            model = make_model(attn_implementation=name, **settings)
            outputs.append(model(**inputs, use_cache=False).last_hidden_state[real])
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Low precision
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [FULL, SPARSE])
@pytest.mark.parametrize("training", [False, True])
def test_masked_rows_stay_finite(dtype, implementation, length, training):
    model = make_model(attn_implementation=implementation).to(dtype).train(training)
    inputs = padded_inputs(length)
    inputs["attention_mask"][1] = 0
    output = model(**inputs)
    assert output.last_hidden_state.dtype is dtype
    assert output.last_hidden_state.isfinite().all()
    output.last_hidden_state.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.encoder.parameters())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("length", [FULL, SPARSE])
def test_half_precision_is_close_to_single(dtype, length):
    inputs = padded_inputs(length)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        single, half = (make_model().to(kind)(**inputs).last_hidden_state[real] for kind in (torch.float32, dtype))
    assert (half.float() - single).abs().max() < 20 * torch.finfo(dtype).eps * single.abs().max()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [FULL, SPARSE])
def test_autocast(implementation, length):
    inputs = padded_inputs(length)
    real = inputs["attention_mask"].bool()
    results = []
    for enabled in (False, True):
        model = make_model(attn_implementation=implementation).train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = model(**inputs).last_hidden_state[real]
            loss = output.float().square().mean() + output.float().mean()
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((output.float(), gradients))
    (output, gradients), (low_output, low_gradients) = results
    assert (low_output - output).abs().max() < 0.25
    assert set(low_gradients) == set(gradients)
    for name in ("encoder.layer.0.attention.self.query.weight", "encoder.layer.1.attention.self.value.weight"):
        assert low_gradients[name].dtype is torch.float32
        similarity = torch.cosine_similarity(low_gradients[name].flatten(), gradients[name].flatten(), dim=0)
        assert similarity > 0.99, name


# ---------------------------------------------------------------------------------------------------------------------
# Pruning and checkpointing
# ---------------------------------------------------------------------------------------------------------------------


def prune(model, heads):
    """Version 5 of transformers has no public name for it any more."""
    getattr(model, "prune_heads", model._prune_heads)(heads)


@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
@pytest.mark.parametrize("training", [False, True])
def test_pruned_heads_are_heads_masked_for_ever(attention_type, training):
    """The heads that are left keep their random blocks."""
    whole = make_model(attention_type=attention_type).train(training)
    pruned = make_model(attention_type=attention_type).train(training)
    head_mask = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0]])
    prune(pruned, {0: [1], 1: [0]})
    prune(pruned, {1: [0, 2]})
    assert pruned.encoder.layer[0].attention.self.query.out_features == 24
    assert pruned.encoder.layer[1].attention.self.query.out_features == 16
    inputs = padded_inputs(SPARSE)
    with torch.no_grad():
        expected = whole(**inputs, head_mask=head_mask).last_hidden_state
        torch.testing.assert_close(pruned(**inputs).last_hidden_state, expected, atol=2e-5, rtol=1e-5)
        attentions = pruned(**inputs, output_attentions=True).attentions
    assert [layer.shape[1] for layer in attentions] == [3, 2]


def test_pruning_in_the_configuration_survives_saving(tmp_path):
    model = make_model()
    prune(model, {0: [1]})
    if not hasattr(model, "prune_heads"):  # version 5 knows no such thing
        assert not hasattr(model.config, "pruned_heads")
        return
    model.save_pretrained(tmp_path)
    again = BigBirdModel.from_pretrained(tmp_path)
    with torch.no_grad():
        states = [m(random_ids(1, SPARSE)).last_hidden_state for m in (model, again)]
    torch.testing.assert_close(*states, atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("length", [FULL, SPARSE])
@pytest.mark.parametrize("padded", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(monkeypatch, use_reentrant, length, padded):
    """With dropout, too, which must be drawn as it was: in pieces, it would not be."""
    monkeypatch.setattr(common, "CHUNK_BYTES", 2000)
    inputs = padded_inputs(length) if padded else {"input_ids": random_ids(2, length)}
    gradients = []
    for checkpointing in (False, True):
        model = make_model(hidden_dropout_prob=0.3).train()
        torch.manual_seed(0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(**inputs).pooler_output.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [None, "20KB"])
def test_save_and_load(tmp_path, shard):
    model = make_model()
    model.save_pretrained(tmp_path, **({} if shard is None else {"max_shard_size": shard}))
    names = {path.name for path in tmp_path.iterdir()}
    assert any(name.endswith(".safetensors") for name in names)
    assert ("model.safetensors.index.json" in names) == (shard is not None)
    again, info = BigBirdModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = random_ids(1, SPARSE)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).last_hidden_state, model(ids).last_hidden_state, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", HALF)
def test_load_in_a_dtype(tmp_path, dtype):
    make_model().save_pretrained(tmp_path)
    model = BigBirdModel.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(random_ids(1, SPARSE)).last_hidden_state.dtype is dtype


def test_device_map(tmp_path):
    model = make_model("BigBirdForMaskedLM")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, device_map="auto")
    ids = random_ids(1, SPARSE)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


def test_offload_to_disk(tmp_path):
    model = make_model("BigBirdForMaskedLM")
    model.save_pretrained(tmp_path / "model")
    device_map = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "disk", "cls": "cpu"}
    again = type(model).from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload")
    ids = random_ids(1, SPARSE)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


def test_buffers_of_old_files_are_ignored(tmp_path):
    model = make_model()
    extra = {"embeddings.position_ids": torch.arange(256)[None], "embeddings.token_type_ids": torch.zeros(1, 256)}
    torch.save({**model.state_dict(), **extra}, tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    again, info = BigBirdModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    ids = random_ids(1, FULL)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).last_hidden_state, model(ids).last_hidden_state, atol=1e-5, rtol=0)


def test_initial_weights():
    torch.manual_seed(0)
    model = BigBirdModel(BigBirdConfig(**tiny_settings(hidden_size=128, initializer_range=0.1, pad_token_id=3)))
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert abs(parameter.std().item() - 0.1) < 0.01, name
    assert (model.embeddings.word_embeddings.weight[3] == 0).all()


def test_weights_that_a_file_lacks_are_initialised(tmp_path):
    scale_weights(BigBirdModel(BigBirdConfig(**tiny_settings()), add_pooling_layer=False)).save_pretrained(tmp_path)
    model, info = BigBirdModel.from_pretrained(tmp_path, output_loading_info=True)
    assert sorted(info["missing_keys"]) == ["pooler.bias", "pooler.weight"]
    assert (model.pooler.bias == 0).all()
    assert 0.01 < model.pooler.weight.std() < 0.03
    assert torch.equal(model.embeddings.word_embeddings.weight, make_model().embeddings.word_embeddings.weight)
