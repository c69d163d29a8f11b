"""What a model reads: exactly what its pattern names, the chosen tokens, and the extra ones."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

import bigbird_plus
from bigbird_plus import BigBirdConfig, BigBirdModel, Sparsity

from .peers import random_ids

SMALL = {
    "vocab_size": 99,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 256,
    "block_size": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.5,
}
ENGINES = ["sdpa", "eager"]
HEADS = [
    "BigBirdForPreTraining",
    "BigBirdForMaskedLM",
    "BigBirdForSequenceClassification",
    "BigBirdForTokenClassification",
    "BigBirdForQuestionAnswering",
]


def make_model(name="BigBirdModel", implementation="sdpa", **fields):
    torch.manual_seed(0)
    config = BigBirdConfig(**{**SMALL, **fields})
    return getattr(bigbird_plus, name)._from_config(config, attn_implementation=implementation).double().eval()


def tokens_read(model, place, length, **inputs):
    """The places whose embeddings have a part in the state at `place`."""
    embeds = torch.randn(1, length, SMALL["hidden_size"], dtype=torch.float64, requires_grad=True)
    state = model(inputs_embeds=embeds, **inputs).last_hidden_state[0, place]
    (grad,) = torch.autograd.grad((state * torch.randn_like(state)).sum(), embeds)
    return set(grad[0].abs().sum(-1).nonzero().flatten().tolist())


def tokens_of(blocks, block_size=2):
    return {block * block_size + place for block in blocks for place in range(block_size)}


@pytest.mark.torch_only
@pytest.mark.parametrize("implementation", ENGINES)
@pytest.mark.parametrize("num_global", range(5))
@pytest.mark.parametrize("window", [1, 3, 5, 7])
def test_each_token_reads_exactly_what_the_pattern_names(window, num_global, implementation):
    shape = {"num_sliding_window_blocks": window, "num_global_blocks": num_global, "num_random_blocks": 0}
    model = make_model(implementation=implementation, **shape)
    count = window + num_global + 4
    leading = (num_global + 1) // 2
    always = {*range(leading), *range(count - num_global // 2, count)}
    for block in range(count):
        near = {other for other in range(count) if abs(other - block) <= window // 2}
        expected = range(count) if block in always else always | near
        assert tokens_read(model, 2 * block + 1, 2 * count) == tokens_of(expected)


@pytest.mark.torch_only
@pytest.mark.parametrize("implementation", ENGINES)
@pytest.mark.parametrize("shared", [False, True])
def test_random_blocks_of_other_shapes_are_read_in_evaluation(implementation, shared):
    shape = {"num_sliding_window_blocks": 1, "num_global_blocks": 1, "num_random_blocks": 2}
    model = make_model(implementation=implementation, different_layout_per_head=not shared, **shape)
    drawn = Sparsity.from_config(model.config).pattern(12).random_blocks
    assert drawn.shape == (1 if shared else 2, 12, 2)
    for block in range(1, 12):
        random = set(drawn[:, block].flatten().tolist())
        assert not random & {0, block}
        assert all(len(set(blocks)) == 2 for blocks in drawn[:, block].tolist())
        assert tokens_read(model, 2 * block, 24) == tokens_of({0, block} | random)


@pytest.mark.torch_only
@pytest.mark.parametrize("implementation", ENGINES)
@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([0, 5, -1], {0, 5, 11}),
        ([3, -2, 40, -40], {3, 10}),
        ([4, -8], {4}),
        ([], set()),
        ([1, 0, 2, -1, -2], {0, 1, 2, 10, 11}),
    ],
)
def test_global_blocks_by_index(indices, expected, implementation):
    model = make_model(implementation=implementation, global_block_indices=indices, num_random_blocks=0)
    for block in range(12):
        near = {other for other in range(12) if abs(other - block) <= 1}
        reads = range(12) if block in expected else near | expected
        assert tokens_read(model, 2 * block, 24) == tokens_of(reads)


def test_the_ends_by_index_are_the_published_pattern():
    named, counted = (
        Sparsity(num_attention_heads=2, **which)
        for which in ({"global_block_indices": (-1, 0)}, {"num_global_blocks": 2})
    )
    assert named.full_attention_length == counted.full_attention_length
    for training in (False, True):
        np.testing.assert_array_equal(
            named.pattern(16, layer_idx=3, training=training).counts,
            counted.pattern(16, layer_idx=3, training=training).counts,
        )


def test_a_shared_layout_is_that_of_a_single_head():
    shared, single, different = (
        Sparsity(num_attention_heads=heads, different_layout_per_head=differs).pattern(20, layer_idx=2, training=True)
        for heads, differs in ((4, False), (1, True), (4, True))
    )
    np.testing.assert_array_equal(shared.counts, single.counts)
    assert different.counts.shape[0] == 4
    assert (different.counts[0] != different.counts[1]).any()


@pytest.mark.torch_only
@pytest.mark.parametrize("implementation", ENGINES)
@pytest.mark.parametrize("num_global", [0, 2])
def test_chosen_tokens_read_all_and_are_read_by_all(implementation, num_global):
    model = make_model(implementation=implementation, num_random_blocks=0, num_global_blocks=num_global)
    length, chosen = 29, [9, 14, 20]
    mask = torch.zeros(1, length, dtype=torch.long)
    mask[0, chosen] = 1
    for place in range(length):
        without = tokens_read(model, place, length)
        with_mask = tokens_read(model, place, length, global_attention_mask=mask)
        assert with_mask == (set(range(length)) if place in chosen else without | set(chosen))


@pytest.mark.torch_only
@pytest.mark.parametrize("implementation", ENGINES)
def test_padding_is_never_global(implementation):
    model = make_model(implementation=implementation, num_random_blocks=0)
    real = (torch.arange(30) < 25).long()[None]
    chosen = torch.zeros(1, 30, dtype=torch.long)
    chosen[0, [7, 27]] = 1
    reads = tokens_read(model, 12, 30, attention_mask=real, global_attention_mask=chosen)
    assert reads == tokens_of([0, 5, 6, 7]) | {7}
    assert tokens_read(model, 27, 30, attention_mask=real, global_attention_mask=chosen) <= {27}


def test_a_token_that_the_pattern_reads_several_times_stays_so():
    """In evaluation block 0 counts `1 + num_random_blocks` times; choosing its tokens changes that for none."""
    model = make_model(num_random_blocks=2)
    ids, chosen = random_ids(1, 40, high=99), torch.zeros(1, 40, dtype=torch.long)
    chosen[0, 0] = 1
    with torch.no_grad():
        plain, marked = (model(ids, **kwargs).last_hidden_state for kwargs in ({}, {"global_attention_mask": chosen}))
    torch.testing.assert_close(plain, marked)


def inputs_with_padding(side):
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(60) < torch.tensor([[60], [37], [9], [31]])).long()
    mask = mask.flip(1) if side == "left" else mask
    chosen = (torch.rand(4, 60, generator=generator) < 0.15).long()
    chosen[3] = 0
    return random_ids(4, 60, high=99), mask, chosen


@pytest.mark.torch_only
@pytest.mark.parametrize("fields", [{}, {"num_extra_global_tokens": 3}, {"global_block_indices": [0, 6, -2]}])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_engines_agree_packed_or_not(side, training, fields):
    ids, mask, chosen = inputs_with_padding(side)
    results = []
    for implementation, computes_padding in (("eager", True), ("sdpa", True), ("sdpa", False)):
        model = make_model(implementation=implementation, num_random_blocks=2, num_hidden_layers=2, **fields)
        model.train(training)
        model.freeze_pooler()
        inputs = {"attention_mask": mask, "global_attention_mask": chosen, "output_attentions": True}
        output = model(ids, computes_padding=computes_padding, **inputs)
        (output.last_hidden_state * mask[..., None]).sin().sum().backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        attentions = [probabilities * mask[:, None, :, None] for probabilities in output.attentions]
        results.append([output.last_hidden_state * mask[..., None], *attentions, *grads])
    for other in results[1:]:
        for expected, actual in zip(results[0], other, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.torch_only
@pytest.mark.parametrize("implementation", ENGINES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_documents_of_a_batch_get_what_they_get_alone(side, implementation):
    fields = {"pattern_per_document": True, "num_extra_global_tokens": 2, "global_block_indices": [0, 3, -1]}
    model = make_model(implementation=implementation, num_random_blocks=1, num_hidden_layers=2, **fields)
    ids, mask, chosen = inputs_with_padding(side)
    with torch.no_grad():
        together = model(ids, attention_mask=mask, global_attention_mask=chosen).last_hidden_state
        for row in range(4):
            real = mask[row].bool()
            alone = model(ids[row][real][None], global_attention_mask=chosen[row][real][None]).last_hidden_state
            torch.testing.assert_close(together[row][real], alone[0])


def test_choosing_tokens_has_no_effect_in_full_attention():
    model = make_model(attention_type="original_full")
    ids, mask, chosen = inputs_with_padding("right")
    with torch.no_grad():
        plain, marked = (
            model(ids, attention_mask=mask, **kwargs).last_hidden_state
            for kwargs in ({}, {"global_attention_mask": chosen})
        )
    assert torch.equal(plain, marked)


@pytest.mark.parametrize("name", HEADS)
def test_every_head_passes_the_chosen_tokens_on(name):
    model = make_model(name, num_random_blocks=0, num_hidden_layers=2)
    ids = random_ids(2, 40, high=99)
    chosen = torch.zeros(2, 40, dtype=torch.long)
    chosen[:, 20] = 1
    with torch.no_grad():
        plain, marked = (model(ids, **kwargs)[0] for kwargs in ({}, {"global_attention_mask": chosen}))
        states = model.bert(ids, global_attention_mask=chosen).last_hidden_state
        assert not torch.allclose(states, model.bert(ids).last_hidden_state)
    assert not torch.allclose(plain, marked)


def test_multiple_choice_passes_the_chosen_tokens_of_each_choice_on():
    model = make_model("BigBirdForMultipleChoice", num_random_blocks=0, num_hidden_layers=2)
    ids = random_ids(2, 3 * 40, high=99).view(2, 3, 40)
    chosen = torch.zeros(2, 3, 40, dtype=torch.long)
    chosen[1, 2, 20] = 1
    with torch.no_grad():
        difference = model(ids).logits - model(ids, global_attention_mask=chosen).logits
    assert (difference != 0).nonzero().tolist() == [[1, 2]]


def test_trainer_and_tokenizer_keep_the_mask(checkpoint, tmp_path):
    """From rows of a data set to the model: `Trainer` drops columns that are no argument of `forward`."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = [dict(tokenizer(text)) for text in ("The lamp", "A lamp in the window")]
    for row in rows:
        row.update(global_attention_mask=[1] + [0] * (len(row["input_ids"]) - 1), label=0, text="dropped")
    model = make_model("BigBirdForSequenceClassification", vocab_size=len(tokenizer)).float()
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    arguments = TrainingArguments(tmp_path, per_device_eval_batch_size=2, report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments, data_collator=DataCollatorWithPadding(tokenizer))
    trainer.predict(Dataset.from_list(rows))
    (inputs,) = seen
    assert "text" not in inputs
    assert inputs["global_attention_mask"].sum(-1).tolist() == [1, 1]
    assert inputs["global_attention_mask"].shape == inputs["input_ids"].shape


