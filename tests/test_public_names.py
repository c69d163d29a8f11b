"""What users may rely on: public names, and the arguments of what they call. A change here is a change for them."""

import inspect

import pytest

import bigbird_plus

NAMES = """
BigBirdConfig BigBirdForCausalLM BigBirdForMaskedLM BigBirdForMultipleChoice BigBirdForPreTraining
BigBirdForPreTrainingOutput BigBirdForQuestionAnswering BigBirdForQuestionAnsweringModelOutput
BigBirdForSequenceClassification BigBirdForTokenClassification BigBirdInt8Config BigBirdModel
BigBirdPegasusForConditionalGeneration BigBirdPegasusForQuestionAnswering BigBirdPegasusForSequenceClassification
BigBirdPegasusModel BigBirdPreTrainedModel BigBirdTokenizer BigBirdTokenizerFast BlockPattern
DataCollatorForDocuments ExtractiveQuestionAnsweringPipeline Sparsity SummarizationPipeline block_sparse_attention
context_parallel convert_checkpoint demo_checkpoint plot_attention quantize register register_engine replace_builtin
unregister
"""

INPUTS = "input_ids attention_mask token_type_ids position_ids head_mask inputs_embeds"
WANTED = "output_attentions output_hidden_states return_dict"
ENCODER = "encoder_hidden_states encoder_attention_mask"
ARGUMENTS = {
    "BigBirdModel": f"{INPUTS} {ENCODER} past_key_values use_cache {WANTED} cache_position global_attention_mask "
    "computes_padding cache kwargs",
    "BigBirdForPreTraining": f"{INPUTS} labels next_sentence_label {WANTED} global_attention_mask kwargs",
    "BigBirdForMaskedLM": f"{INPUTS} {ENCODER} labels {WANTED} past_key_values global_attention_mask kwargs",
    "BigBirdForCausalLM": f"{INPUTS} {ENCODER} past_key_values labels use_cache {WANTED} cache_position "
    "logits_to_keep global_attention_mask cache kwargs",
    "BigBirdForSequenceClassification": f"{INPUTS} labels {WANTED} past_key_values global_attention_mask use_cache "
    "kwargs",
    "BigBirdForMultipleChoice": f"{INPUTS} labels {WANTED} global_attention_mask",
    "BigBirdForTokenClassification": f"{INPUTS} labels {WANTED} past_key_values global_attention_mask kwargs",
    "BigBirdForQuestionAnswering": "input_ids attention_mask question_lengths token_type_ids position_ids head_mask "
    f"inputs_embeds start_positions end_positions {WANTED} past_key_values global_attention_mask",
}


def test_names():
    assert sorted(bigbird_plus.__all__) == sorted(NAMES.split())
    for name in bigbird_plus.__all__:
        assert getattr(bigbird_plus, name).__doc__, name


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_models(name):
    _, *arguments = inspect.signature(getattr(bigbird_plus, name).forward).parameters
    assert arguments == ARGUMENTS[name].split()


def test_arguments_of_the_operator():
    expected = """
    query key value block_size num_random_blocks num_sliding_window_blocks num_global_blocks global_block_indices
    different_layout_per_head attention_mask global_attention_mask layer_idx training eval_random_blocks
    max_position_embeddings scaling implementation output_attentions
    """
    assert list(inspect.signature(bigbird_plus.block_sparse_attention).parameters) == expected.split()
