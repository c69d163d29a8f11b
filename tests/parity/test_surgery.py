"""What people do to a model's modules has the effect that it has on transformers' own: modules are replaced, called
alone, taken out and put in."""

import copy
import inspect

import pytest
import torch
import transformers
from torch import nn
from transformers.models.big_bird import modeling_big_bird as transformers_big_bird

from bigbird_plus import BigBirdModel, modeling_big_bird
from bigbird_plus.attention import common
from bigbird_plus.modeling_big_bird import BigBirdSelfAttention
from tests.parity.comparison import OUTPUT_TOLERANCE, assert_equal_gradients, assert_equal_outputs
from tests.peers import make_model, make_pair, random_ids, random_inputs

SPARSE = 128  # a multiple of the block size: transformers' lone layers know of no padding to whole blocks


def assert_close(ours, theirs, tolerance=OUTPUT_TOLERANCE):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=1e-5)


def first(output):
    """The states alone: version 5 of transformers returns these from a layer, version 4 a tuple."""
    return output if isinstance(output, torch.Tensor) else output[0]


def hidden(*shape, seed=0):
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(seed))


# Replaced modules


ACTIVATIONS = ["bert.encoder.layer.0.intermediate.intermediate_act_fn", "cls.predictions.transform.transform_act_fn"]


@pytest.mark.parametrize("hidden_act", ["gelu_new", "relu"])
@pytest.mark.parametrize("path", ACTIVATIONS)
def test_activations_can_be_replaced(path, hidden_act):
    pair = make_pair("BigBirdForMaskedLM", hidden_act=hidden_act)
    inputs = random_inputs("BigBirdForMaskedLM", 2, SPARSE)
    before = pair[0](**inputs).logits
    for model in pair:
        model.set_submodule(path, nn.Sigmoid())
    ours, theirs = (model(**inputs) for model in pair)
    assert_equal_outputs(ours, theirs, inputs)
    assert (ours.logits - before).abs().max() > 0.1
    with torch.no_grad():  # where products and activations may be computed together
        assert_equal_outputs(pair[0](**inputs), theirs, inputs)


@pytest.mark.parametrize("path", ACTIVATIONS)
def test_hooks_of_activations_are_called(path):
    pair, calls = make_pair("BigBirdForMaskedLM"), []
    inputs = random_inputs("BigBirdForMaskedLM", 1, SPARSE, padded=False)
    for model in pair:
        model.get_submodule(path).register_forward_hook(lambda module, _, output: calls.append(output) or output * 0.5)
    with torch.no_grad():
        ours, theirs = (model(**inputs) for model in pair)
    assert len(calls) == 2
    assert_equal_outputs(ours, theirs, inputs)


def test_the_activation_of_the_pooler_can_be_replaced():
    pair = make_pair()
    for model in pair:
        model.activation = nn.ReLU()
    inputs = random_inputs("BigBirdModel", 2, SPARSE)
    assert_equal_outputs(*(model(**inputs) for model in pair), inputs)
    assert BigBirdModel(pair[0].config, add_pooling_layer=False).activation is None


class MeanHead(nn.Module):
    """A classifier that reads all hidden states, as transformers' model hands them on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.out = nn.Linear(32, 2)

    def forward(self, features, **kwargs):
        return self.out(features.mean(dim=1))


def test_a_classifier_of_ones_own():
    pair = make_pair("BigBirdForSequenceClassification")
    for model in pair:
        model.classifier = MeanHead()
    inputs = random_inputs("BigBirdForSequenceClassification", 2, SPARSE, padded=False)
    assert_equal_outputs(*(model(**inputs) for model in pair), inputs)


class Doubled(nn.Module):
    """Something around a module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


@pytest.fixture
def streams(monkeypatch):
    """In inference, layers read so few tokens at a time that they would write over their input."""
    monkeypatch.setattr(common, "CHUNK_BYTES", 1)


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("name", ["", ".attention", ".attention.self", ".attention.output", ".intermediate"])
@pytest.mark.parametrize("layers", [(0,), (0, 1)])
def test_modules_can_be_wrapped(name, layers):
    pair = make_pair()
    inputs = random_inputs("BigBirdModel", 2, 200)
    with torch.no_grad():
        before = pair[0](**inputs).last_hidden_state
        for model in pair:
            for layer in layers:
                path = f"encoder.layer.{layer}{name}"
                model.set_submodule(path, Doubled(model.get_submodule(path)))
        ours, theirs = (model(**inputs) for model in pair)
    assert_equal_outputs(ours, theirs, inputs)
    assert (ours.last_hidden_state - before).abs().max() > 1e-2
    assert pair[0].attention_type == "block_sparse"