def test_the_tokens_of_the_question_can_be_global():
    model = make_model("BigBirdForQuestionAnswering", num_random_blocks=0, global_question_tokens=True)
    plain = make_model("BigBirdForQuestionAnswering", num_random_blocks=0)
    ids = random_ids(2, 40, high=66)
    ids[:, 6] = 66
    chosen = (torch.arange(40) < 7).long().expand(2, -1)
    with torch.no_grad():
        expected = plain(ids, global_attention_mask=chosen)
        for kwargs in ({}, {"question_lengths": torch.tensor([[7], [7]])}):
            actual = model(ids, **kwargs)
            torch.testing.assert_close(actual.start_logits, expected.start_logits)
            assert not torch.allclose(actual.start_logits, plain(ids).start_logits)


# ---------------------------------------------------------------------------------------------------------------------
# Extra tokens
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.torch_only
@pytest.mark.parametrize("implementation", ENGINES)
def test_only_extra_tokens_carry_information_across_a_document_in_two_layers(implementation):
    shape = {"num_global_blocks": 0, "num_random_blocks": 0, "num_hidden_layers": 2}
    for count in (0, 2):
        model = make_model(implementation=implementation, num_extra_global_tokens=count, **shape)
        reads = tokens_read(model, 79, 80)
        assert reads == (set(range(80)) if count else tokens_of(range(37, 40)) | tokens_of([37]))


