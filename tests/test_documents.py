"""Rows that hold several documents: each gets what it gets alone, from every engine, in training and inference."""

from itertools import pairwise

import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from bigbird_plus.attention import common
from bigbird_plus.attention.documents import document_positions

from .peers import make_model, random_ids

LENGTHS = [130, 7, 96, 88, 130, 41, 1]  # sparse from 89 on; two alike, in neither order
ENGINES = ["sdpa", "eager", "gather", "merged"]


def documents():
    ids = random_ids(1, sum(LENGTHS))
    return list(ids.split(LENGTHS, dim=1))


def positions():
    return torch.cat([torch.arange(length) for length in LENGTHS])[None]


def cu_seq_lens():
    return torch.tensor([0, *LENGTHS]).cumsum(0).int()


def alone(model, **others):
    """The states of each document by itself, joined to one row."""
    return torch.cat([model(ids, **others).last_hidden_state for ids in documents()], dim=1)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=5e-6, rtol=1e-5)


@pytest.mark.torch_only
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
def test_states_and_gradients(attention_type, is_decoder, training, engine):
    model = make_model(attention_type=attention_type, is_decoder=is_decoder).train(training)
    model.set_attn_implementation(engine)
    results = []
    for together in (True, False):
        model.zero_grad()
        row = torch.cat(documents(), dim=1)
        states = model(row, position_ids=positions()).last_hidden_state if together else alone(model)
        states.sin().sum().backward()
        results.append([states, *(p.grad for name, p in model.named_parameters() if "pooler" not in name)])
    (actual, *grads), (expected, *expected_grads) = results
    close(actual, expected)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert (grad - wanted).norm() <= 1e-4 * wanted.norm() + 1e-5


@pytest.mark.parametrize("size", [1, 40 * 64 * 4, common.CHUNK_BYTES])
def test_large_inputs_that_are_streamed(size, monkeypatch):
    model = make_model()
    with torch.no_grad():
        expected = alone(model)
        monkeypatch.setattr(common, "CHUNK_BYTES", size)
        close(model(torch.cat(documents(), dim=1), position_ids=positions()).last_hidden_state, expected)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "position_ids"])
def test_each_way_to_say_it_is_enough(name):
    model, row = make_model(), torch.cat(documents(), dim=1)
    numbers = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[None]
    ways = {"position_ids": positions(), "seq_idx": numbers.int()}
    with torch.no_grad():
        actual = model(row, **{name: ways.get(name, cu_seq_lens())}, max_length_q=max(LENGTHS))
        close(actual.last_hidden_state, alone(model))
        pooled = torch.cat([model(ids).pooler_output for ids in documents()])
    assert actual.pooler_output.shape == (len(LENGTHS), 32)
    close(actual.pooler_output, pooled)


def test_several_rows_of_several_documents():
    model = make_model()
    ids = random_ids(2, 200)
    bounds = torch.tensor([0, 120, 200, 230, 330, 400])
    with torch.no_grad():
        actual = model(ids, cu_seq_lens_q=bounds)
        pieces = [ids.flatten()[first:end][None] for first, end in pairwise(bounds)]
        expected = [model(piece) for piece in pieces]
    close(actual.last_hidden_state.flatten(0, 1), torch.cat([one.last_hidden_state[0] for one in expected]))
    close(actual.pooler_output, torch.cat([one.pooler_output for one in expected]))


def test_it_is_what_a_padded_batch_with_patterns_per_document_gives():
    model, total = make_model(pattern_per_document=True), max(LENGTHS)
    mask = (torch.arange(total) < torch.tensor(LENGTHS)[:, None]).long()
    padded = torch.stack([torch.nn.functional.pad(ids[0], (0, total - ids.shape[1])) for ids in documents()])
    with torch.no_grad():
        expected = model(padded, attention_mask=mask)
        actual = model(torch.cat(documents(), dim=1), position_ids=positions())
    close(actual.last_hidden_state[0], expected.last_hidden_state[mask.bool()])
    close(actual.pooler_output, expected.pooler_output)


def test_attentions_and_hidden_states():
    model = make_model()
    wanted = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        actual = model(torch.cat(documents(), dim=1), position_ids=positions(), **wanted)
        expected = [model(ids, **wanted) for ids in documents()]
    for layer, states in enumerate(actual.hidden_states):
        close(states, torch.cat([one.hidden_states[layer] for one in expected], dim=1))
    for layer, probabilities in enumerate(actual.attentions):
        for head in range(4):
            blocks = torch.block_diag(*(one.attentions[layer][0, head] for one in expected))
            close(probabilities[0, head], blocks)


