"""What the demo says of itself is what runs."""

import pytest
import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bigbird_plus import cli
from bigbird_plus.attention import full
from bigbird_plus.attention.impl import flash_cpu, flex, reference
from bigbird_plus.demo import attention_in_use

from .peers import make_model, random_ids


@pytest.fixture
def engines_that_ran(monkeypatch):
    """Names of the engines, in the order of their calls. The one of FlexAttention, which takes long to compile, is
    stood in for by another."""
    ran = []

    def watch(name, function):
        def call(*args, **kwargs):
            ran.append(name)
            return function(*args, **kwargs)

        return call

    engine, dense = flash_cpu.forward, ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setattr(flash_cpu, "forward", watch("merged", engine))
    monkeypatch.setattr(flex, "forward", watch("flex_attention", engine))
    monkeypatch.setattr(flex, "SMALLEST_BLOCK", 8)
    for name in ("attention", "dense_attention"):
        monkeypatch.setattr(reference, name, watch("eager", getattr(reference, name)))
    functions = {name: watch(name, dense) for name in ("sdpa", "flex_attention", "flash_attention_2")}
    monkeypatch.setattr(full, "ALL_ATTENTION_FUNCTIONS", functions)
    return ran


@pytest.mark.parametrize("num_extra_global_tokens", [0, 2])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("length", [88, 96])
@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
def test_attention_in_use(implementation, attention_type, length, training, num_extra_global_tokens, engines_that_ran):
    settings = {"attention_type": attention_type, "num_extra_global_tokens": num_extra_global_tokens}
    model = make_model(num_hidden_layers=1, **settings).train(training)
    model.config._attn_implementation_internal = implementation  # also one that is not installed
    with torch.set_grad_enabled(training):
        model(random_ids(1, length))
        *named, _ = attention_in_use(model, length)
    read_in_full = length == 88 or attention_type == "original_full"
    assert named == ["original_full" if read_in_full else "block_sparse", engines_that_ran[0]]
    assert set(engines_that_ran) == {named[1]}


@pytest.fixture
def restored_messages():
    """The command silences transformers for its process; here the process goes on."""
    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


def test_every_line_is_ours(capfd, restored_messages):
    """A title, two tables, and nothing on standard error, whoever writes there."""
    with pytest.raises(SystemExit):
        cli.main(["demo"])
    printed = capfd.readouterr()
    assert printed.err == ""
    title, *lines = printed.out.splitlines()
    assert title.strip() == "The Book of Ruth, with words left out"
    assert all(line[0] in "┏┃┡│└ " for line in lines)