@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
def test_extra_tokens_are_no_part_of_the_output(attention_type):
    model = make_model(num_extra_global_tokens=3, attention_type=attention_type, num_hidden_layers=2)
    ids, mask, _ = inputs_with_padding("right")
    with torch.no_grad():
        output = model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
        alone = model(ids[:1], output_attentions=True)
    assert output.last_hidden_state.shape == (4, 60, 16)
    assert {state.shape for state in output.hidden_states} == {output.last_hidden_state.shape}
    for attentions in (output.attentions, alone.attentions):
        for probabilities in attentions:
            assert probabilities.shape[2:] == (60, 60)
            sums = probabilities[0].sum(-1)
            assert (sums > 0).all()
            assert (sums < 1 + 1e-12).all()
            assert sums.mean() < 0.99
    torch.testing.assert_close(output.last_hidden_state[0], alone.last_hidden_state[0])


def test_extra_tokens_take_part_in_full_attention_as_if_they_were_tokens():
    """With an attention mask of any shape, and for inputs too short for sparse attention."""
    model = make_model(num_extra_global_tokens=2)
    ids = random_ids(2, 10, high=99)
    mask = (torch.arange(10) < torch.tensor([[10], [6]])).long()
    added = torch.zeros(2, 1, 10, 10, dtype=torch.float64).masked_fill(mask[:, None, None] == 0, -1e30)
    with torch.no_grad():
        outputs = [
            model(ids, attention_mask=given).last_hidden_state[mask.bool()]
            for given in (mask, mask[:, None].expand(-1, 10, -1), added)
        ]
        short = model(ids[1:, :6]).last_hidden_state[0]
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(outputs[2], outputs[0])
    torch.testing.assert_close(outputs[0][10:], short)