def test_global_tokens_of_each_document():
    model, row = make_model(num_extra_global_tokens=2), torch.cat(documents(), dim=1)
    chosen = (torch.arange(row.shape[1]) % 17 == 3).long()[None]
    with torch.no_grad():
        actual = model(row, position_ids=positions(), global_attention_mask=chosen).last_hidden_state
        each = zip(documents(), chosen.split(LENGTHS, dim=1), strict=True)
        expected = [model(ids, global_attention_mask=mask).last_hidden_state for ids, mask in each]
    close(actual, torch.cat(expected, dim=1))


def test_gradient_checkpointing():
    model, grads = make_model().train(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(torch.cat(documents(), dim=1), position_ids=positions()).last_hidden_state.sin().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-5


def test_positions_that_do_not_start_anew_at_zero_are_positions():
    model, ids = make_model(), random_ids(1, 120)
    with torch.no_grad():
        actual = model(ids, position_ids=torch.arange(120).flip(0)[None]).last_hidden_state
        shifted = model(ids, position_ids=torch.arange(2, 122)[None]).last_hidden_state
        embeds = model.embeddings.word_embeddings(ids)
        table = model.embeddings.position_embeddings.weight
        moved = embeds + table[torch.arange(120).flip(0)] - table[:120]
        expected = model(inputs_embeds=moved).last_hidden_state
    close(actual, expected)
    assert (shifted - actual).abs().max() > 1e-2


TWO = torch.tensor([0, 50, 100])


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"cu_seq_lens_q": TWO, "cu_seq_lens_k": torch.tensor([0, 40, 100])}, ValueError, "contradict"),
        ({"cu_seq_lens_q": TWO, "position_ids": torch.arange(100)[None]}, ValueError, "contradict"),
        ({"cu_seq_lens_q": torch.tensor([0, 50, 90])}, ValueError, "cu_seq_lens_q must rise from 0 to .* 100"),
        ({"cu_seq_lens_q": torch.tensor([50, 0, 100])}, ValueError, "cu_seq_lens_q must rise"),
        ({"cu_seq_lens_q": TWO, "attention_mask": torch.arange(100)[None]}, ValueError, "attention_mask"),
        ({"seq_idx": torch.zeros(100)}, ValueError, r"seq_idx must have the shape .*\[1, 100\]"),
        ({"cu_seq_len": TWO}, TypeError, "cu_seq_len"),
        ({"atention_mask": torch.ones(1, 100)}, TypeError, "atention_mask"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, error, named):
    with pytest.raises(error, match=named):
        make_model()(random_ids(1, 100), **arguments)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_cuda_graphs_stop_at_several_documents(is_decoder, monkeypatch):
    model, row, places = make_model(is_decoder=is_decoder), random_ids(1, 200), torch.arange(200)[None]
    mask = (places >= 9).long()
    expected = model(row).last_hidden_state
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    close(model(row, position_ids=places).last_hidden_state, expected)
    left_padded = model(row, attention_mask=mask, position_ids=(places - 9).clamp(min=0)).last_hidden_state
    assert left_padded[:, 9:].isfinite().all()
    with pytest.raises(RuntimeError, match="not for CUDA graphs"):
        model(row, position_ids=places % 100)


def test_decoders_return_no_cache_of_several_documents():
    model, row = make_model(is_decoder=True), torch.cat(documents(), dim=1)
    assert not model(row, position_ids=positions()).get("past_key_values")
    with pytest.raises(ValueError, match="use_cache"):
        model(row, position_ids=positions(), use_cache=True)


def test_positions_are_counted_anew():
    shape = (2, 6)
    bounds = torch.tensor([0, 2, 6, 9, 12])
    found = document_positions(None, None, shape, {"cu_seq_lens_q": bounds})
    assert found.tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2]]
    assert document_positions(None, None, shape, {"max_length_q": 4}) is None


@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
def test_compiled(attention_type):
    """Full attention in one graph; sparse attention as it is."""
    torch._dynamo.reset()
    model, row = make_model(attention_type=attention_type), torch.cat(documents(), dim=1)
    is_full = attention_type == "original_full"
    compiled = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=is_full)
    single = row[:, : model.config.max_position_embeddings]
    places = torch.arange(single.shape[1])[None]
    with torch.no_grad():
        close(compiled(row, position_ids=positions()).last_hidden_state, alone(model))
        close(compiled(single, position_ids=places).last_hidden_state, model(single).last_hidden_state)
        if is_full:
            compiled = torch.compile(model, backend="aot_eager", dynamic=True)
        close(compiled(row, cu_seq_lens_q=cu_seq_lens()).last_hidden_state, alone(model))
    torch._dynamo.reset()


