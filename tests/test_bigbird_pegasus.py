"""BigBird-Pegasus: transformers' own beside ours, the faults that ours has not, summaries, the command."""

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoTokenizer, BigBirdPegasusConfig, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

import bigbird_plus
from bigbird_plus import modeling_bigbird_pegasus as ours
from bigbird_plus.cli import main
from bigbird_plus.cpu import feed_forward
from bigbird_plus.demo import document

from .peers import own_random_blocks

HEADS = ["Model", "ForConditionalGeneration", "ForSequenceClassification", "ForQuestionAnswering"]
SHORT, LONG = 100, 250  # up to 112 tokens are read in full


def make_config(**fields):
    """Of a small model, with weights large enough to make a difference."""
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes |= {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.3}
    sizes |= {"vocab_size": 120, "max_position_embeddings": 512, "block_size": 16, "num_random_blocks": 1}
    return BigBirdPegasusConfig(**{**sizes, "dropout": 0.0, "attention_dropout": 0.0, **fields})


def make_pair(head="ForConditionalGeneration", **fields):
    """transformers' model, and ours with the same weights."""
    torch.manual_seed(0)
    name = f"BigBirdPegasus{head}"
    theirs, own = getattr(transformers, name)(make_config(**fields)), getattr(ours, name)(make_config(**fields))
    own.load_state_dict(theirs.state_dict())
    return theirs.eval(), own.eval()


