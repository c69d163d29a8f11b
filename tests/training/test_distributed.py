"""Two processes do what one does."""

import json
import re
from pathlib import Path

import pytest
import torch
from accelerate import infer_auto_device_map
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.tensor.experimental import context_parallel

from bigbird_plus.trainer import ContextParallelTrainer
from tests import fresh
from tests.peers import MODELS, TASK_MODELS, random_ids
from tests.training import distributed
from tests.training.common import make_trainer, tiny_model
from tests.training.test_peft import assert_close, outputs

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def found_by_two(tmp_path_factory):
    """What the programs of `distributed` found in two real processes that talk through gloo."""
    folder = tmp_path_factory.mktemp("two")
    fresh.run_in_parallel(distributed.run, str(folder))
    return torch.load(folder / "results.pt") | {"folder": folder}


@pytest.fixture(scope="module")
def trained_by_one(tmp_path_factory):
    """What one process finds that trains every head."""
    return distributed.train_every_head(tmp_path_factory.mktemp("one"))


def assert_same_training(found, expected):
    assert len(found["losses"]) == distributed.STEPS
    assert found["losses"] == pytest.approx(expected["losses"], abs=2e-3)
    for key, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][key.removeprefix("module.")], weight, atol=2e-3, rtol=0)


@pytest.mark.distributed
def test_data_parallel_training_of_every_head_is_that_of_one_process(found_by_two, trained_by_one):
    found = found_by_two["data_parallel"]
    assert found.keys() == set(TASK_MODELS)
    for name in TASK_MODELS:
        assert found[name]["processes"] == 2
        assert_same_training(found[name], trained_by_one[name])


@pytest.mark.distributed
@pytest.mark.parametrize("name", distributed.WORD_MODELS)
def test_sharded_training_is_that_of_one_process(name, found_by_two):
    found = found_by_two["fully_sharded"][name]
    assert found["units"].count("FSDPBigBirdLayer") == 2  # both layers, and the model around them
    assert len(found["units"]) == 3
    assert found["sharded"]
    model = tiny_model(name)
    losses = distributed.train_by_hand(model, name)
    assert_same_training(found, {"losses": losses, "weights": model.state_dict()})


@pytest.mark.distributed
@pytest.mark.parametrize("name", distributed.WORD_MODELS)
def test_sharded_training_by_accelerate_is_that_of_one_process(name, found_by_two, trained_by_one):
    found, expected = found_by_two["sharded_by_accelerate"][name], trained_by_one[name]
    assert found["processes"] == 2
    assert sorted(found["units"]) == sorted(["BigBirdLayer", "BigBirdLayer", name])
    assert_same_training(found, expected)
    saved = type(tiny_model(name)).from_pretrained(found_by_two["folder"] / "sharded_by_accelerate" / name)
    assert_same_training(found | {"weights": saved.state_dict()}, expected)


@pytest.mark.distributed
def test_training_on_shared_documents_is_that_of_one_process(found_by_two, tmp_path):
    found, expected = found_by_two["shared_documents"], distributed.train_shared(tmp_path / "one")
    assert_same_training(found, expected)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-4)
    assert [text.split()[0] for text in found["refused"]] == ["compute_metrics", "label_smoothing_factor"]


def test_documents_are_not_shared_unasked(tmp_path):
    with pytest.raises(ValueError, match=r"parallelism_config is None.*cp_size"):
        make_trainer(tiny_model("BigBirdForMaskedLM"), [], tmp_path, trainer_class=ContextParallelTrainer)


class TestContextParallelism:
    """torch's gives each process a part of a document."""

    @pytest.fixture
    def mesh(self):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        yield torch.distributed.init_device_mesh("cpu", (1,))
        torch.distributed.destroy_process_group()

    @pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
    def test_is_refused(self, attention_type, mesh):
        model, ids = tiny_model("BigBirdModel", attention_type=attention_type), random_ids(2, 96)
        expected = model(ids).last_hidden_state
        with (
            pytest.raises(ValueError, match=r"context_parallel .* DDP or FSDP"),
            context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]),
        ):
            model(ids)
        assert torch.equal(model(ids).last_hidden_state, expected)

    @pytest.mark.parametrize("name", MODELS)
    def test_no_model_says_that_it_supports_it(self, name):
        assert not getattr(tiny_model(name), "supports_context_parallel", False)


class TestDeviceMap:
    @pytest.mark.parametrize("name", TASK_MODELS)
    def test_auto(self, name, tmp_path):
        model = tiny_model(name)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, device_map="auto").cpu()
        assert not any(parameter.is_meta for parameter in loaded.parameters())
        assert_close(outputs(loaded, name), outputs(model, name), tolerance=1e-6)

    def test_layers_stay_whole_when_memory_is_short(self, tmp_path):
        name = "BigBirdForSequenceClassification"
        model = tiny_model(name, num_hidden_layers=4)
        model.save_pretrained(tmp_path / "model")
        layer = sum(parameter.nbytes for parameter in model.bert.encoder.layer[0].parameters())
        embeddings = sum(parameter.nbytes for parameter in model.bert.embeddings.parameters())
        memory = {"cpu": embeddings + int(2.5 * layer), "disk": "1GB"}
        device_map = infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules)
        assert {"cpu", "disk"} == set(device_map.values())
        assert not any(key.count(".") > 3 for key in device_map)
        loaded = type(model).from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
        )
        assert_close(outputs(loaded, name), outputs(model, name), tolerance=1e-6)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_configurations_say_what_they_are(stage):
    path = EXAMPLES / f"deepspeed_zero{stage}.json"
    config = HfDeepSpeedConfig(json.loads(path.read_text()))
    assert config.is_zero2() == (stage == 2)
    assert config.is_zero3() == (stage == 3)
    assert config.get_value("train_micro_batch_size_per_gpu") == "auto"


@pytest.mark.parametrize("version", [1, 2])
def test_the_sharding_that_is_shown_is_what_accelerate_takes(version, tmp_path):
    text = (EXAMPLES / "guides" / "multi_gpu.md").read_text(encoding="utf-8")
    shown = re.search(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1]
    path = tmp_path / "fsdp.yaml"
    path.write_text(shown.replace("fsdp_version: 2", f"fsdp_version: {version}"), encoding="utf-8")
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    environment = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == str(version)
    assert environment["FSDP_USE_ORIG_PARAMS"] == "true"  # version 1 takes no frozen weights without
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert environment["FSDP_TRANSFORMER_CLS_TO_WRAP"] in tiny_model("BigBirdModel")._no_split_modules
