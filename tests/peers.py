"""Small models, and transformers' own BigBird with the same weights to compare them with."""

import numpy as np
import pytest
import torch
import transformers

import bigbird_plus

TASK_MODELS = (
    "BigBirdForPreTraining",
    "BigBirdForMaskedLM",
    "BigBirdForCausalLM",
    "BigBirdForSequenceClassification",
    "BigBirdForMultipleChoice",
    "BigBirdForTokenClassification",
    "BigBirdForQuestionAnswering",
)
MODELS = ("BigBirdModel", *TASK_MODELS)


def few_are_quick(names, quick=("BigBirdModel", "BigBirdForCausalLM")):
    """Parameters of a test that takes its time: all of `names`, and some of them where slow tests are left out."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def tiny_settings(**overrides) -> dict:
    """Arguments of a configuration that is small and, from 89 tokens on (r = 3), sparse."""
    settings = {
        "vocab_size": 120,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
        "block_size": 8,
        "num_random_blocks": 3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return {**settings, **overrides}


def scale_weights(model, seed=0):
    """Weights with which every layer matters and nothing saturates, in place of the tiny ones of a new model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                spread = 0.6 if "embeddings" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(spread * noise)
            else:
                parameter.copy_(0.1 * noise + ("LayerNorm.weight" in name))
    return model


def make_model(name="BigBirdModel", seed=0, **overrides):
    """Our model of a class, small, in eval mode, with weights that `seed` determines."""
    model = getattr(bigbird_plus, name)(bigbird_plus.BigBirdConfig(**tiny_settings(**overrides)))
    return scale_weights(model, seed).eval()


def make_pair(name="BigBirdModel", seed=0, **overrides):
    """The same and transformers' own, with the same weights."""
    ours = make_model(name, seed, **overrides)
    theirs = getattr(transformers, name)(transformers.BigBirdConfig(**tiny_settings(**overrides))).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def own_random_blocks(heads, rows, most, seed=0):
    """`BigBirdConfig.random_blocks`: in each row some blocks, up to `most`."""
    draw = np.random.RandomState(seed)
    table = [[draw.permutation(rows)[: draw.randint(most + 1)] for _ in range(rows)] for _ in range(heads)]
    return ";".join(",".join(" ".join(map(str, row)) for row in head) for head in table)


def random_ids(*shape, seed=0, low=3, high=120):
    """Token ids, none of them padding."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def random_inputs(name, batch, length, *, padded=True, seed=0, labels=True, num_labels=2):
    """Inputs for a model class, with labels. Padded rows get shorter and shorter."""
    shape = (batch, 3, length) if name == "BigBirdForMultipleChoice" else (batch, length)
    inputs = {"input_ids": random_ids(*shape, seed=seed)}
    inputs["input_ids"][..., length // 3] = 66  # [SEP], for question answering
    if padded:
        real = length - torch.arange(batch) * (length // 4)
        mask = (torch.arange(length) < real[:, None]).long()
        inputs["attention_mask"] = mask if len(shape) == 2 else mask[:, None].expand(shape).contiguous()
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 0)
    if labels:
        inputs.update(_labels(name, batch, length, inputs, num_labels))
    return inputs


def _labels(name, batch, length, inputs, num_labels):
    generator = torch.Generator().manual_seed(9)
    if name in ("BigBirdForPreTraining", "BigBirdForMaskedLM", "BigBirdForCausalLM", "BigBirdForTokenClassification"):
        classes = num_labels if name == "BigBirdForTokenClassification" else 120
        labels = torch.randint(0, classes, (batch, length), generator=generator)
        mask = inputs.get("attention_mask")
        labels = labels if mask is None else labels.masked_fill(mask == 0, -100)
        if name == "BigBirdForPreTraining":
            return {"labels": labels, "next_sentence_label": torch.randint(0, 2, (batch,), generator=generator)}
        return {"labels": labels}
    if name == "BigBirdForQuestionAnswering":
        start = torch.randint(length // 2, length, (batch,), generator=generator)
        return {"start_positions": start, "end_positions": start + 2}
    if name == "BigBirdModel":
        return {}
    return {"labels": torch.randint(0, num_labels, (batch,), generator=generator)}