def make_inputs(length=LONG, padding=60):
    """The last row of the batch has padding, and all end with the token that classifiers look for."""
    draw = torch.Generator().manual_seed(length)
    inputs = {"input_ids": torch.randint(3, 120, (2, length), generator=draw)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if padding:
        inputs["attention_mask"][1, -padding:] = 0
    return inputs


def gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return loss, found


def assert_same_gradients(expected, found):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert expected[1].keys() == found[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-5, name


@pytest.mark.parametrize("length", [SHORT, LONG, 256])
def test_same_states_and_logits(length):
    theirs, own = make_pair()
    inputs = make_inputs(length) | {"decoder_input_ids": torch.randint(3, 120, (2, 9)), "output_hidden_states": True}
    with torch.no_grad():
        expected, found = theirs(**inputs), own(**inputs)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=2e-5)
    real = inputs["attention_mask"].bool()
    assert len(found.encoder_hidden_states) == len(expected.encoder_hidden_states) == 3
    for state, other in zip(found.encoder_hidden_states, expected.encoder_hidden_states, strict=True):
        assert state.shape == (2, length, 32)
        torch.testing.assert_close(state[real], other[:, :length][real], rtol=1e-4, atol=5e-5)
        assert not state[~real].any()


@pytest.mark.parametrize("head", HEADS)
def test_same_outputs_of_every_head(head):
    theirs, own = make_pair(head)
    assert isinstance(own, type(theirs))
    assert theirs.state_dict().keys() == own.state_dict().keys()
    inputs = make_inputs(padding=0)
    inputs["input_ids"][:, -1] = own.config.eos_token_id
    with torch.no_grad():
        expected, found = theirs(**inputs), own(**inputs)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_same_gradients(training):
    """In training both read random blocks, and they are the same ones."""
    theirs, own = (model.train(training) for model in make_pair())
    inputs = make_inputs() | {"labels": torch.randint(3, 120, (2, 7))}
    assert_same_gradients(gradients(theirs, **inputs), gradients(own, **inputs))


def test_the_feed_forward_part_trains_as_one_unless_somebody_watches(monkeypatch):
    """With the same gradients."""
    _, own = make_pair()
    inputs, calls, found = make_inputs() | {"labels": torch.randint(3, 120, (2, 7))}, [], []
    monkeypatch.setattr(ours, "feed_forward", lambda *args: calls.append(1) or feed_forward(*args))
    for watched in (None, "fc1", "activation_fn"):
        calls.clear()
        if watched:
            hook = own.model.encoder.layers[0].get_submodule(watched).register_forward_hook(lambda *args: None)
        found.append(gradients(own, **inputs))
        assert len(calls) == (1 if watched else 2)
        if watched:
            hook.remove()
    assert_same_gradients(*found[:2])
    assert_same_gradients(found[0], found[2])


def test_checkpointing_gives_the_same_gradients():
    _, own = make_pair()
    inputs = make_inputs() | {"labels": torch.randint(3, 120, (2, 7))}
    expected = gradients(own.train(), **inputs)
    own.gradient_checkpointing_enable()
    assert_same_gradients(expected, gradients(own, **inputs))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_same_summaries(num_beams):
    theirs, own = make_pair()
    how = make_inputs() | {"num_beams": num_beams, "do_sample": False, "max_new_tokens": 12}
    how |= {"no_repeat_ngram_size": 1}  # random weights would write one word
    expected = theirs.generate(**how)
    assert own.generate(**how).tolist() == expected.tolist()
    assert len(set(expected.flatten().tolist())) > 8


def test_a_short_input_changes_nothing():
    theirs, own = make_pair("Model")
    inputs, short = make_inputs(padding=0), make_inputs(SHORT, padding=0)
    with torch.no_grad():
        before = [model(**inputs).encoder_last_hidden_state for model in (theirs, own)]
        for model in (theirs, own):
            model(**short)
        after = [model(**inputs).encoder_last_hidden_state for model in (theirs, own)]
    assert (after[0] - before[0]).abs().max() > 1e-3  # theirs reads in full from now on
    assert torch.equal(after[1], before[1])


def test_training_leaves_the_generator_of_numpy_alone():
    _, own = make_pair("Model")
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    own.train()(**make_inputs())
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_probabilities():
    _, own = make_pair("Model")
    inputs = make_inputs()
    found = own(**inputs, output_attentions=True)
    real = inputs["attention_mask"].bool()
    for probabilities in found.encoder_attentions:
        assert probabilities.shape == (2, 2, LONG, LONG)
        sums = probabilities.sum(-1).transpose(1, 2)
        torch.testing.assert_close(sums[real], torch.ones_like(sums[real]))
        assert not sums[~real].any()
    assert found.cross_attentions[0].shape == (2, 2, LONG, LONG)


@pytest.mark.parametrize("implementation", ["sdpa", "merged", "gather"])
@pytest.mark.parametrize("fields", [{}, {"random_blocks": own_random_blocks(2, 9, 1)}], ids=["drawn", "own"])
def test_every_implementation_gives_the_same(implementation, fields):
    _, own = make_pair(**fields)
    assert own.model.encoder.settings.random_blocks == fields.get("random_blocks")
    inputs = make_inputs() | {"decoder_input_ids": torch.randint(3, 120, (2, 9))}
    with torch.no_grad():
        assert own.config._attn_implementation == "eager"
        expected = own(**inputs).logits
        own.set_attn_implementation(implementation)
        torch.testing.assert_close(own(**inputs).logits, expected, rtol=1e-4, atol=2e-5)
        own.generate(**make_inputs(), max_new_tokens=3)


def test_attention_type():
    theirs, own = make_pair(attention_type="original_full")
    inputs = make_inputs() | {"decoder_input_ids": torch.randint(3, 120, (2, 9))}
    with torch.no_grad():
        full = own(**inputs).logits
        torch.testing.assert_close(full, theirs(**inputs).logits, rtol=1e-4, atol=2e-5)
        for one in (own, theirs.model.encoder):
            one.set_attention_type("block_sparse")
        sparse = own(**inputs).logits
        torch.testing.assert_close(sparse, theirs(**inputs).logits, rtol=1e-4, atol=2e-5)
    assert (sparse - full).abs().max() > 1e-3
    assert own.config.attention_type == "block_sparse"
    with pytest.raises(ValueError, match="attention_type"):
        own.set_attention_type("sparse")


def test_documents_of_a_batch_as_they_are_alone():
    _, own = make_pair("Model", pattern_per_document=True)
    inputs = make_inputs(padding=150)
    with torch.no_grad():
        together = own.encoder(**inputs).last_hidden_state
        alone = own.encoder(inputs["input_ids"][1:, :SHORT]).last_hidden_state
    torch.testing.assert_close(together[1:, :SHORT], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.full((1, 513), 5)}, "513 tokens"),
        ({"input_ids": torch.full((1, 9), 5), "inputs_embeds": torch.zeros(1, 9, 32)}, "input_ids or inputs_embeds"),
        ({"input_ids": torch.full((1, 9), 5), "attention_mask": torch.ones(1, 8)}, "attention_mask"),
    ],
)
def test_wrong_inputs(inputs, message):
    with pytest.raises(ValueError, match=message):
        ours.BigBirdPegasusModel(make_config()).encoder(**inputs)


# By name, and back


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder as the public repositories have it, but for the vocabulary: the demo's."""
    folder = tmp_path_factory.mktemp("pegasus")
    tokenizer = AutoTokenizer.from_pretrained(bigbird_plus.demo_checkpoint())
    tokenizer.model_max_length = 512
    theirs, _ = make_pair(vocab_size=len(tokenizer))
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_auto_classes(saved):
    for name, model_class in bigbird_plus.auto.PEGASUS_AUTO_MODELS.items():
        if hasattr(transformers, name) and name != "AutoModelWithLMHead":
            assert type(getattr(transformers, name).from_pretrained(saved)) is model_class
    bigbird_plus.unregister()
    try:
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(saved)
        assert type(model) is transformers.BigBirdPegasusForConditionalGeneration
    finally:
        bigbird_plus.register()


def test_classes_of_transformers_by_name():
    names = [f"BigBirdPegasus{head}" for head in HEADS]
    bigbird_plus.replace_builtin()
    try:
        module = transformers.models.bigbird_pegasus.modeling_bigbird_pegasus
        for name in [*names, "BigBirdPegasusEncoder"]:
            assert getattr(module, name) is getattr(ours, name)
        assert [name for name in names if getattr(transformers, name) is not getattr(ours, name)] == []
        own = transformers.BigBirdPegasusForConditionalGeneration(make_config())
        assert type(own.model.encoder) is ours.BigBirdPegasusEncoder
    finally:
        bigbird_plus.unregister()
        bigbird_plus.register()
    assert transformers.BigBirdPegasusModel is not ours.BigBirdPegasusModel