@pytest.mark.parametrize("name", ["encoder.layer.0", "encoder.layer.0.attention", "encoder.layer.0.attention.self"])
def test_the_attention_type_reaches_what_is_wrapped(name):
    ours, theirs = make_pair()
    theirs.set_attention_type("original_full")
    for model in (ours, theirs):
        model.set_submodule(name, Doubled(model.get_submodule(name)))
    ours.set_attention_type("original_full")
    assert ours.attention_type == "original_full"
    ids = random_ids(2, SPARSE)
    assert_close(ours(ids).last_hidden_state, theirs(ids).last_hidden_state)


class Silent(BigBirdSelfAttention):
    """A subclass with a forward pass of its own."""

    def forward(self, *args, **kwargs):
        context, *others = super().forward(*args, **kwargs)
        return 0 * context, *others


@pytest.mark.usefixtures("streams")
def test_a_subclass_of_attention_is_called():
    silent, without = make_model(), make_model()
    for layer in silent.encoder.layer:
        layer.attention.self.__class__ = Silent
    for layer in without.encoder.layer:
        nn.init.zeros_(layer.attention.output.dense.weight)
    with torch.no_grad():
        assert_close(*(model(random_ids(1, 200)).last_hidden_state for model in (silent, without)))


@pytest.mark.parametrize("drops", ["all", "none"])
def test_dropout_can_be_set_module_by_module(drops):
    """As for Monte Carlo dropout in evaluation, or to have none in training."""
    model = make_model(attention_type="original_full", attention_probs_dropout_prob=0.5).train(drops == "none")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = module.p if drops == "all" else 0.0
            module.train()
    ids = random_ids(1, 40)
    first, second = model(ids).last_hidden_state, model(ids).last_hidden_state
    assert torch.equal(first, second) == (drops == "none")


# Names


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("embeddings", ["hidden_size", "rescale_embeddings"]),
        ("encoder", ["attention_type", "gradient_checkpointing"]),
        ("encoder.layer.1", ["attention_type", "chunk_size_feed_forward", "seq_len_dim", "is_decoder"]),
        ("encoder.layer.1", ["add_cross_attention"]),
        ("encoder.layer.1.attention", ["attention_type"]),
        ("encoder.layer.1.attention.self", ["num_attention_heads", "attention_head_size", "all_head_size"]),
    ],
)
@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
def test_attributes(path, names, attention_type):
    ours, theirs = (m.get_submodule(path) for m in make_pair(attention_type=attention_type, chunk_size_feed_forward=8))
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name), name


def test_buffers_and_modules_have_the_same_names(tmp_path):
    ours, theirs = make_pair("BigBirdForMaskedLM")
    assert {name for name, _ in ours.named_modules()} >= {name for name, _ in theirs.named_modules()}
    ours.save_pretrained(tmp_path)
    loaded = type(ours).from_pretrained(tmp_path)
    for model in (ours, loaded):
        assert {name: b.tolist() for name, b in model.named_buffers()} == {
            name: b.tolist() for name, b in theirs.named_buffers()
        }