@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
def test_the_compiled_loss_of_a_head(attention_type):
    torch._dynamo.reset()
    model = make_model("BigBirdForCausalLM", is_decoder=True, attention_type=attention_type)
    row = torch.cat(documents(), dim=1)
    inputs = {"labels": row, "position_ids": positions()}
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(row, **inputs).loss, model(row, **inputs).loss)
    torch._dynamo.reset()


def test_trainer_with_the_collator_that_flattens(tmp_path):
    """Unchanged: the loss of a batch is that of its documents."""
    model = make_model("BigBirdForCausalLM", is_decoder=True)
    samples = [{"input_ids": ids[0].tolist()} for ids in documents() if ids.shape[1] > 1]
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=len(samples), report_to=[], use_cpu=True, remove_unused_columns=False
    )
    trainer = Trainer(model, arguments, data_collator=DataCollatorWithFlattening(), eval_dataset=samples)
    loss = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        losses = [model(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in documents() if ids.shape[1] > 1]
    assert loss == pytest.approx(sum(losses).item() / sum(length - 1 for length in LENGTHS), rel=1e-4)


def labels_of(name):
    """For each document its labels alone, and those of all together."""
    if name == "BigBirdForSequenceClassification":
        each = [torch.tensor([index % 2]) for index in range(len(LENGTHS))]
        return [{"labels": one} for one in each], {"labels": torch.cat(each)}
    words = [ids % 2 for ids in documents()] if name == "BigBirdForTokenClassification" else documents()
    each, together = [{"labels": one} for one in words], {"labels": torch.cat(words, dim=1)}
    if name == "BigBirdForPreTraining":
        follows = [torch.tensor([index % 2]) for index in range(len(LENGTHS))]
        each = [{**one, "next_sentence_label": label} for one, label in zip(each, follows, strict=True)]
        together["next_sentence_label"] = torch.cat(follows)
    return each, together


@pytest.mark.parametrize(
    "name",
    [
        "BigBirdForPreTraining",
        "BigBirdForMaskedLM",
        "BigBirdForSequenceClassification",
        "BigBirdForTokenClassification",
    ],
)
def test_heads(name):
    model = make_model(name)
    each, together = labels_of(name)
    with torch.no_grad():
        actual = model(torch.cat(documents(), dim=1), cu_seq_lens_q=cu_seq_lens(), **together)
        expected = [model(ids, **labels) for ids, labels in zip(documents(), each, strict=True)]
    if name == "BigBirdForSequenceClassification":
        close(actual.logits, torch.cat([one.logits for one in expected]))
        close(actual.loss, torch.stack([one.loss for one in expected]).mean())
        return
    key = "prediction_logits" if name == "BigBirdForPreTraining" else "logits"
    torch.testing.assert_close(actual[key], torch.cat([one[key] for one in expected], dim=1), atol=1e-5, rtol=1e-4)
    if name == "BigBirdForPreTraining":
        scores = torch.cat([one.seq_relationship_logits for one in expected])
        close(actual.seq_relationship_logits, scores)
        return
    shares = [one.loss * ids.shape[1] for one, ids in zip(expected, documents(), strict=True)]
    torch.testing.assert_close(actual.loss, sum(shares) / sum(LENGTHS), atol=1e-5, rtol=1e-4)


def test_a_decoder_is_not_asked_for_the_first_token_of_a_document():
    model, row = make_model("BigBirdForCausalLM", is_decoder=True), torch.cat(documents(), dim=1)
    with torch.no_grad():
        actual = model(row, cu_seq_lens_q=cu_seq_lens(), labels=row).loss
        losses = [model(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in documents() if ids.shape[1] > 1]
    torch.testing.assert_close(actual, sum(losses) / sum(length - 1 for length in LENGTHS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["BigBirdForMultipleChoice", "BigBirdForQuestionAnswering"])
def test_heads_that_take_one_document_a_row_say_so(name):
    ids, places = random_ids(1, 20), torch.arange(20)[None] % 10
    if name == "BigBirdForMultipleChoice":
        ids, places = ids[:, None], places[:, None]
    with pytest.raises(ValueError, match=r"position_ids start anew.*one in each row"):
        make_model(name)(ids, position_ids=places)
    with pytest.raises(TypeError, match="cu_seq_lens_q"):
        make_model(name)(ids, cu_seq_lens_q=torch.tensor([0, 10, 20]))