def test_saved_by_either_and_loaded_by_the_other(saved, tmp_path):
    own = bigbird_plus.BigBirdPegasusForConditionalGeneration.from_pretrained(saved)
    assert own.lm_head.weight is own.model.shared.weight is own.model.encoder.embed_tokens.weight
    own.config.pattern_per_document = True
    own.save_pretrained(tmp_path)
    again = bigbird_plus.BigBirdPegasusForConditionalGeneration.from_pretrained(tmp_path)
    assert again.model.encoder.settings.pattern_per_document
    theirs = transformers.BigBirdPegasusForConditionalGeneration.from_pretrained(tmp_path)
    inputs = make_inputs(padding=0)
    with torch.no_grad():
        torch.testing.assert_close(own(**inputs).logits, theirs(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["Model", "ForConditionalGeneration"])
def test_embeddings_that_are_not_tied(head, tmp_path):
    """transformers 4 writes those of encoder and decoder, which are the same, as one, and does not find them again."""
    theirs, own = make_pair(head, tie_word_embeddings=False)
    parts = [theirs.get_encoder(), theirs.get_decoder()]
    for scale, part in enumerate(parts, start=2):
        part.embed_tokens.weight = torch.nn.Parameter(scale * theirs.get_input_embeddings().weight.detach())
    inputs = make_inputs(padding=0)
    for is_one in (False, True):
        if is_one:
            for part in parts:
                part.embed_tokens.weight = theirs.get_input_embeddings().weight
        weights = {
            name: weight for name, weight in theirs.state_dict().items() if not is_one or "embed_tokens" not in name
        }
        theirs.save_pretrained(tmp_path / "theirs", state_dict=weights)
        own, report = type(own).from_pretrained(tmp_path / "theirs", output_loading_info=True)
        assert not report["missing_keys"]
        own.save_pretrained(tmp_path / "own")
        again = type(theirs).from_pretrained(tmp_path / "own")
        with torch.no_grad():
            expected = theirs(**inputs)[0]
            for model in (own.eval(), again.eval()):
                torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-4, atol=5e-5)


# Summaries


def test_pipeline(saved):
    """That which there is by name: transformers', or ours."""
    summarize = pipeline("summarization", model=saved, max_new_tokens=4, num_beams=2, truncation=True)
    assert type(summarize.model) is bigbird_plus.BigBirdPegasusForConditionalGeneration
    texts = [document()[:200], document()]
    one = summarize(texts[1])
    assert len(one) == 1
    assert isinstance(one[0]["summary_text"], str)
    assert summarize(texts)[1] == one[0]
    assert len(summarize(texts, batch_size=2)) == 2
    assert [len(both) for both in summarize(texts, num_return_sequences=2)] == [2, 2]


def test_our_pipeline(saved):
    """That which transformers 5 has no more."""
    model = bigbird_plus.BigBirdPegasusForConditionalGeneration.from_pretrained(saved)
    summarize = bigbird_plus.SummarizationPipeline(model, AutoTokenizer.from_pretrained(saved), max_new_tokens=4)
    is_registered = PIPELINE_REGISTRY.supported_tasks["summarization"]["impl"] is bigbird_plus.SummarizationPipeline
    assert is_registered == (not hasattr(transformers, "SummarizationPipeline"))
    excess = summarize.excess(document())
    assert excess > 1000
    assert summarize.excess(document()[:200]) == 0
    assert summarize(document()) == summarize(document(), truncation=True)
    with pytest.raises(ValueError, match="truncation=True"):
        summarize(document(), truncation=False)
    with pytest.raises(ValueError, match="string that is not empty"):
        summarize(["And it came to pass", " "])
    defaults = {"num_beams": 4, "max_new_tokens": 256}
    assert summarize._defaults({}) == defaults
    assert summarize._defaults({"max_length": 9}) == {"num_beams": 4}
    model.generation_config.update(num_beams=2, max_length=30)
    assert summarize._defaults({}) == {}


def test_command(saved, tmp_path, capsys):
    file = tmp_path / "ruth.txt"
    file.write_text(document(), encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["summarize", str(file), "--model", saved, "--max-new-tokens", "4", "--num-beams", "1"])
    printed = capsys.readouterr()
    assert not stop.value.code
    assert "does not read the last" in printed.err
    model, tokenizer = (auto.from_pretrained(saved) for auto in (transformers.AutoModelForSeq2SeqLM, AutoTokenizer))
    inputs = tokenizer(document(), truncation=True, max_length=512, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    written = model.generate(**inputs, max_new_tokens=4, num_beams=1)
    assert printed.out.strip() == tokenizer.decode(written[0], skip_special_tokens=True).strip()
    with pytest.raises(SystemExit):
        main(["summarize", str(file), "--model", str(bigbird_plus.demo_checkpoint())])
    assert capsys.readouterr().err.startswith("Error:")
