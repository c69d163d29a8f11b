"""Checkpoints that are written here and read by transformers alone, in a process without the package, and the other
way round."""

import pytest
import torch

import bigbird_plus
from tests import fresh
from tests.peers import MODELS, make_model, random_inputs

LANGUAGE_MODELS = ["BigBirdForPreTraining", "BigBirdForMaskedLM", "BigBirdForCausalLM"]
EXCHANGED = [*MODELS, *(f"{name}-untied" for name in LANGUAGE_MODELS), "BigBirdForCausalLM-decoder"]
# Lengths, and whether padded. The short one comes last: it switches transformers' model to full attention for ever.
INPUTS = {"padded": (131, True), "sparse": (128, False), "full": (40, False)}
SCRIPT = """
import sys, torch, transformers


def answer(model, inputs):
    with torch.no_grad():
        return [value for value in model(**inputs, return_dict=False) if isinstance(value, torch.Tensor)]


for folder in sys.argv[1:]:
    model_class = getattr(transformers, folder.split("-")[0])
    model, info = model_class.from_pretrained(f"{folder}/ours", output_loading_info=True)
    assert not any(info.values()), (folder, info)
    config = transformers.AutoConfig.from_pretrained(f"{folder}/ours")
    assert all(type(one).__module__.startswith("transformers.") for one in (model, config))
    inputs = torch.load(f"{folder}/inputs.pt")
    found = {"ours": {kind: answer(model, inputs[kind]) for kind in inputs}}
    for name, parameter in model.named_parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape) + ("LayerNorm.weight" in name)
    model.save_pretrained(f"{folder}/theirs")
    model = model_class.from_pretrained(f"{folder}/theirs")
    found["theirs"] = {kind: answer(model, inputs[kind]) for kind in inputs}
    torch.save(found, f"{folder}/outputs.pt")
assert not any(name.startswith("bigbird_plus") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def exchange(tmp_path_factory):
    """Every model, written by us, read by transformers, and written again with other weights; and what it makes of
    some inputs with each."""
    root = tmp_path_factory.mktemp("models")
    for folder in EXCHANGED:
        name, _, variant = folder.partition("-")
        settings = {"tie_word_embeddings": variant != "untied", "is_decoder": variant == "decoder", "use_cache": False}
        make_model(name, **settings).save_pretrained(root / folder / "ours")
        inputs = {
            kind: random_inputs(name, 2, length, padded=padded, labels=False)
            for kind, (length, padded) in INPUTS.items()
            if variant != "decoder" or kind == "full"  # their sparse decoder reads the future
        }
        torch.save(inputs, root / folder / "inputs.pt")
    fresh.run(SCRIPT, *EXCHANGED, folder=root)
    return root


@pytest.mark.parametrize("whose", ["ours", "theirs"])
@pytest.mark.parametrize("folder", EXCHANGED)
def test_both_read_the_same_files_alike(folder, whose, exchange):
    model_class = getattr(bigbird_plus, folder.split("-")[0])
    model, info = model_class.from_pretrained(exchange / folder / whose, output_loading_info=True)
    assert not any(info.values())
    everything = torch.load(exchange / folder / "outputs.pt")[whose]
    for kind, inputs in torch.load(exchange / folder / "inputs.pt").items():
        with torch.no_grad():
            outputs = model.eval()(**inputs, return_dict=False)
        found = [value for value in outputs if isinstance(value, torch.Tensor)]
        assert len(found) == len(everything[kind])
        mask = inputs.get("attention_mask")
        for one, other in zip(found, everything[kind], strict=True):
            real = mask.bool() if mask is not None and one.shape[:2] == mask.shape else ...
            torch.testing.assert_close(one[real], other[real], atol=2e-5, rtol=1e-5)
