"""Processes that share documents do what one process does alone."""

import os
import subprocess
import sys

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import bigbird_plus
from tests.peers import TASK_MODELS, make_model, random_ids
from tests.training import context_parallel


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two and four processes have found, see `context_parallel.findings`."""
    folder = tmp_path_factory.mktemp("found")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", context_parallel.__name__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {size: torch.load(folder / f"{size}.pt") for size in (2, 4)}


WITH_DOCUMENTS = [f"{name}, documents" for name in context_parallel.DOCUMENT_MODELS]
IN_FLOAT32 = ("float32", "BigBirdForCausalLM, documents")  # transformers computes the loss of the latter so
EXACT = [*context_parallel.MODELS, *TASK_MODELS, *WITH_DOCUMENTS, "sparse prediction"]


class TestProcesses:
    @pytest.mark.parametrize(
        ("size", "name"), [(2, name) for name in EXACT] + [(4, name) for name in context_parallel.SHARED_BY_FOUR]
    )
    def test_outputs_and_gradients_are_those_of_one(self, size, name, found):
        case, tolerance = found[size][name], 1e-5 if name in IN_FLOAT32 else 1e-12
        assert case["outputs"] < tolerance
        assert case["gradients"] < tolerance
        assert case["is_same_everywhere"]

    def test_autocast_is_as_near_as_bfloat16_allows(self, found):
        assert found[2]["autocast"]["outputs"] < 0.1
        assert found[2]["autocast"]["gradients"] < 0.05

    @pytest.mark.parametrize(("name", "tolerance"), [("steps", 1e-12), ("steps in float32", 1e-5)])
    def test_steps_of_training_are_those_of_one(self, name, tolerance, found):
        assert found[2][name]["losses"] < tolerance
        assert found[2][name]["weights"] < tolerance

    @pytest.mark.parametrize("name", ["DDP", "FSDP2"])
    def test_with_data_parallelism_gradients_are_those_of_one(self, name, found):
        assert found[4][name]["gradients"] < 1e-12

    @pytest.mark.parametrize("name", ["tensor parallelism", "tensor parallelism of a decoder"])
    def test_shares_of_the_heads_make_the_same_model(self, name, found):
        case = found[2][name]
        assert case["heads"] == [[0, 1]] * 2
        assert case["in_inference"] < 1e-12
        if context_parallel.TRAINS_TENSOR_PARALLELISM:
            assert case["outputs"] < 1e-12
            assert case["gradients"] < 1e-12

    @pytest.mark.parametrize("size", [2, 4])
    def test_one_that_ends_ends_the_others(self, size, found):
        assert found[size]["error where another ended"]


class TestOneProcess:
    @pytest.fixture
    def mesh(self):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "cp"))
        torch.distributed.destroy_process_group()

    def test_takes_one_dimension_of_a_mesh(self, mesh):
        model, ids = make_model(), random_ids(2, 203)
        with bigbird_plus.context_parallel(mesh["cp"]) as processes:
            shared = model(ids)
        assert (processes.rank, processes.size, processes.bytes_sent) == (0, 1, 0)
        torch.testing.assert_close(shared.last_hidden_state, model(ids).last_hidden_state)

    @pytest.mark.parametrize("positions", [None, torch.arange(203)[None] % 120])
    def test_a_layer_may_read_in_full(self, positions, mesh):
        model, ids = make_model(), random_ids(1, 203)
        sparse = model(ids, position_ids=positions).last_hidden_state
        model.encoder.layer[0].set_attention_type("original_full")
        expected = model(ids, position_ids=positions, output_hidden_states=True)
        with bigbird_plus.context_parallel(mesh["cp"]):
            shared = model(ids, position_ids=positions, output_hidden_states=True)
        for found, states in zip(shared.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(found, states)
        assert not torch.allclose(shared.last_hidden_state, sparse, atol=1e-3)

    def test_refuses_a_mesh_of_two(self, mesh):
        with (
            pytest.raises(ValueError, match=r"one dimension, but has 2.*mesh\['cp'\]"),
            bigbird_plus.context_parallel(mesh),
        ):
            pass

    @pytest.mark.parametrize(
        ("settings", "inputs", "match"),
        [
            ({}, {"output_attentions": True}, "output_attentions"),
            ({}, {"output_attentions": True, "position_ids": torch.arange(203)[None] % 51}, "output_attentions"),
            ({"is_decoder": True}, {"use_cache": True}, "use_cache"),
            (
                {"is_decoder": True, "add_cross_attention": True},
                {"encoder_hidden_states": torch.zeros(1, 5, 32)},
                "encoder_hidden_states",
            ),
        ],
    )
    def test_refuses_what_cannot_be_shared(self, settings, inputs, match, mesh):
        with bigbird_plus.context_parallel(mesh["cp"]), pytest.raises(ValueError, match=match):
            make_model(**settings)(random_ids(1, 203), **inputs)

    def test_refuses_dropout_of_probabilities(self, mesh):
        model = make_model(attention_probs_dropout_prob=0.1).train()
        with (
            bigbird_plus.context_parallel(mesh["cp"]),
            pytest.raises(ValueError, match="attention_probs_dropout_prob"),
        ):
            model(random_ids(1, 60))

    def test_refuses_labels_of_its_own_tokens(self, mesh):
        model = make_model("BigBirdForTokenClassification")
        with bigbird_plus.context_parallel(mesh["cp"]), pytest.raises(ValueError, match=r"\[batch, 203\]"):
            model(random_ids(1, 203), labels=torch.zeros(1, 101, dtype=torch.long))
