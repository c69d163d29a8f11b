"""Checks on a GPU, in a process of its own, that torch captures inference and training as CUDA graphs by itself:

    python -m tests.check_graphs

Fails if results are others than those of the model as it is, or if torch left out a graph. (A graph that is captured
by hand is a contestant of `bigbird-plus bench --graphs`.)
"""

import torch
from torch._dynamo.utils import counters

from bigbird_plus import BigBirdConfig, BigBirdForMaskedLM

CALLS = 4  # torch warms up, captures, and replays


def make_model(device: str, **fields) -> BigBirdForMaskedLM:
    torch.manual_seed(0)
    config = BigBirdConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        vocab_size=500,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **fields,
    )
    return BigBirdForMaskedLM(config).to(device)


def losses_and_gradients(model, call, batches, is_training: bool) -> list[torch.Tensor]:
    """Of each call the loss, and in training the gradients of all weights."""
    found = []
    model.train(is_training)
    for ids in batches:
        with torch.set_grad_enabled(is_training):
            loss = call(ids, labels=ids).loss
        if is_training:
            model.zero_grad()
            loss.backward()
            found += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        found.append(loss.detach().clone())
    return found


def check(device: str, is_training: bool, **fields) -> None:
    torch.compiler.reset()
    model = make_model(device, **fields)
    batches = torch.randint(3, 500, (CALLS, 1, 2048), device=device)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    torch.testing.assert_close(
        losses_and_gradients(model, compiled, batches, is_training),
        losses_and_gradients(model, model, batches, is_training),
        rtol=1e-3,
        atol=1e-5,
    )
    if device == "cuda":
        assert not counters["inductor"]["cudagraph_skips"], counters["inductor"]
    print(f"{device}, {'training' if is_training else 'inference'}, {fields}: as the model without graphs")


def main(device: str = "cuda") -> None:
    for is_training in (False, True):
        check(device, is_training)
        check(device, is_training, is_decoder=True, use_cache=False)
    check(device, False, eval_random_blocks=True)


if __name__ == "__main__":
    main()
