"""`generate` on BigBird decoders, dense and sparse, alone and behind an encoder."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    EncoderDecoderCache,
    EncoderDecoderModel,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer

from bigbird_plus import BigBirdConfig, BigBirdForCausalLM, BigBirdModel

from ..peers import make_pair, random_ids, scale_weights, tiny_settings

FULL_LENGTH = 88  # up to here a sparse decoder of the tiny size reads everything
PROMPT, NEW = 78, 20
NO_REPEAT = {"no_repeat_ngram_size": 1}  # random weights like to say one word, which would hide wrong positions


def decoder(salt=0, **overrides):
    settings = tiny_settings(**{"is_decoder": True, "eos_token_id": None, **overrides})
    return scale_weights(BigBirdForCausalLM(BigBirdConfig(**settings)), salt).eval()


def generate(model, ids, **kwargs):
    settings = {"max_new_tokens": NEW, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    kwargs = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, **settings, **NO_REPEAT, **kwargs}
    return model.generate(ids, **kwargs)


def one_by_one(model, ids, steps):
    """Greedy decoding without anything to go wrong: the whole text anew for every token, no token twice."""
    for _ in range(steps):
        with torch.no_grad():
            scores = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, scores.scatter(1, ids, -torch.inf).argmax(-1, keepdim=True)], dim=1)
    return ids


def assert_same(actual, expected):
    """The same tokens, from the same scores."""
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert len(actual.scores) == len(expected.scores)
    for one, other in zip(actual.scores, expected.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Dense: transformers' own
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 2.0, "top_k": 0}],
    ids=["greedy", "beams", "sampling"],
)
def test_dense_text_is_that_of_transformers(how, use_cache):
    ours, theirs = make_pair("BigBirdForCausalLM", is_decoder=True, attention_type="original_full", eos_token_id=None)
    ids, results = random_ids(2, PROMPT), []
    for model in (ours, theirs):
        set_seed(3)
        results.append(generate(model, ids, use_cache=use_cache, **how))
    assert_same(*results)


def test_dense_text_of_a_left_padded_batch_is_that_of_transformers():
    ours, theirs = make_pair("BigBirdForCausalLM", is_decoder=True, attention_type="original_full", eos_token_id=None)
    ids = random_ids(2, PROMPT)
    ids[1, :30] = 0
    results = [generate(model, ids, attention_mask=(ids != 0).long()) for model in (ours, theirs)]
    assert_same(*results)


# ---------------------------------------------------------------------------------------------------------------------
# Sparse: across the border behind which not everything is read
# ---------------------------------------------------------------------------------------------------------------------


def test_greedy_text_is_what_the_model_says_one_by_one():
    model, ids = decoder(), random_ids(2, PROMPT)
    assert PROMPT < FULL_LENGTH < PROMPT + NEW
    assert generate(model, ids).sequences.tolist() == one_by_one(model, ids, NEW).tolist()
    dense = decoder(attention_type="original_full")
    assert generate(dense, ids).sequences.tolist() != generate(model, ids).sequences.tolist()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2},
    ],
    ids=["greedy", "beams", "sampling"],
)
def test_caches_do_not_change_the_text(cache, how, implementation):
    model, ids, results = decoder(attn_implementation=implementation), random_ids(2, PROMPT), []
    for kwargs in ({"use_cache": False}, cache):
        set_seed(5)
        results.append(generate(model, ids, **how, **kwargs))
    assert_same(*results)
    assert isinstance(results[1].past_key_values, StaticCache if cache else DynamicCache)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_left_padded_prompts_give_what_they_give_alone(cache):
    """One prompt is longer than what is read in full, the other comes to be; each counts its own blocks."""
    model, long, short = decoder(), random_ids(1, 100), random_ids(1, 75, seed=1)
    ids = torch.cat([long, torch.nn.functional.pad(short, (25, 0))])
    cache = {"suppress_tokens": [0], **cache}  # in a padded prompt it counts as a repetition
    together = generate(model, ids, attention_mask=(ids != 0).long(), **cache)
    for row, alone in enumerate((long, short)):
        single = generate(model, alone, **cache)
        assert together.sequences[row, 100:].tolist() == single.sequences[0, alone.shape[1] :].tolist()
        for one, other in zip(together.scores, single.scores, strict=True):
            torch.testing.assert_close(one[row], other[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_prompts_in_pieces(size):
    model, ids = decoder(), random_ids(2, 120)
    assert_same(generate(model, ids, prefill_chunk_size=size), generate(model, ids, use_cache=False))


def test_a_conversation_goes_on_from_its_cache():
    model, ids, turn = decoder(), random_ids(1, PROMPT), random_ids(1, 9, seed=4)
    first = generate(model, ids)
    talk = torch.cat([first.sequences, turn], dim=1)
    assert_same(generate(model, talk, past_key_values=first.past_key_values), generate(model, talk, use_cache=False))


@pytest.mark.parametrize("salt", [0, 1])
def test_assisted_generation_takes_wrong_tokens_back(salt):
    model, ids = decoder(), random_ids(1, PROMPT)
    assistant = decoder(salt)
    result = generate(model, ids, assistant_model=assistant)
    assert result.sequences.tolist() == generate(model, ids, use_cache=False).sequences.tolist()


def test_prompt_lookup():
    model, ids = decoder(), random_ids(1, 30).repeat(1, 3)
    expected = generate(model, ids, use_cache=False, no_repeat_ngram_size=0)
    # This way of generating wants an end token: the one given is never chosen.
    result = generate(model, ids, prompt_lookup_num_tokens=4, no_repeat_ngram_size=0, eos_token_id=10_000)
    assert result.sequences.tolist() == expected.sequences.tolist()


def test_prompts_of_embeddings():
    model, ids = decoder(), random_ids(2, 120)
    expected = generate(model, ids, no_repeat_ngram_size=0)
    result = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids),
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    assert result.tolist() == expected.sequences[:, 120:].tolist()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_everything_generate_can_return(use_cache, implementation):
    model, ids = decoder(attn_implementation=implementation), random_ids(2, 86)
    wanted = {"output_logits": True, "output_attentions": True, "output_hidden_states": True}
    result = generate(model, ids, use_cache=use_cache, max_new_tokens=5, **wanted)
    for step in range(5):
        keys = 86 + step
        queries = 1 if use_cache and step else keys
        assert result.scores[step].shape == result.logits[step].shape == (2, 120)
        assert [hidden.shape for hidden in result.hidden_states[step]] == 3 * [(2, queries, 32)]
        assert [attention.shape for attention in result.attentions[step]] == 2 * [(2, 4, queries, keys)]
        for attention in result.attentions[step]:
            torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, queries))
            assert (attention[:, :, -1] == 0).any() == (keys > FULL_LENGTH)


def test_streamers_get_each_token_as_it_comes():
    class Streamer(BaseStreamer):
        tokens, ended = [], False

        def put(self, value):
            self.tokens.extend(value.flatten().tolist())

        def end(self):
            self.ended = True

    model, ids, streamer = decoder(), random_ids(1, PROMPT), Streamer()
    result = generate(model, ids, streamer=streamer)
    assert streamer.tokens == result.sequences[0].tolist()
    assert streamer.ended


def test_a_compiled_step_serves_all_places_of_a_static_cache():
    """As `generate` compiles it where there is a GPU."""
    model, ids = decoder(), random_ids(2, 110)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        expected = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
        cache = StaticCache(config=model.config, max_cache_len=120)
        model(
            ids[:, :80],
            attention_mask=mask[:, :80],
            position_ids=position_ids[:, :80],
            past_key_values=cache,
            cache_position=torch.arange(80),
        )
        full_mask = torch.nn.functional.pad(mask, (0, 10))
        for place in range(80, 110):
            output = compiled(
                ids[:, place : place + 1],
                attention_mask=full_mask,
                position_ids=position_ids[:, place : place + 1],
                past_key_values=cache,
                cache_position=torch.tensor([place]),
            )
            torch.testing.assert_close(output.logits[:, 0], expected[:, place], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Real text
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def writer(checkpoint, tmp_path_factory):
    """A folder of a decoder with the public vocabulary."""
    folder = tmp_path_factory.mktemp("writer")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, is_decoder=True)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


def test_text_generation_pipeline(writer):
    generator = pipeline("text-generation", model=str(writer), device="cpu")
    assert type(generator.model) is BigBirdForCausalLM
    assert generator.model.config.is_decoder
    prompt = "Paris is the capital of France, and "
    settings = {"max_new_tokens": 8, "do_sample": False, **NO_REPEAT}
    (text,) = generator(prompt, **settings)
    assert text["generated_text"].startswith(prompt)
    (only_new,) = generator(prompt, return_full_text=False, **settings)
    assert text["generated_text"] == prompt + only_new["generated_text"]
    both = generator([prompt, "Berlin "], batch_size=2, **settings)
    assert both[0] == [text]


def test_streamed_text_is_the_generated_text(writer):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(writer), AutoTokenizer.from_pretrained(writer)
    inputs = tokenizer("Paris is the capital of France.", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    settings = {"max_new_tokens": 8, "do_sample": False, **NO_REPEAT}
    tokens = model.generate(**inputs, streamer=streamer, **settings)
    expected = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "".join(streamer).strip() == expected.strip()


@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
def test_continuous_batching_is_refused(attention_type):
    model = decoder(attention_type=attention_type)
    with pytest.raises(ValueError, match=r"Pad the prompts on the left .* call generate"):
        model.generate_batch([[5, 6, 7], [8, 9]], generation_config=model.generation_config)
    with pytest.raises(ValueError, match="continuous batching"):
        model.init_continuous_batching()


# ---------------------------------------------------------------------------------------------------------------------
# Encoder and decoder
# ---------------------------------------------------------------------------------------------------------------------

SOURCE = 200


def encoder_decoder(kind="BigBird", **overrides):
    encoder = scale_weights(BigBirdModel(BigBirdConfig(**tiny_settings())))
    settings = tiny_settings(is_decoder=True, add_cross_attention=True, eos_token_id=None, block_size=4, **overrides)
    if kind == "BERT":
        for name in ("block_size", "num_random_blocks"):
            settings.pop(name)
        second = BertLMHeadModel(BertConfig(**settings))
    else:
        second = BigBirdForCausalLM(BigBirdConfig(**settings))
    model = EncoderDecoderModel(encoder=encoder, decoder=scale_weights(second, seed=1)).eval()
    for settings in (model.config, model.generation_config):
        settings.decoder_start_token_id, settings.pad_token_id = 1, 0
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def source():
    ids = random_ids(2, SOURCE)
    mask = torch.ones_like(ids)
    mask[1, 150:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def summarize(model, source, **kwargs):
    settings = {"max_new_tokens": 50, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    return model.generate(**source, **{**settings, **NO_REPEAT, **kwargs})


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("kind", ["BigBird", "BERT"])
def test_encoder_decoder_with_and_without_a_cache(kind, how, source):
    """The decoder, with blocks of half the size, writes past what a sparse one reads in full."""
    model = encoder_decoder(kind)
    with_cache, without = (summarize(model, source, use_cache=use_cache, **how) for use_cache in (True, False))
    assert_same(with_cache, without)
    cache = with_cache.past_key_values
    assert isinstance(cache, EncoderDecoderCache)
    assert cache.self_attention_cache.get_seq_length() == 50 > FULL_LENGTH // 2
    assert cache.cross_attention_cache.get_seq_length() == SOURCE


@pytest.mark.parametrize("kind", ["BigBird", "BERT"])
def test_encoder_decoder_learns(kind, source):
    model = encoder_decoder(kind).train()
    labels = random_ids(2, 120, seed=2)
    labels[1, 100:] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        outputs = model(**source, labels=labels)
        outputs.loss.backward()
        optimizer.step()
        losses.append(outputs.loss.item())
    assert outputs.logits.shape == (2, 120, 120)
    assert losses[-1] < losses[0] - 0.3
    without_gradient = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert all("pooler" in name for name in without_gradient)


def test_encoder_decoder_outputs(source):
    model = encoder_decoder(attn_implementation="eager")
    result = summarize(model, source, max_new_tokens=4, output_attentions=True, output_hidden_states=True)
    for step in range(4):
        assert [attention.shape for attention in result.cross_attentions[step]] == 2 * [(2, 4, 1, SOURCE)]
        assert [attention.shape for attention in result.decoder_attentions[step]] == 2 * [(2, 4, 1, step + 1)]
        assert result.cross_attentions[step][0][1, :, :, 150:].abs().max() == 0
    assert [attention.shape for attention in result.encoder_attentions] == 2 * [(2, 4, SOURCE, SOURCE)]


def test_encoder_decoder_saved_and_loaded(source, tmp_path):
    model = encoder_decoder()
    model.save_pretrained(tmp_path)
    again = EncoderDecoderModel.from_pretrained(tmp_path)
    assert (type(again.encoder), type(again.decoder)) == (BigBirdModel, BigBirdForCausalLM)
    assert_same(summarize(again, source, max_new_tokens=10), summarize(model, source, max_new_tokens=10))


def test_encoder_decoder_from_two_checkpoints(checkpoint, source):
    """Cross-attention is new, everything else is the checkpoint's."""
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(str(checkpoint), str(checkpoint))
    assert (type(model.encoder), type(model.decoder)) == (BigBirdModel, BigBirdForCausalLM)
    assert model.config.decoder.is_decoder
    assert model.config.decoder.add_cross_attention
    one, other = (part.state_dict() for part in (model.encoder, model.decoder.bert))
    name = "encoder.layer.1.attention.self.query.weight"
    assert torch.equal(one[name], other[name])
    settings = {"decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": None}
    with_cache, without = (
        summarize(model, source, max_new_tokens=6, use_cache=use_cache, **settings) for use_cache in (True, False)
    )
    assert_same(with_cache, without)