def test_the_threshold_and_the_positions_do_not_count_extra_tokens():
    model = make_model(num_extra_global_tokens=5, max_position_embeddings=22, num_random_blocks=3)
    assert Sparsity.from_config(model.config).full_attention_length == 22
    assert model(random_ids(1, 22, high=99)).last_hidden_state.shape == (1, 22, 16)
    assert model.embeddings.position_embeddings.num_embeddings == 22


def test_a_checkpoint_without_extra_tokens_gets_new_ones(tmp_path):
    make_model().save_pretrained(tmp_path / "plain")
    model, info = BigBirdModel.from_pretrained(tmp_path / "plain", num_extra_global_tokens=4, output_loading_info=True)
    assert set(info["missing_keys"]) == {"embeddings.extra_global_tokens.weight"}
    weight = model.embeddings.extra_global_tokens.weight
    assert weight.shape == (4, 16)
    assert 0.2 < weight.std() < 0.8
    model.save_pretrained(tmp_path / "extra")
    again = BigBirdModel.from_pretrained(tmp_path / "extra")
    assert again.config.num_extra_global_tokens == 4
    assert torch.equal(again.embeddings.extra_global_tokens.weight, weight)


def test_extra_tokens_learn():
    model = make_model(num_extra_global_tokens=2).train()
    model(random_ids(2, 40, high=99)).last_hidden_state.sin().sum().backward()
    assert (model.embeddings.extra_global_tokens.weight.grad.abs().sum(-1) > 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"is_decoder": True, "num_extra_global_tokens": 2}, ["num_extra_global_tokens", "is_decoder"]),
        ({"is_decoder": True, "global_block_indices": [0]}, ["global_block_indices", "is_decoder"]),
        ({"is_decoder": True, "global_question_tokens": True}, ["global_question_tokens", "is_decoder"]),
        ({"global_block_indices": [0], "num_global_blocks": 4}, ["global_block_indices", "num_global_blocks"]),
        ({"global_block_indices": [0.5]}, ["global_block_indices"]),
        ({"global_block_indices": 3}, ["global_block_indices"]),
        ({"num_extra_global_tokens": -1}, ["num_extra_global_tokens"]),
        ({"different_layout_per_head": 3}, ["different_layout_per_head"]),
    ],
)
def test_fields_that_make_no_model_are_named(fields, names):
    with pytest.raises(ValueError) as raised:
        BigBirdConfig(**{**SMALL, **fields})
    assert all(name in str(raised.value) for name in names)


def test_masks_that_do_not_fit_are_refused():
    ids = random_ids(2, 40, high=99)
    with pytest.raises(ValueError, match=r"global_attention_mask must have the shape .* \[2, 40\], but has \[2, 41\]"):
        make_model()(ids, global_attention_mask=torch.zeros(2, 41))
    with pytest.raises(ValueError, match=r"global_attention_mask is for encoders.*is_decoder"):
        make_model(is_decoder=True)(ids, global_attention_mask=torch.zeros(2, 40))
    with pytest.raises(ValueError, match=r"global_attention_mask cannot be used under torch\.compile"):
        torch.export.export(
            make_model(), (), {"input_ids": ids, "global_attention_mask": torch.ones_like(ids)}, strict=False
        )


def test_configurations_keep_their_fields(tmp_path):
    fields = {"global_block_indices": [0, 5, -1], "different_layout_per_head": False, "num_extra_global_tokens": 3}
    fields["global_question_tokens"] = True
    BigBirdConfig(**SMALL, **fields).save_pretrained(tmp_path)
    again = BigBirdConfig.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in fields} == fields
