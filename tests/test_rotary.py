"""Rotary positions and normalisation before attention, against a dense definition that is written here anew."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import bigbird_plus
from bigbird_plus import BigBirdConfig, Sparsity
from bigbird_plus.attention import common

from .peers import make_model, random_ids, tiny_settings

ROTARY = {"position_embedding_type": "rotary", "rotary_dim": 4, "rope_theta": 50.0}
KINDS = {
    "post": ROTARY,
    "whole heads": {**ROTARY, "rotary_dim": None},
    "pre": {**ROTARY, "norm_position": "pre"},
    "sparsely normed": {
        **ROTARY,
        "norm_position": "pre",
        "final_layer_norm": False,
        "embedding_layer_norm": False,
    },
    "absolute": {"norm_position": "pre", "max_position_embeddings": 512},
    "narrow": {**ROTARY, "embedding_size": 12},
}


def norm(weights, name, states):
    if f"{name}.LayerNorm.weight" not in weights:
        return states
    parameters = weights[f"{name}.LayerNorm.weight"], weights[f"{name}.LayerNorm.bias"]
    return nn.functional.layer_norm(states, states.shape[-1:], *parameters, 1e-12)


def linear(weights, name, states):
    return nn.functional.linear(states, weights[f"{name}.weight"], weights[f"{name}.bias"])


def turned(states, config):
    """`[batch, heads, length, dim]`: pairs of numbers as complex ones, multiplied by others of absolute value 1."""
    half = (config.rotary_dim or states.shape[-1]) // 2
    pairs = torch.complex(states[..., :half], states[..., half : 2 * half])
    frequencies = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    places = torch.arange(states.shape[2], dtype=torch.float64)
    places[states.shape[2] - config.num_extra_global_tokens :] = 0
    pairs = pairs * torch.exp(1j * places[:, None] * frequencies)
    return torch.cat((pairs.real, pairs.imag, states[..., 2 * half :]), dim=-1)


def attend(weights, name, states, config, scores):
    query, key, value = (
        linear(weights, f"{name}.self.{part}", states).unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)
        for part in ("query", "key", "value")
    )
    if config.position_embedding_type == "rotary":
        query, key = turned(query, config), turned(key, config)
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5 + scores
    context = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return linear(weights, f"{name}.output.dense", context)


def layout(config, length, layer):
    """What is added to the scores: the logarithms of how often tokens are read."""
    sparsity = Sparsity.from_config(config)
    if length <= sparsity.full_attention_length:
        counts = torch.ones(1, length, length)
    else:
        blocks = -(-length // config.block_size)
        counts = torch.from_numpy(sparsity.pattern(blocks, layer_idx=layer).counts)
        counts = counts.repeat_interleave(config.block_size, 1).repeat_interleave(config.block_size, 2)
        counts = counts[:, :length, :length]
    extra = config.num_extra_global_tokens
    return nn.functional.pad(counts.double(), (0, extra, 0, extra), value=1).log()


@torch.no_grad()
def definition(model, ids):
    config, length = model.config, ids.shape[1]
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    states = weights["embeddings.word_embeddings.weight"][ids] + weights["embeddings.token_type_embeddings.weight"][0]
    if config.position_embedding_type == "absolute":
        states = states + weights["embeddings.position_embeddings.weight"][:length]
    if config.num_extra_global_tokens:
        states = torch.cat((states, weights["embeddings.extra_global_tokens.weight"].expand(len(ids), -1, -1)), dim=1)
    states = norm(weights, "embeddings", states)
    if config.embedding_size:
        states = linear(weights, "embeddings.projection", states)
    for layer in range(config.num_hidden_layers):
        name = f"encoder.layer.{layer}"
        entering = norm(weights, f"{name}.attention", states)
        context = attend(weights, f"{name}.attention", entering, config, layout(config, length, layer))
        states = norm(weights, f"{name}.attention.output", states + context)
        wide = linear(weights, f"{name}.intermediate.dense", norm(weights, name, states))
        wide = nn.functional.gelu(wide, approximate="tanh")
        states = norm(weights, f"{name}.output", states + linear(weights, f"{name}.output.dense", wide))
    return norm(weights, "encoder", states)[:, :length].float()


@torch.no_grad()
def states(model, ids, **inputs):
    return model(ids, **inputs).last_hidden_state


def assert_close(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("engine", ["sdpa", "eager", "gather", "merged"])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_definition(kind, engine):
    model = make_model(**KINDS[kind])
    model.set_attn_implementation(engine)
    for length in (60, 301):  # read in full, and longer than max_position_embeddings
        ids = random_ids(2, length)
        assert_close(states(model, ids), definition(model, ids))


@pytest.mark.parametrize("settings", [{"num_extra_global_tokens": 3}, {"global_block_indices": [0, 1]}])
def test_other_patterns(settings):
    """Extra global tokens have no position: they are not turned."""
    model = make_model(**KINDS["pre"], **settings)
    for length in (60, 203):
        ids = random_ids(2, length)
        assert_close(states(model, ids), definition(model, ids))


def test_long_documents_are_streamed(monkeypatch):
    model = make_model(**KINDS["pre"])
    ids = random_ids(2, 301)
    mask = (torch.arange(301) < torch.tensor([[290], [170]])).long()
    expected, masked = definition(model, ids), states(model, ids, attention_mask=mask)
    monkeypatch.setattr(common, "CHUNK_BYTES", 40 * 64 * 4)
    assert_close(states(model, ids), expected)
    assert_close(states(model, ids, attention_mask=mask), masked)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_each_document_of_a_padded_batch(padding):
    model = make_model(**KINDS["pre"], pattern_per_document=True)
    documents = [random_ids(1, length, seed=length) for length in (301, 60, 290)]
    ids, mask = torch.zeros(3, 400, dtype=torch.int64), torch.zeros(3, 400, dtype=torch.int64)
    for row, document in enumerate(documents):
        places = slice(0, document.shape[1]) if padding == "right" else slice(400 - document.shape[1], 400)
        ids[row, places], mask[row, places] = document, 1
    together = states(model, ids, attention_mask=mask)
    for row, document in enumerate(documents):
        assert_close(together[row][mask[row] == 1][None], definition(model, document))


def test_rows_of_several_documents():
    model = make_model(**KINDS["pre"])
    lengths = [130, 7, 301, 88]
    documents = random_ids(1, sum(lengths)).split(lengths, dim=1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    row = states(model, torch.cat(documents, dim=1), position_ids=positions)
    assert_close(row, torch.cat([definition(model, document) for document in documents], dim=1))


def test_scores_depend_on_distances_alone():
    model = make_model(**ROTARY)
    ids = random_ids(1, 200)
    assert_close(states(model, ids, position_ids=torch.arange(1000, 1200)[None]), states(model, ids), 1e-4)


@pytest.mark.parametrize("kind", ["post", "pre"])
def test_decoders_with_caches(kind):
    """Keys are turned before a cache takes them."""
    settings = {"is_decoder": True, "pad_token_id": 0, "eos_token_id": None}
    model = make_model("BigBirdForCausalLM", **KINDS[kind], **settings)
    ids = random_ids(2, 330)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, pieces = DynamicCache(), []
        for piece in ids.split([100, 1, 129, 1, 99], dim=1):
            pieces.append(model(piece, past_key_values=cache, use_cache=True).logits)
    assert_close(torch.cat(pieces, dim=1), whole, 1e-4)

    mask = torch.ones(2, 100, dtype=torch.int64)
    mask[1, :40] = 0  # on the left
    arguments = {"max_new_tokens": 5, "do_sample": False}
    both = model.generate(ids[:, :100].masked_fill(mask == 0, 0), attention_mask=mask, **arguments)
    alone = model.generate(ids[1:, 40:100], attention_mask=mask[1:, 40:], **arguments)
    assert torch.equal(both[1, 100:], alone[0, 60:])


def test_cross_attention_does_not_turn():
    model = make_model(is_decoder=True, add_cross_attention=True, **KINDS["pre"])
    ids, read = random_ids(1, 50), torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0))
    given = {"encoder_hidden_states": read, "use_cache": False}
    here = states(model, ids, **given)
    assert_close(states(model, ids, position_ids=torch.arange(500, 550)[None], **given), here, 1e-4)
    assert_close(states(model, ids, encoder_hidden_states=read.flip(1), use_cache=False), here)


def test_layers_that_are_called_alone():
    model = make_model(**KINDS["pre"], attention_type="original_full")
    ids = random_ids(1, 40)
    found = model.embeddings(ids)
    for layer in model.encoder.layer:
        found = layer(found)[0]
    assert_close(model.encoder.LayerNorm(found), states(model, ids))
    assert_close(model.encoder(model.embeddings(ids)).last_hidden_state, states(model, ids))


def test_gradient_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        model = make_model(**KINDS["pre"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(random_ids(1, 200)).last_hidden_state.sin().sum().backward()
        gradients.append([p.grad for name, p in model.named_parameters() if "pooler" not in name])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_saved_and_loaded(tmp_path):
    for kind, settings in KINDS.items():
        model = make_model("BigBirdForMaskedLM", **settings)
        model.save_pretrained(tmp_path / kind)
        again = bigbird_plus.BigBirdForMaskedLM.from_pretrained(tmp_path / kind).eval()
        ids = random_ids(1, 120)
        assert {name: getattr(again.config, name) for name in settings} == settings
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_there_are_no_positions_to_resize():
    model = make_model(**ROTARY)
    assert not any("position" in name for name in model.state_dict())
    with pytest.raises(ValueError, match=r"position_embedding_type is 'rotary'.* nothing needs resizing"):
        model.resize_position_embeddings(512)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type must be 'absolute' or 'rotary'",
        ),
        ({"norm_position": "before"}, "norm_position must be 'post' or 'pre', but is 'before'"),
        ({**ROTARY, "rotary_dim": 3}, "rotary_dim must be an even number from 2 .*8.* 3 and 50.0"),
        ({**ROTARY, "rotary_dim": 10}, "rotary_dim .* 10 and"),
        ({**ROTARY, "rope_theta": 0}, "rope_theta more than 0.* 4 and 0"),
        ({"rope_theta": "large"}, "rope_theta must be a number"),
        ({"final_layer_norm": 1}, "final_layer_norm must be True or False, but is 1"),
        ({"embedding_size": 0}, "embedding_size must be a whole number of at least 1, but is 0"),
    ],
)
def test_what_makes_no_model(settings, message):
    with pytest.raises(ValueError, match=message):
        BigBirdConfig(**tiny_settings(**settings))
