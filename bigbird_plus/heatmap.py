"""Pictures of a document's attention: who reads whom, in tokens."""

import math

import torch
from torch import Tensor

MOST_CELLS = 256
"""Cells an axis of a heat map has at most; those of a longer document stand for several tokens each."""

MOST_LABELS = 60


def layer_attention(model, input_ids: Tensor, layer: int | None = None, head: int | None = None) -> Tensor:
    """The probabilities of one layer of a BigBird, computed apart from those of the others, which would take as much
    memory again each.

    Args:
        model: a `BigBirdModel`, or a task model around one.
        input_ids: `[1, length]`: one document without padding.
        layer: which layer, by default the last.
        head: which of its heads, by default the mean of all.

    Returns:
        `[length, length]`, in the model's dtype: a row for each token that reads, a column for each that is read.

    Raises:
        ValueError: if there is no such layer or head.
    """
    layers = model.base_model.encoder.layer
    layer = len(layers) - 1 if layer is None else layer
    check_index("layer", layer, len(layers))
    attention = layers[layer].attention.self
    if head is not None:
        check_index("head", head, len(attention.heads))
    seen = []
    hooks = [
        attention.register_forward_pre_hook(_ask_for_probabilities, with_kwargs=True),
        attention.register_forward_hook(lambda module, arguments, output: seen.append(output[1])),
    ]
    try:
        with torch.no_grad():
            model.base_model(input_ids)
    finally:
        for hook in hooks:
            hook.remove()
    length = input_ids.shape[1]  # more than that is padding
    of_heads = seen[0][0, :, :length, :length]
    return of_heads.mean(0) if head is None else of_heads[head]


def _ask_for_probabilities(module, arguments, kwargs):
    return arguments, {**kwargs, "output_attentions": True}


def check_index(name: str, value: int, count: int) -> None:
    """Raises a `ValueError` that names the argument unless there is such a one among `count`."""
    if not 0 <= value < count:
        raise ValueError(f"{name} must be between 0 and {count - 1}, but is {value}.")


def pool_attention(probabilities: Tensor, size: int) -> Tensor:
    """How much `size` neighbouring tokens, on average, read of `size` others, all together: rows keep their sums.

    Args:
        probabilities: `[queries, keys]`.
        size: tokens in a cell; the last cell of an axis may have fewer.

    Returns:
        `[ceil(queries / size), ceil(keys / size)]`, `float32`.
    """
    columns = [part.sum(dim=1) for part in probabilities.float().split(size, dim=1)]
    return torch.stack([part.mean(dim=0) for part in torch.stack(columns, dim=1).split(size)])


def plot_attention(probabilities: Tensor, tokens: list[str], ax=None):
    """Draws a heat map of attention: a row for each token that reads, a column for each that is read.

    What is not read is white; the other colours are logarithmic. Of more than `MOST_CELLS` tokens, neighbouring ones
    share a cell (see `pool_attention`). Where not every token can have its label, some have one with their number.

    Args:
        probabilities: `[length, length]`, such as `attentions[layer][0].mean(0)` of a model's output.
        tokens: the text of each token.
        ax: the matplotlib axes to draw on; those of a new figure by default.

    Returns:
        The axes.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there are not as many tokens as rows and columns, or none.
    """
    if not tokens or list(probabilities.shape) != [len(tokens)] * 2:
        raise ValueError(
            f"probabilities must have the shape [length, length] for one token or more, but have "
            f"{list(probabilities.shape)} for {len(tokens)} tokens."
        )
    try:
        from matplotlib import colors, pyplot
    except ImportError as error:
        raise ImportError("plot_attention needs matplotlib: pip install 'bigbird-plus[plot]'.") from error
    if ax is None:
        ax = pyplot.figure(figsize=(9, 8), layout="constrained").add_subplot()
    size = math.ceil(len(tokens) / MOST_CELLS)
    pooled = pool_attention(probabilities.detach().cpu(), size).numpy()
    most = pooled.max() or 1.0
    colours = pyplot.get_cmap("viridis").with_extremes(bad="white")
    image = ax.imshow(pooled, cmap=colours, norm=colors.LogNorm(most / 1e4, most), interpolation="nearest")
    _label(ax, tokens, size, len(pooled))
    share = "share of attention" if size == 1 else f"share of attention, in cells of {size} tokens"
    ax.figure.colorbar(image, ax=ax, label=share)
    return ax


def _label(ax, tokens, size, cells):
    """Names of tokens at the axes: of all, if they fit, else of the first ones of some cells, with their numbers."""
    step = math.ceil(cells / MOST_LABELS)
    places = range(0, cells, step)
    labels = [tokens[place * size] for place in places]
    if step * size > 1:
        labels = [f"{place * size}: {label}" for place, label in zip(places, labels, strict=True)]
    style = {"fontsize": 7, "parse_math": False}  # a dollar is a dollar
    ax.set_xticks(places, labels, rotation=90, **style)
    ax.set_yticks(places, labels, **style)
    ax.set(xlabel="token that is read", ylabel="token that reads")