def test_pruned_heads_are_counted():
    """A mask of heads is for all that there were."""
    model, ids = make_model(), random_ids(1, 40)
    attention = model.encoder.layer[0].attention
    attention.prune_heads([1])
    assert (attention.self.num_attention_heads, attention.self.all_head_size) == (3, 24)
    without = model(ids).last_hidden_state
    masks = torch.tensor([[1.0, 5.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert_close(model(ids, head_mask=masks).last_hidden_state, without)
    assert (model(ids, head_mask=masks.flip(1)).last_hidden_state - without).abs().max() > 1e-2


@pytest.mark.parametrize(
    "name", ["Embeddings", "SelfAttention", "Attention", "SelfOutput", "Intermediate", "Output", "Layer", "Encoder"]
)
def test_modules_are_made_of_a_configuration(name):
    """As scripts do that build models of their own from these parts."""
    ours, theirs = (
        getattr(package, f"BigBird{name}")(model.config)
        for package, model in zip((modeling_big_bird, transformers_big_bird), make_pair(), strict=True)
    )
    shapes = [{key: value.shape for key, value in module.state_dict().items()} for module in (ours, theirs)]
    assert shapes[0] == shapes[1]


# Modules alone


@pytest.mark.parametrize("path", ["", "layer.1", "layer.1.attention", "layer.1.attention.self"])
@pytest.mark.parametrize("mask", ["none", "keys", "queries"])
@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_modules_alone_read_in_full(path, mask, is_decoder, implementation):
    ours, theirs = make_pair(attention_type="original_full", is_decoder=is_decoder)
    ours.set_attn_implementation(implementation)
    ours, theirs = (model.encoder.get_submodule(path) for model in (ours, theirs))
    states, read = hidden(2, 30), None
    if mask != "none":
        shape = (2, 1, 1, 30) if mask == "keys" else (2, 1, 30, 30)
        read = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
    added = None if read is None else (~read).float() * torch.finfo(torch.float32).min
    expected = first(theirs(states, added))
    for own in (read, added):
        assert_close(first(ours(states, own)), expected)
        assert_close(first(ours(hidden_states=states, attention_mask=own)), expected)


@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
def test_probabilities_of_modules_alone(attention_type):
    ours, theirs = make_pair(attention_type=attention_type)
    theirs.set_attention_type("original_full")
    states, mask = hidden(2, 30), torch.zeros(1, 1, 1, 30)
    mask[..., 20:] = torch.finfo(torch.float32).min
    attention = theirs.encoder.layer[0].attention
    expected = attention(states, mask)[1]
    layer = ours.encoder.layer[0]
    assert_close(layer(states, mask, output_attentions=True)[1], expected)
    assert_close(layer(states, mask, None, None, None, None, None, None, None, None, True)[1], expected)
    assert_close(layer.attention(states, mask, None, None, None, None, True)[1], expected)
    assert_close(layer.attention.self(states, mask, None, None, None, None, True)[1], expected)
    outputs = ours.encoder(states, mask, output_attentions=True, output_hidden_states=True)
    assert_close(outputs.attentions[0], expected)
    assert len(outputs.hidden_states) == 3
    as_tuple = ours.encoder(states, mask, output_hidden_states=True, return_dict=False)
    assert_close(as_tuple[1][-1], outputs.last_hidden_state)


@pytest.mark.parametrize("shape", [(4,), (1, 4, 1, 1)])
def test_head_masks_of_modules_alone(shape):
    layer, states = make_model().encoder.layer[0], hidden(1, 20)
    factors = torch.tensor([0.0, 1.0, 2.0, 0.5])
    expected = layer.attention.self(states)[0] * factors.repeat_interleave(8)
    assert_close(layer.attention.self(states, None, factors.view(shape))[0], expected)
    with pytest.raises(ValueError, match=r"head_mask.*\[4\]"):
        layer(states, head_mask=torch.ones(3))


def test_caches_of_modules_alone():
    """A decoder's encoder, called alone with a mask as its model makes it, goes on where a cache ends."""
    ours, theirs = make_pair(attention_type="original_full", is_decoder=True)
    states = hidden(1, 20)
    causal = torch.full((1, 1, 20, 20), torch.finfo(torch.float32).min).triu(1)
    expected = theirs.encoder(states, causal).last_hidden_state
    start = ours.encoder(states[:, :12], causal[..., :12, :12], use_cache=True)
    cache = next(value for name, value in start.items() if name in ("cache", "past_key_values"))
    assert cache.get_seq_length() == 12
    rest = ours.encoder(states[:, 12:], causal[..., 12:, :], past_key_values=cache)
    assert_close(torch.cat((start[0], rest[0]), dim=1), expected)


def test_cross_attention_alone():
    model = make_model(is_decoder=True, add_cross_attention=True, attention_type="original_full")
    layer, states, source = model.encoder.layer[0], hidden(2, 10), hidden(2, 14, seed=1)
    read = torch.arange(14) < torch.tensor([[14], [9]])
    mask = torch.zeros(2, 1, 1, 14).masked_fill(~read[:, None, None], torch.finfo(torch.float32).min)
    outputs = [layer(states, None, None, source, one, output_attentions=True) for one in (read, mask)]
    assert [tensor.shape for tensor in outputs[0]] == [(2, 10, 32), (2, 4, 10, 10), (2, 4, 10, 14)]
    for one, other in zip(*outputs, strict=True):
        assert_close(one, other)
    shorter = layer(states[1:], None, None, source[1:, :9])
    assert_close(outputs[0][0][1:], shorter[0])
    with pytest.raises(ValueError, match="encoder_hidden_states must be given"):
        layer.crossattention(states)
    with pytest.raises(ValueError, match="attention_mask must be None"):
        layer.crossattention(states, mask, None, source)
    with pytest.raises(ValueError, match=r"encoder_hidden_states.*layer\.crossattention"):
        layer.attention(states, encoder_hidden_states=source)


@pytest.mark.parametrize("name", ["band_mask", "from_mask", "to_mask", "blocked_encoder_mask"])
def test_masks_of_blocks_are_refused(name):
    encoder, mask = make_model().encoder, {name: torch.ones(1)}
    for module in (encoder, encoder.layer[0], encoder.layer[0].attention, encoder.layer[0].attention.self):
        with pytest.raises(ValueError, match=f"{name} must be left out"):
            module(hidden(1, 16), **mask)


def test_masks_that_do_not_fit_are_refused():
    layer, states = make_model().encoder.layer[0], hidden(2, 16)
    with pytest.raises(ValueError, match=r"floating point.*\[2, 16\]"):
        layer(states, torch.ones(2, 16))
    with pytest.raises(ValueError, match=r"attention_mask.*\[2, 1, 1, 15\]"):
        layer(states, torch.ones(2, 1, 1, 15))


@pytest.mark.parametrize("rescale_embeddings", [False, True])
def test_embeddings_alone(rescale_embeddings):
    ours, theirs = (model.embeddings for model in make_pair(rescale_embeddings=rescale_embeddings))
    ids, types = random_ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    places = torch.arange(3, 12)[None]
    vectors = hidden(2, 9)
    assert_close(ours(ids), theirs(ids))
    assert_close(ours(ids, types, places), theirs(ids, types, places))
    assert_close(ours(inputs_embeds=vectors), theirs(inputs_embeds=vectors))
    assert_close(ours(ids, None, None, None, 5), theirs(ids, None, None, None, 5))
    name = list(inspect.signature(theirs.forward).parameters)[-1]  # which differs between versions
    assert_close(ours(ids, **{name: 5}), theirs(ids, **{name: 5}))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        ours()
    with pytest.raises(ValueError, match="input_ids must be whole numbers"):
        ours(vectors)
    with pytest.raises(ValueError, match="position_ids must have the shape"):
        ours(ids, position_ids=places.T)


def test_the_head_of_classification_alone():
    ours, theirs = make_pair("BigBirdForSequenceClassification")
    assert_close(ours.classifier(hidden(2, 9)), theirs.classifier(hidden(2, 9)))


# The type of attention


@pytest.mark.parametrize("path", ["", "encoder"])
def test_the_type_can_be_set_as_an_attribute(path):
    model = make_model()
    model.get_submodule(path).attention_type = "original_full"
    assert [model.attention_type, model.encoder.layer[1].attention_type] == ["original_full"] * 2
    with pytest.raises(ValueError, match="attention_type"):
        model.get_submodule(path).attention_type = "sparse"


@pytest.mark.parametrize("training", [False, True])
def test_the_encoders_type_is_the_models(training):
    ours, theirs = (model.train(training) for model in make_pair())
    ids = random_ids(2, SPARSE)
    theirs.set_attention_type("original_full")
    ours.encoder.set_attention_type("original_full")
    assert ours.attention_type == "original_full"
    assert_close(ours(ids).last_hidden_state, theirs(ids).last_hidden_state)
    with pytest.raises(ValueError, match="attention_type"):
        ours.encoder.set_attention_type("sparse")


@pytest.mark.parametrize("start", ["layer", "attention"])
def test_single_layers_can_read_in_full(start):
    pair = make_pair()
    for model in pair:
        layer = model.encoder.layer[1]
        (layer if start == "layer" else layer.attention).set_attention_type("original_full", layer_idx=1)
    ours, theirs = pair
    ids = random_ids(2, SPARSE)
    assert [layer.attention_type for layer in ours.encoder.layer] == ["block_sparse", "original_full"]
    assert ours.attention_type == "block_sparse"
    assert_close(ours(ids).last_hidden_state, theirs(ids).last_hidden_state)
    with torch.no_grad():
        assert_close(ours(ids).last_hidden_state, theirs(ids).last_hidden_state)


@pytest.mark.parametrize("fields", [{}, {"num_extra_global_tokens": 2}, {"pattern_per_document": True}])
def test_single_layers_read_no_padding(fields):
    model = make_model(**fields)
    model.encoder.layer[0].set_attention_type("original_full")
    inputs = random_inputs("BigBirdModel", 3, 150)
    together = model(**inputs).last_hidden_state
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        alone = model(inputs["input_ids"][row : row + 1, mask]).last_hidden_state
        if fields.get("pattern_per_document") or mask.all():
            assert_close(together[row : row + 1, mask], alone)
    model.set_attn_implementation("eager")
    real = inputs["attention_mask"].bool()
    assert_close(model(**inputs).last_hidden_state[real], together[real])


def test_single_layers_of_a_sparse_decoder_cannot_differ():
    model = make_model(is_decoder=True)
    model.encoder.layer[0].set_attention_type("original_full")
    with pytest.raises(ValueError, match="set_attention_type of the model"):
        model(random_ids(1, SPARSE))


# Layers taken out and put in


def cut_off(layers):
    return layers[:1]


def without_the_first(layers):
    return layers[1:]


def with_one_more(layers):
    return layers.append(copy.deepcopy(layers[0]))


def without_the_last(layers):
    del layers[-1]
    return layers


def turned_round(layers):
    return nn.ModuleList([*reversed(layers)])


def with_one_twice(layers):
    return nn.ModuleList([layers[0], layers[1], layers[0]])


SURGERIES = [cut_off, without_the_first, with_one_more, without_the_last, turned_round, with_one_twice]


@pytest.mark.parametrize("surgery", SURGERIES)
@pytest.mark.parametrize("training", [False, True])
def test_layers_taken_out_and_put_in(surgery, training):
    pair = make_pair()
    for model in pair:
        model.encoder.layer = surgery(model.encoder.layer)
        model.train(training)
    pair[1].config.num_hidden_layers = len(pair[1].encoder.layer)  # which version 4 has to be told
    inputs = random_inputs("BigBirdModel", 2, SPARSE)
    ours, theirs = (model(**inputs, output_hidden_states=True) for model in pair)
    assert len(ours.hidden_states) == len(pair[0].encoder.layer) + 1
    assert_equal_outputs(ours, theirs, inputs)
    for output in (ours, theirs):
        output.pooler_output.sum().backward()
    assert_equal_gradients(*pair)


@pytest.mark.parametrize("surgery", SURGERIES)
def test_head_masks_are_for_the_layers_that_there_are(surgery):
    model = make_model()
    model.encoder.layer = surgery(model.encoder.layer)
    ids, layers = random_ids(1, SPARSE), len(model.encoder.layer)
    ones = model(ids, head_mask=torch.ones(layers, 4)).last_hidden_state
    assert_close(ones, model(ids).last_hidden_state)
    with pytest.raises(ValueError, match="head_mask"):
        model(ids, head_mask=torch.ones(layers + 1, 4))


@pytest.mark.parametrize("surgery", SURGERIES)
@pytest.mark.parametrize("add_cross_attention", [False, True])
def test_caches_are_for_the_layers_that_there_are(surgery, add_cross_attention):
    model = make_model(is_decoder=True, add_cross_attention=add_cross_attention, eval_random_blocks=True)
    model.encoder.layer = surgery(model.encoder.layer)
    ids, source = random_ids(1, 140), {}
    if add_cross_attention:
        source["encoder_hidden_states"] = hidden(1, 11)
    with torch.no_grad():
        whole = model(ids, use_cache=False, **source).last_hidden_state
        start = model(ids[:, :120], use_cache=True, **source)
        cache = next(value for name, value in start.items() if name in ("cache", "past_key_values"))
        rest = model(ids[:, 120:], past_key_values=cache, **source)
    assert_close(torch.cat((start.last_hidden_state, rest.last_hidden_state), dim=1), whole)


def test_a_new_layer():
    """As transformers' own is made: from a configuration, with or without its number."""
    model, ids = make_model(), random_ids(1, SPARSE)
    layer_class = type(model.encoder.layer[0])
    model.encoder.layer.append(layer_class(model.config).eval())
    model.encoder.layer.append(layer_class(model.config, seed=3).eval())
    assert len(model(ids, output_hidden_states=True).hidden_states) == 5
    assert model.encoder.layer[3].attention.self.layer_idx == 3


# What layers return


@pytest.mark.parametrize("output_attentions", [False, True])
@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("fields", [{}, {"is_decoder": True, "add_cross_attention": True}])
def test_a_layer_returns_tensors_alone(output_attentions, checkpoints, fields):
    model, seen = make_model(**fields), []
    if checkpoints:
        model.train().gradient_checkpointing_enable()
    model.encoder.layer[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    how = {"encoder_hidden_states": hidden(2, 7)} if fields else {}
    model(random_ids(2, SPARSE), output_attentions=output_attentions, **how)[0].sum().backward()
    output = seen[0]
    assert isinstance(output, tuple)
    assert len(output) == (1 if not output_attentions else 3 if fields else 2)
    assert all(isinstance(tensor, torch.Tensor) for tensor in output)


def test_a_hook_may_return_the_states_alone():
    model, ids = make_model(), random_ids(2, SPARSE)
    expected = model(ids).last_hidden_state
    model.encoder.layer[1].register_forward_hook(lambda module, inputs, output: output[0])
    assert_close(model(ids).last_hidden_state, expected)


# Submodules that tools wrap


class Wrapper(nn.Module):
    """As adapters do, it calls what it wraps and adds something. It has none of the attributes."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, *args):
        output = self.wrapped(*args)
        return output + torch.linspace(-1, 1, output.shape[-1])


def wrapped_paths():
    leaves = (nn.Linear, nn.Embedding, nn.LayerNorm)
    model = make_model(num_extra_global_tokens=2, num_hidden_layers=1)
    return [
        f"{name}.{own}"
        for name in ("embeddings", "encoder")
        for own, module in model.get_submodule(name).named_modules()
        if isinstance(module, leaves)
    ]


@pytest.mark.parametrize("path", wrapped_paths())
def test_whatever_is_wrapped_has_its_effect(path):
    model, inputs = make_model(num_extra_global_tokens=2), random_inputs("BigBirdModel", 2, SPARSE)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            before = model(**inputs)
            wrapped = copy.deepcopy(model)
            wrapped.set_submodule(path, Wrapper(wrapped.get_submodule(path)))
            after = wrapped(**inputs)
        changes = (after.last_hidden_state - before.last_hidden_state).abs().max()
        assert (changes > 1e-3) == (not path.endswith("key"))  # what all keys have in common changes nothing


@pytest.mark.parametrize("settings", [{"target_modules": ["word_embeddings"]}, {"trainable_token_indices": [5, 6, 7]}])
@pytest.mark.parametrize("name", ["BigBirdForSequenceClassification", "BigBirdForMaskedLM"])
def test_adapters_of_embeddings(settings, name):
    peft = pytest.importorskip("peft")
    inputs = random_inputs(name, 2, SPARSE)
    outputs = []
    for model in make_pair(name):
        torch.manual_seed(0)
        settings = {"target_modules": ["query"], **settings}
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **settings))
        outputs.append(adapted(**inputs))
        outputs[-1].loss.backward()
        gradients = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
        own = [grad for n, grad in gradients.items() if "word_embeddings" in n]
        assert own and all(grad.abs().sum() > 0 for grad in own)
    assert_equal_outputs(*outputs, inputs)


def test_signatures_have_the_parameters_of_transformers():
    """By the names of the installed version, but for its `**kwargs`."""
    ours, theirs = make_pair(attention_type="original_full")
    assert isinstance(ours, BigBirdModel) and isinstance(theirs, transformers.BigBirdModel)
    for path in ("embeddings", "encoder", "encoder.layer.0", "encoder.layer.0.output", "encoder.layer.0.intermediate"):
        own, wanted = (inspect.signature(model.get_submodule(path).forward).parameters for model in (ours, theirs))
        assert set(wanted) - {"kwargs"} <= set(own), path
