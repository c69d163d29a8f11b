"""What "equal to transformers" means: the same at real tokens, up to float32's rounding."""

import torch

OUTPUT_TOLERANCE = 2e-5
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


def real_tokens(inputs):
    """`bool`, `[rows, length]`: which tokens are not padding; the choices of multiple choice are rows."""
    mask = inputs.get("attention_mask")
    if mask is None:
        ids = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"][..., 0]
        mask = torch.ones_like(ids)
    return mask.flatten(0, -2).bool()


def assert_equal_tensors(ours, theirs, real, name, tolerance=OUTPUT_TOLERANCE):
    """Equal shapes, and equal numbers at real tokens where there is a row for each token."""
    assert ours.shape == theirs.shape, name
    if ours.shape[:2] == real.shape:
        ours, theirs = ours[real], theirs[real]
    hidden = theirs < -9e5  # scores of tokens that cannot be the answer: float32 knows those to 0.06 only
    assert (ours[hidden] < -9e5).all(), name
    difference = (ours - theirs).masked_fill(hidden, 0).abs().max().item()
    assert difference <= tolerance, f"{name} differs by {difference}"


def assert_equal_outputs(ours, theirs, inputs):
    """All that transformers' model returns, ours returns, and it is the same."""
    real = real_tokens(inputs)
    theirs = {name: value for name, value in theirs.items() if not (isinstance(value, tuple) and not value)}
    assert list(ours.keys()) == list(theirs)
    for name, expected in theirs.items():
        if isinstance(expected, torch.Tensor):
            tolerance = LOSS_TOLERANCE if name == "loss" else OUTPUT_TOLERANCE
            assert_equal_tensors(ours[name], expected, real, name, tolerance)
        elif name in ("hidden_states", "attentions"):
            assert len(ours[name]) == len(expected), name
            for one, other in zip(ours[name], expected, strict=True):
                _assert_equal_layers(one, other, real, name)


def _assert_equal_layers(ours, theirs, real, name):
    """`[batch, length, hidden_size]` or `[batch, heads, length, length]`. Theirs can have the padding to whole blocks,
    ours has the input's length."""
    length = real.shape[1]
    if name == "attentions":
        real = real[:, None].expand(ours.shape[:-1])
        assert ours.shape[2:] == (length, length)
    else:
        theirs = theirs[:, :length]
    assert ours.shape == theirs.shape, name
    difference = (ours[real] - theirs[real]).abs().max().item()
    assert difference <= OUTPUT_TOLERANCE, f"{name} differ by {difference}"


def assert_equal_gradients(ours, theirs):
    """Relative to each parameter's gradient, or where that is all but zero (as for the keys' bias) to the largest."""
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    actual = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert {n for n, g in actual.items() if g is not None} == {n for n, g in expected.items() if g is not None}
    largest = max(gradient.norm().item() for gradient in expected.values() if gradient is not None)
    for name, gradient in expected.items():
        if gradient is None:
            continue
        difference = (actual[name] - gradient).norm().item()
        allowed = GRADIENT_TOLERANCE * max(gradient.norm().item(), 1e-3 * largest)
        allowed += torch.finfo(gradient.dtype).eps  # of a softmax minus one: zero in sum, but rounded
        assert difference <= allowed, f"the gradient of {name} differs by {difference}, allowed is {allowed}"
