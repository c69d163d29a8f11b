"""BigBird, from embeddings to `BigBirdModel` (arXiv 2007.14062)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GradientCheckpointingLayer, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.processing_utils import Unpack
from transformers.pytorch_utils import prune_linear_layer

from ._compat import (
    CACHE,
    cache_of_tuples,
    cached_key_length,
    keep_in_cache,
    tokens_in_cache,
    tuples_of_cache,
    wants_tuples,
)
from .attention import masks
from .attention.alone import how_to_read, refuse_block_masks
from .attention.common import is_exporting, may_read_values, per_chunk
from .attention.documents import (
    Flattened,
    document_positions,
    holds_documents,
    is_first_place,
    uncompiled_for_documents,
)
from .attention.masks import ScoreShape
from .attention.parts import FullPart, Tokens
from .attention.pattern import Sparsity, check_whole_number
from .attention.plan import Plan, full_implementation, is_sparse, make_plan
from .attention.processes import active_processes
from .attention.rotary import Rotation, make_rotation
from .attention.shared_plan import share_plan
from .configuration_big_bird import BigBirdConfig, check_attention_type, refuse_auto_class
from .cpu import TanhGELU, feed_forward, in_chunks, is_watched, linear, linears, trains_as_one
from .layer_norm import norm_of_product, norm_of_sum
from .streaming import keys_and_values, stream_document

# Three formulas of one function, the tanh approximation of GELU, for which torch has a fused kernel.
TANH_GELUS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")


def activation_function(hidden_act):
    """The activation that `BigBirdConfig.hidden_act` names, or is."""
    if callable(hidden_act):
        return hidden_act
    if hidden_act in TANH_GELUS:
        return TanhGELU()
    return ACT2FN[hidden_act]


def as_requested(output, return_dict: bool | None, config):
    """`output`, or a tuple of what it holds if the caller or the configuration wants one."""
    if wants_tuples(config) if return_dict is None else not return_dict:
        return output.to_tuple()
    return output


def as_configured(config, output_attentions: bool | None, output_hidden_states: bool | None) -> tuple[bool, bool]:
    """What is asked for, by the caller or else by the configuration."""
    return (
        config.output_attentions if output_attentions is None else output_attentions,
        config.output_hidden_states if output_hidden_states is None else output_hidden_states,
    )


def the_cache(past_key_values, cache):
    """That which was given, under one of its names.

    Raises:
        ValueError: if both are given.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of the same. Give one of them.")
    return cache if past_key_values is None else past_key_values


def the_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Ids or embeddings, whichever are given.

    Raises:
        ValueError: if both are, or neither.
    """
    if input_ids is not None and inputs_embeds is None:
        return input_ids
    if inputs_embeds is not None and input_ids is None:
        return inputs_embeds
    raise ValueError("Give either input_ids or inputs_embeds: one of them, and not both.")


def positions_of_documents(position_ids, attention_mask, input_ids, inputs_embeds, flattened) -> Tensor | None:
    """The positions of rows that hold several documents, see `attention.documents`; None if each holds one."""
    shape = the_inputs(input_ids, inputs_embeds).shape[:2]
    position_ids = document_positions(position_ids, attention_mask, shape, flattened)
    return position_ids if holds_documents(position_ids, attention_mask) else None


def check_inputs(input_ids, inputs_embeds, token_type_ids, position_ids, hidden_size: int) -> None:
    """Raises a `ValueError` that names what does not fit: ids of another shape would be read for other tokens."""
    inputs = the_inputs(input_ids, inputs_embeds)
    if input_ids is not None and (input_ids.dim() != 2 or input_ids.is_floating_point()):
        raise ValueError(
            f"input_ids must be whole numbers of the shape [batch, length], but are {input_ids.dtype} of "
            f"{list(input_ids.shape)}. Vectors are given as inputs_embeds."
        )
    if inputs_embeds is not None and (inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != hidden_size):
        raise ValueError(
            f"inputs_embeds must have the shape [batch, length, {hidden_size}], but have {list(inputs_embeds.shape)}."
        )
    batch, length = inputs.shape[:2]
    for name, ids in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
        # Sizes one by one: while a graph is traced, equal ones can have different names, which tuples do not resolve.
        if ids is not None and not (ids.dim() == 2 and ids.shape[0] in (1, batch) and ids.shape[1] == length):
            raise ValueError(
                f"{name} must have the shape [batch, length] = [{batch}, {length}], or [1, {length}], but has "
                f"{list(ids.shape)}."
            )


def refuse_empty(inputs: Tensor) -> None:
    """Raises a `ValueError` unless there is a token."""
    if inputs.shape[1] == 0:
        raise ValueError("The input has the length 0. Give at least one token.")


SHARE_OF_MASK_TOKENS = 0.15 * 0.8
"""With which ESM was trained."""


def token_scales(input_ids: Tensor, mask_token_id: int, attention_mask=None, position_ids=None) -> Tensor:
    """What the embeddings of ids are multiplied by, `float32`, `[batch, length]`; see `BigBirdConfig.token_dropout`.

    Args:
        attention_mask: as of `BigBirdModel.forward`; one of `[batch, length]` tells which tokens count.
        position_ids: given if rows hold several documents, in which they start anew at 0.
    """
    is_mask, is_real = input_ids == mask_token_id, torch.ones_like(input_ids)
    if attention_mask is not None and attention_mask.dim() == 2:
        is_real = attention_mask != 0
    document = torch.zeros_like(input_ids) if position_ids is None else (position_ids == 0).cumsum(-1)
    none = nn.functional.pad(torch.zeros_like(input_ids), (0, 1))
    masks, tokens = (none.scatter_add(1, document, one.long()).gather(1, document) for one in (is_mask, is_real))
    return ((1 - SHARE_OF_MASK_TOKENS) / (1 - masks / tokens.clamp(min=1))).masked_fill(is_mask, 0)


def layer_norm(config, applies: bool = True, width: int | None = None) -> nn.Module:
    """Normalisation of the hidden states, or none."""
    return nn.LayerNorm(width or config.hidden_size, eps=config.layer_norm_eps) if applies else nn.Identity()


class BigBirdEmbeddings(nn.Module):
    """Tokens, positions unless they are rotary, and token types, added and normalised."""

    position_ids: Tensor
    token_type_ids: Tensor

    def __init__(self, config):
        super().__init__()
        width = config.embedding_width
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embeddings = None
        if config.position_embedding_type == "absolute":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = layer_norm(config, config.embedding_layer_norm, width)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        has_projection = config.embedding_size is not None
        self.projection = nn.Linear(width, config.hidden_size) if has_projection else nn.Identity()
        self.width = width
        self.hidden_size = config.hidden_size
        self.rescale_embeddings = config.rescale_embeddings
        self.tiled_positions = config.tiled_positions
        self.dropped_token = config.mask_token_id if config.token_dropout else None
        self.num_extra_global_tokens = config.num_extra_global_tokens
        if config.num_extra_global_tokens:
            self.extra_global_tokens = nn.Embedding(config.num_extra_global_tokens, width)
        self.register_position_ids(config.max_position_embeddings)

    def register_position_ids(self, count: int, device: torch.device | None = None) -> None:
        """Makes the ids that stand for those which are not given, `[1, count]`. No file holds them."""
        ids = torch.arange(count, device=device)[None]
        self.register_buffer("position_ids", ids, persistent=False)
        self.register_buffer("token_type_ids", torch.zeros_like(ids), persistent=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
        cache_length: int = 0,
        scales: Tensor | None = None,
    ) -> Tensor:
        """`[batch, length, hidden_size]`, from ids of `[batch, length]`.

        Args:
            input_ids, token_type_ids: by default all tokens are of type 0.
            position_ids: `[batch or 1, length]`, by default those behind `past_key_values_length` earlier tokens.
            inputs_embeds: `[batch, length, config.embedding_width]`, in the place of `input_ids`.
            cache_length: another name of `past_key_values_length`.
            scales: what the embeddings of ids are multiplied by, by default the `token_scales` of documents without
                padding if there is `config.token_dropout`.

        Raises:
            ValueError: if both or neither of `input_ids` and `inputs_embeds` are given, or ids have another shape.
        """
        check_inputs(input_ids, inputs_embeds, token_type_ids, position_ids, self.width)
        inputs = the_inputs(input_ids, inputs_embeds)
        if position_ids is None and self.position_embeddings is None:
            position_ids = torch.zeros(1, inputs.shape[1], dtype=torch.int64, device=inputs.device)  # of no meaning
        elif position_ids is None:
            first = past_key_values_length or cache_length
            position_ids = self.position_ids[:, first : first + inputs.shape[1]]
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(position_ids)
        if self.dropped_token is not None and input_ids is not None and scales is None:
            scales = token_scales(input_ids, self.dropped_token)
        tensors = (inputs, token_type_ids, position_ids, *(() if scales is None else (scales,)))
        return in_chunks(self._embed, *tensors, width=5 * self.hidden_size, modules=self.children())

    def _embed(self, inputs, token_type_ids, position_ids, scales=None):
        if self.tiled_positions:
            position_ids = position_ids % self.position_embeddings.num_embeddings
        words = inputs if inputs.is_floating_point() else self.word_embeddings(inputs)
        if self.rescale_embeddings:
            words = words * self.hidden_size**0.5
        if scales is not None:
            words = (words * scales[..., None]).to(words.dtype)
        embeddings = words + self.token_type_embeddings(token_type_ids)
        if self.position_embeddings is not None:
            embeddings = embeddings + self.position_embeddings(position_ids)
        return self.projection(self.LayerNorm(self.dropout(embeddings)))

    def append_extra_tokens(self, hidden_states: Tensor, documents: int) -> Tensor:
        """`hidden_states`, `[batch, length, hidden_size]`, and behind them the extra global tokens, if there are any:
        those of each document."""
        if not self.num_extra_global_tokens:
            return hidden_states
        ids = torch.arange(self.num_extra_global_tokens, device=hidden_states.device)
        tokens = self.extra_global_tokens(ids).expand(documents, -1, -1)
        tokens = self.projection(self.LayerNorm(self.dropout(tokens)))
        tokens = tokens.reshape(hidden_states.shape[0], -1, tokens.shape[-1])
        return torch.cat((hidden_states, tokens), dim=1)


class BigBirdSelfAttention(nn.Module):
    """Every token asks, and reads tokens of its own sequence."""

    is_cross_attention = False

    def __init__(self, config, layer_idx=None):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx or 0  # random blocks are drawn by it
        self.is_causal = config.is_decoder and not self.is_cross_attention  # attention functions look for it
        self.attention_type = config.attention_type
        self._kept_heads = list(range(config.num_attention_heads))  # those that were not pruned
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.attention_head_size**-0.5
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)  # attention functions are told of it
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.value = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Plan | Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: FullPart | Tensor | None = None,
        past_key_values=None,
        output_attentions: bool = False,
        cache_position: Tensor | None = None,
        cache=None,
        cache_idx: int | None = None,
        **block_masks,
    ) -> tuple[Tensor, Tensor | None]:
        """The context, and the probabilities or None. As part of a model attention gets a plan of what is read; called
        alone it reads everything, but for what a mask hides.

        Args:
            hidden_states: `[batch, length, hidden_size]`.
            attention_mask: the plan, or a mask, see `alone`.
            head_mask: what heads are multiplied by: `[heads]`, or broadcastable to `[batch, heads, length, 1]`.
            encoder_hidden_states, encoder_attention_mask: for cross-attention, and none in self-attention.
            past_key_values: a cache, to which keys and values are added.
            output_attentions: whether to return the probabilities.
            cache_position: `int64`, `[length]`: places of the tokens in the cache.
            cache: another name of `past_key_values`.
            cache_idx: which layer of the cache is this one's, by default `layer_idx`.
            **block_masks: masks of blocks (`band_mask` and others). They must be None.

        Returns:
            `[batch, length, all_head_size]` and `[batch, heads, length, keys]`.

        Raises:
            ValueError: for a mask of a wrong shape, and for what cannot be taken.
        """
        refuse_block_masks(**block_masks)
        if encoder_hidden_states is not None or encoder_attention_mask is not None:
            raise ValueError(
                "encoder_hidden_states and encoder_attention_mask are for cross-attention, and this is "
                "self-attention: call layer.crossattention, which a model with add_cross_attention=True has."
            )
        past_key_values = the_cache(past_key_values, cache)
        cache_idx = self.layer_idx if cache_idx is None else cache_idx
        rotation = self._rotation(hidden_states, attention_mask, past_key_values, cache_position, cache_idx)
        query, key, value = self.queries_keys_and_values(hidden_states, rotation)
        if past_key_values is not None:
            key, value = self.update(past_key_values, key, value, cache_idx, cache_position)
        return self._attend(query, key, value, attention_mask, head_mask, output_attentions)

    @staticmethod
    def update(cache, key: Tensor, value: Tensor, cache_idx: int, cache_position: Tensor | None):
        """Adds keys and values to a cache. Returns all that it holds."""
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        return cache.update(key, value, cache_idx, {"cache_position": cache_position})

    def _rotation(self, hidden_states, attention_mask, cache, cache_position, cache_idx) -> Rotation | None:
        """As the plan says, or alone that of the places behind what the cache holds."""
        if isinstance(attention_mask, Plan):
            return attention_mask.rotation
        if cache_position is None:
            past = 0 if cache is None else cache.get_seq_length(cache_idx)
            cache_position = torch.arange(hidden_states.shape[1], device=hidden_states.device) + past
        return make_rotation(self.config, cache_position[None])

    def _attend(self, query, key, value, attention_mask, head_mask, output_attentions):
        plan = how_to_read(attention_mask, self, query, key.shape[2])
        context, probabilities = plan.attend(self, query, key, value, output_attentions)
        if head_mask is not None:
            factors = self._head_factors(head_mask)
            context = context * factors
            probabilities = None if probabilities is None else probabilities * factors
        return context.transpose(1, 2).flatten(2), probabilities

    def _head_factors(self, head_mask):
        """Broadcastable to `[batch, heads, length, 1]`."""
        if head_mask.shape == (self.config.num_attention_heads,):
            head_mask = head_mask[self.heads]  # without those that were pruned
        factors = head_mask[:, None, None] if head_mask.dim() == 1 else head_mask
        if factors.shape[-1] != 1 or factors.shape[-3:-2] not in ((1,), (self.num_attention_heads,)):
            raise ValueError(
                f"head_mask must have the shape [heads] = [{self.num_attention_heads}] or [1, heads, 1, 1], but has "
                f"{list(head_mask.shape)}."
            )
        return factors

    @property
    def heads(self) -> list[int]:
        """Those that are computed here: that were not pruned, and of those under tensor parallelism the share of this
        process."""
        mesh = getattr(getattr(self.query, "weight", None), "device_mesh", None)
        if mesh is None:
            return self._kept_heads
        share, rest = divmod(len(self._kept_heads), mesh.size())
        if rest:
            raise ValueError(
                f"Tensor parallelism shares out whole heads: {len(self._kept_heads)} heads are no multiple of tp_size "
                f"({mesh.size()})."
            )
        return self._kept_heads[mesh.get_local_rank() * share :][:share]

    @heads.setter
    def heads(self, kept: list[int]):
        self._kept_heads = kept

    @property
    def num_attention_heads(self) -> int:
        """How many heads are computed here."""
        return len(self.heads)

    @property
    def all_head_size(self) -> int:
        """The width of the context."""
        return self.num_attention_heads * self.attention_head_size

    @property
    def dropout_prob(self) -> float:
        """The share of probabilities that full attention drops now."""
        return self.dropout.p if self.dropout.training else 0.0

    def queries(self, states: Tensor, rotation: Rotation | None = None) -> Tensor:
        """`[batch, heads, length, attention_head_size]` of `[batch, length, hidden_size]`."""
        return self._split_heads(linear(self.query, states), rotation)

    def queries_keys_and_values(
        self, states: Tensor, rotation: Rotation | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All three in the shape of the queries. Values are not turned."""
        query, key, value = linears((self.query, self.key, self.value), states)
        return self._split_heads(query, rotation), self._split_heads(key, rotation), self._split_heads(value)

    def keys_and_values(self, states: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, Tensor]:
        """The latter two."""
        key, value = linears((self.key, self.value), states)
        return self._split_heads(key, rotation), self._split_heads(value)

    def _split_heads(self, states: Tensor, rotation: Rotation | None = None) -> Tensor:
        """`[batch, length, all_head_size]` -> `[batch, heads, length, attention_head_size]`, turned."""
        # Not `unflatten`: the graphs of `torch.onnx.export(..., dynamo=False)` would take the length for a constant.
        states = states.view(*states.shape[:-1], self.num_attention_heads, self.attention_head_size)
        return (states if rotation is None else rotation.turn(states)).transpose(1, 2)


class BigBirdCrossAttention(BigBirdSelfAttention):
    """Every token asks, and reads the states of an encoder. Their keys and values are computed once per sequence."""

    is_cross_attention = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Plan | Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: FullPart | Tensor | None = None,
        past_key_values=None,
        output_attentions: bool = False,
        cache_position: Tensor | None = None,
        cache=None,
        cache_idx: int | None = None,
        **block_masks,
    ) -> tuple[Tensor, Tensor | None]:
        """As `BigBirdSelfAttention.forward`, but `encoder_hidden_states`, `[batch, source length, hidden_size]`, are
        read, with a mask or plan in `encoder_attention_mask`; `attention_mask` must be None."""
        refuse_block_masks(**block_masks)
        if encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states must be given: cross-attention reads nothing else.")
        if attention_mask is not None:
            raise ValueError(
                "attention_mask must be None in cross-attention: what is read of encoder_hidden_states is said by "
                "encoder_attention_mask."
            )
        cache_idx = self.layer_idx if cache_idx is None else cache_idx
        key, value = self._cached_keys_and_values(encoder_hidden_states, the_cache(past_key_values, cache), cache_idx)
        query = self.queries(hidden_states)
        return self._attend(query, key, value, encoder_attention_mask, head_mask, output_attentions)

    def _cached_keys_and_values(self, encoder_hidden_states, past_key_values, cache_idx):
        cache = past_key_values if isinstance(past_key_values, EncoderDecoderCache) else None
        if cache is not None and cache.is_updated.get(cache_idx):
            layer = cache.cross_attention_cache.layers[cache_idx]
            return layer.keys, layer.values
        key, value = self.keys_and_values(encoder_hidden_states)
        if cache is not None:
            key, value = cache.cross_attention_cache.update(key, value, cache_idx)
            cache.is_updated[cache_idx] = True
        return key, value


class BigBirdOutput(nn.Module):
    """A projection back to the hidden size, added to what went in, and normalised, unless that is done before."""

    def __init__(self, config, input_size=None):
        super().__init__()
        self.dense = nn.Linear(input_size or config.intermediate_size, config.hidden_size)
        self.LayerNorm = layer_norm(config, config.norm_position == "post")
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """`[batch, length, hidden_size]`, added to `input_tensor`, from `[batch, length, input_size]`."""
        width = input_tensor.shape[-1]
        return in_chunks(self._project, hidden_states, input_tensor, width=width, modules=self.children())

    def _project(self, states, residual):
        if self._drops:
            return self.add(linear(self.dense, states), residual)
        return norm_of_product(self.LayerNorm, self.dense, states, residual)

    @property
    def _drops(self):
        is_plain = type(self.dropout) is nn.Dropout and not is_watched(self.dropout)
        return self.dropout.training and not (is_plain and self.dropout.p == 0)

    def add(self, projected: Tensor, residual: Tensor) -> Tensor:
        """What follows the projection."""
        return norm_of_sum(self.LayerNorm, self.dropout(projected), residual)


class BigBirdSelfOutput(BigBirdOutput):
    """The projection of what attention has read."""

    def __init__(self, config):
        super().__init__(config, config.hidden_size)


class BigBirdAttention(nn.Module):
    """Attention, and the projection of its context."""

    def __init__(self, config, seed=None, is_cross_attention=False):
        super().__init__()
        attention_class = BigBirdCrossAttention if is_cross_attention else BigBirdSelfAttention
        self.LayerNorm = layer_norm(config, config.norm_position == "pre")
        self.self = attention_class(config, layer_idx=seed)
        self.output = BigBirdSelfOutput(config)

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """The new hidden states and the probabilities or None; arguments as those of the attention within."""
        context, probabilities = self.self(self.LayerNorm(hidden_states), *args, **kwargs)
        return self.output(context, hidden_states), probabilities

    @property
    def attention_type(self) -> str:
        """How it reads: `"block_sparse"` or `"original_full"`."""
        return self.self.attention_type

    def set_attention_type(self, value: str, layer_idx: int | None = None) -> None:
        """Chooses how this attention alone reads, see `BigBirdModel.set_attention_type`. `layer_idx` has no effect."""
        check_attention_type(value)
        self.self.attention_type = value

    def prune_heads(self, heads) -> None:
        """Removes heads, given by their index among all that there were at first."""
        attention = self.self
        kept = [head for head in attention.heads if head not in heads]
        places = torch.tensor([attention.heads.index(head) for head in kept], dtype=torch.long)
        index = (
            places[:, None] * attention.attention_head_size + torch.arange(attention.attention_head_size)
        ).flatten()
        for name in ("query", "key", "value"):
            setattr(attention, name, prune_linear_layer(getattr(attention, name), index))
        self.output.dense = prune_linear_layer(self.output.dense, index, dim=1)
        attention.heads = kept


class BigBirdIntermediate(nn.Module):
    """The widening half of the feed-forward part."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = activation_function(config.hidden_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., intermediate_size]` from `[..., hidden_size]`."""
        return linear(self.dense, hidden_states, self.intermediate_act_fn)


class BigBirdLayer(GradientCheckpointingLayer):
    """Self-attention, cross-attention if there is any, and the feed-forward part."""

    def __init__(self, config, seed=None):
        """`seed` is the number of the layer, by which its random blocks are drawn."""
        super().__init__()
        self.config = config
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.seq_len_dim = 1
        self.intermediate_size = config.intermediate_size
        self.is_decoder = config.is_decoder
        self.add_cross_attention = config.add_cross_attention
        self.attention = BigBirdAttention(config, seed)
        if config.add_cross_attention:
            self.crossattention = BigBirdAttention(config, seed, is_cross_attention=True)
        self.LayerNorm = layer_norm(config, config.norm_position == "pre")
        self.intermediate = BigBirdIntermediate(config)
        self.output = BigBirdOutput(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Plan | Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: FullPart | Tensor | None = None,
        band_mask: None = None,
        from_mask: None = None,
        to_mask: None = None,
        blocked_encoder_mask: None = None,
        past_key_values=None,
        output_attentions: bool = False,
        cache_position: Tensor | None = None,
        cache=None,
        cache_idx: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Arguments as those of `BigBirdSelfAttention.forward`.

        Returns:
            Tensors alone: new hidden states, `[batch, length, hidden_size]`, and with `output_attentions` the
            probabilities, and those of cross-attention if there is any.
        """
        refuse_block_masks(
            band_mask=band_mask, from_mask=from_mask, to_mask=to_mask, blocked_encoder_mask=blocked_encoder_mask
        )
        kwargs = {"past_key_values": the_cache(past_key_values, cache), "output_attentions": output_attentions}
        kwargs |= {"cache_position": cache_position, "cache_idx": cache_idx}
        hidden_states, *probabilities = self.attention(hidden_states, attention_mask, head_mask, **kwargs)
        if self.is_decoder and encoder_hidden_states is not None:
            self._check_cross_attention()
            kwargs |= {
                "encoder_hidden_states": encoder_hidden_states,
                "encoder_attention_mask": encoder_attention_mask,
            }
            hidden_states, cross_probabilities = self.crossattention(hidden_states, **kwargs)
            probabilities.append(cross_probabilities)
        hidden_states = self._feed_forward(hidden_states)
        return (hidden_states, *probabilities) if output_attentions else (hidden_states,)

    def _check_cross_attention(self):
        if not hasattr(self, "crossattention"):
            raise ValueError("encoder_hidden_states needs a layer with cross-attention: add_cross_attention=True.")

    def _feed_forward(self, hidden_states):
        if self.chunk_size_feed_forward:  # any size will do: a packed batch is no multiple of it
            chunks = hidden_states.split(self.chunk_size_feed_forward, dim=self.seq_len_dim)
            return torch.cat([self.feed_forward_chunk(chunk) for chunk in chunks], dim=self.seq_len_dim)
        modules = (self.LayerNorm, self.intermediate, self.output)
        return in_chunks(self.feed_forward_chunk, hidden_states, width=self.intermediate_size, modules=modules)

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        """`[batch, length, hidden_size]`, each token by itself."""
        states = self.LayerNorm(attention_output)
        if self._trains_as_one(states):
            return self.output.add(feed_forward(self.intermediate.dense, self.output.dense, states), attention_output)
        return self.output(self.intermediate(states), attention_output)

    def _trains_as_one(self, states):
        intermediate, output = self.intermediate, self.output
        if type(intermediate) is not BigBirdIntermediate or type(output) is not BigBirdOutput:
            return False
        if not trains_as_one(intermediate.dense, intermediate.intermediate_act_fn, output.dense, states):
            return False
        return not is_watched(intermediate) and not is_watched(output)

    @property
    def attention_type(self) -> str:
        """How the layer reads its own sequence: `"block_sparse"` or `"original_full"`."""
        return self.attention.attention_type

    def set_attention_type(self, value: str, layer_idx: int | None = None) -> None:
        """As `BigBirdAttention.set_attention_type`."""
        self.attention.set_attention_type(value)

    @property
    def can_stream(self) -> bool:
        """Whether `stream` does what the modules would: nobody has put others in the place of attention, nor is there
        dropout."""
        attention = self.attention
        is_ours = type(attention) is BigBirdAttention and type(attention.self) is BigBirdSelfAttention
        return is_ours and not attention.self.training

    def stream(self, states: Tensor, plan: Plan, cache=None, cache_idx: int = 0, cache_position=None) -> None:
        """As `forward`, in inference, but written over `states`, one of the `chunks` of a plan: of a document that is
        longer than `tokens_per_chunk` some blocks after others. What that takes does not grow with the length, but for
        keys and values of one layer where others than those near a token are read. With a cache, `states` are those of
        all documents."""
        attention, size = self.attention.self, self.tokens_per_chunk(states)
        if cache is not None:
            read = keys_and_values(self, states, plan.rotation, size, for_cache=True)
            key, value = (tensor[:, : states.shape[1]].transpose(1, 2) for tensor in read)
            if not keep_in_cache(cache, cache_idx, key, value):
                attention.update(cache, key, value, cache_idx, cache_position)
            for row, (own, own_plan) in enumerate(plan.chunks(states, 1)):
                cached = [tensor[row : row + 1] for tensor in read]
                stream_document(self, own, own_plan.document(attention), own_plan.rotation, size, cached)
        elif states[..., 0].numel() > size and plan.has_one_document:
            stream_document(self, states, plan.document(attention), plan.rotation, size)
        else:
            states.copy_(self(states, plan)[0])

    def tokens_per_chunk(self, hidden_states: Tensor) -> int:
        """How many tokens `stream` takes together."""
        return per_chunk(self.intermediate_size * hidden_states.element_size())


class BigBirdEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList(BigBirdLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.LayerNorm = layer_norm(config, config.norm_position == "pre" and config.final_layer_norm)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Plan | Tensor | None = None,
        head_mask=None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: FullPart | Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        band_mask: None = None,
        from_mask: None = None,
        to_mask: None = None,
        blocked_encoder_mask: None = None,
        return_dict: bool = True,
        cache_position: Tensor | None = None,
        cache=None,
        streams: bool = False,
    ) -> BaseModelOutputWithPastAndCrossAttentions | tuple:
        """All layers, one after another; arguments as those of `BigBirdSelfAttention.forward`, and:

        Args:
            hidden_states: `[batch, length, hidden_size]`, or what has entered the plan. What comes out has left it.
            head_mask: for each layer a head mask or None.
            use_cache: whether to make a cache, if none is given.
            streams: whether the layers write over the states that come in, part after part; without what is given for
                cross-attention.
        """
        refuse_block_masks(
            band_mask=band_mask, from_mask=from_mask, to_mask=to_mask, blocked_encoder_mask=blocked_encoder_mask
        )
        if isinstance(attention_mask, Plan):
            plan = attention_mask = attention_mask.rotated(self.config, hidden_states)
        else:
            batch, length = hidden_states.shape[:2]
            plan = Plan((), batch, length, positions=torch.arange(length)[None])
        past_key_values = the_cache(past_key_values, cache)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if streams:
            return self._stream(hidden_states, plan, past_key_values, cache_position)
        kwargs = {"past_key_values": past_key_values, "output_attentions": output_attentions}
        kwargs |= {"cache_position": cache_position}
        all_hidden_states: tuple[Tensor, ...] = ()
        attentions: tuple[Tensor, ...] = ()
        cross_attentions: tuple[Tensor, ...] = ()
        for cache_idx, layer in enumerate(self.layer):
            if output_hidden_states:
                all_hidden_states += (plan.leave(hidden_states),)
            layer_mask = None if head_mask is None else head_mask[cache_idx]
            arguments = (hidden_states, attention_mask, layer_mask, encoder_hidden_states, encoder_attention_mask)
            outputs = layer(*arguments, cache_idx=cache_idx, **kwargs)
            # a hook or somebody's own layer may return nothing but the states
            hidden_states, *probabilities = (outputs,) if isinstance(outputs, Tensor) else outputs
            attentions += tuple(plan.leave_probabilities(own) for own in probabilities[:1])
            cross_attentions += tuple(probabilities[1:])
        hidden_states = plan.leave(self.LayerNorm(hidden_states))
        output = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
            cross_attentions=cross_attentions or None,
            **{CACHE: past_key_values},
        )
        return output if return_dict else output.to_tuple()

    def _stream(self, hidden_states, plan, cache, cache_position):
        size = self.layer[0].tokens_per_chunk(hidden_states)
        together = [(hidden_states, plan)]  # a cache takes keys and values of all documents at once
        for states, own_plan in plan.chunks(hidden_states, size) if cache is None else together:
            for cache_idx, layer in enumerate(self.layer):
                layer.stream(states, own_plan, cache, cache_idx, cache_position)
            for run in states.split(size, dim=1):
                run.copy_(self.LayerNorm(run))
        return BaseModelOutputWithPastAndCrossAttentions(plan.leave(hidden_states), **{CACHE: cache})

    @property
    def attention_type(self) -> str:
        """How the layers read: `"block_sparse"` if any of them does, else `"original_full"`."""
        types = [attention.attention_type for attention in self._self_attentions()]
        return "block_sparse" if "block_sparse" in (types or [self.config.attention_type]) else "original_full"

    @attention_type.setter
    def attention_type(self, value: str):
        self.set_attention_type(value)

    def set_attention_type(self, value: str) -> None:
        """As `BigBirdModel.set_attention_type`."""
        check_attention_type(value)
        for attention in self._self_attentions():
            attention.attention_type = value

    def _self_attentions(self) -> list[BigBirdSelfAttention]:
        """Those of all layers, whatever they are wrapped in."""
        found = (module for module in self.layer.modules() if isinstance(module, BigBirdSelfAttention))
        return [module for module in found if not module.is_cross_attention]


class BigBirdPreTrainedModel(PreTrainedModel):
    """What all BigBird models share: configuration, loading, initial weights, the choice of attention."""

    config_class = BigBirdConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["BigBirdLayer"]
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.(position_ids|token_type_ids)"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _supports_context_parallel = False
    _can_compile_fullgraph = True
    if TYPE_CHECKING:
        base_model: "BigBirdModel"

    def __init__(self, config, *args, **kwargs):
        """Takes a `BigBirdConfig`, or transformers' own."""
        config = BigBirdConfig.of(config)  # which the models take from `self.config`
        super().__init__(config, *args, **kwargs)
        config.check_fields()
        check_whole_number("hidden_size", config.hidden_size, 1)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """As in all models of transformers, for subclasses of your own. These classes here are no single file that
        could be saved with a model.

        Raises:
            ValueError: for a class of this package.
        """
        refuse_auto_class(cls)
        super().register_for_auto_class(auto_class)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers would look for its own idioms in the source of this module

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                nn.init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, BigBirdEmbeddings):  # version 5 loads models without the numbers of such buffers
            nn.init.zeros_(module.token_type_ids)
            module.position_ids.copy_(torch.arange(module.position_ids.shape[1]))

    def get_position_embeddings(self) -> nn.Embedding:
        """The position embeddings, `[max_position_embeddings, config.embedding_width]`.

        Raises:
            ValueError: if there are none.
        """
        embeddings = self.base_model.embeddings.position_embeddings
        if embeddings is None:
            raise ValueError(
                f"There are no position embeddings, as position_embedding_type is "
                f"{self.config.position_embedding_type!r}: inputs can have any length, and nothing needs resizing."
            )
        return embeddings

    def resize_position_embeddings(self, new_num_position_embeddings: int, method: str = "tile") -> None:
        """Gives the model another number of positions, and says so in its configuration.

        Args:
            new_num_position_embeddings: how many. With fewer than before, the last ones are cut off.
            method: where more come from. `"tile"` repeats those that there are from the beginning, which leaves the
                outputs for short inputs as they were; `"interpolate"` stretches them.

        Raises:
            ValueError: for another method, for fewer than one position, if something has wrapped the embeddings, or
                if positions are rotary.
        """
        check_whole_number("new_num_position_embeddings", new_num_position_embeddings, 1)
        if method not in ("tile", "interpolate"):
            raise ValueError(f"method must be 'tile' or 'interpolate', but is {method!r}.")
        old = self.get_position_embeddings()
        if type(old) is not nn.Embedding:
            raise ValueError(
                f"The position embeddings are a {type(old).__name__} by now, which cannot be resized. Resize them "
                "before adapters or quantization take the place of nn.Embedding."
            )
        count = self.config.max_position_embeddings
        if method == "tile" or new_num_position_embeddings <= count:
            weight = old.weight.detach()[torch.arange(new_num_position_embeddings) % count]
        else:
            channels = old.weight.detach().t()[None].float()
            stretched = nn.functional.interpolate(
                channels, new_num_position_embeddings, mode="linear", align_corners=True
            )
            weight = stretched[0].t().contiguous().to(old.weight.dtype)
        new = nn.Embedding.from_pretrained(weight, freeze=not old.weight.requires_grad)
        self.base_model.embeddings.position_embeddings = new
        self.base_model.embeddings.register_position_ids(new_num_position_embeddings, weight.device)
        if self.config.random_plan_positions is None:
            self.config.random_plan_positions = count
        self.config.max_position_embeddings = new_num_position_embeddings

    def set_attention_type(self, value: str) -> None:
        """Chooses which tokens read which, from the next call on: `"block_sparse"` or `"original_full"`. The
        configuration says so, too, and `save_pretrained` keeps it.

        Raises:
            ValueError: for any other value.
        """
        self.base_model.encoder.set_attention_type(value)
        self.config.attention_type = value


TORCHS_ATTENTION = nn.functional.scaled_dot_product_attention


def refuse_context_parallel() -> None:
    """Raises a `ValueError` within torch's `context_parallel`, which gives each process a part of every document. It
    puts a function of its own into the place of `scaled_dot_product_attention`."""
    attention = nn.functional.scaled_dot_product_attention
    if attention is TORCHS_ATTENTION:  # of which torch.compile knows no module
        return
    if str(getattr(attention, "__module__", "")).startswith("torch.distributed."):
        raise ValueError(
            "torch's context_parallel splits documents over processes, and BigBird would read each part as a document "
            "of its own. Use bigbird_plus.context_parallel(mesh) in its place, or share out whole documents: with DDP "
            "or FSDP."
        )


class BigBirdModel(BigBirdPreTrainedModel):
    """BigBird without a head on top: an encoder, or with `config.is_decoder` a decoder.

    Args:
        config: a `BigBirdConfig`.
        add_pooling_layer: whether to add the layer that makes `pooler_output` of the first token's state.
    """

    def __init__(self, config, add_pooling_layer=True):
        """New weights; `from_pretrained` loads those of a checkpoint."""
        super().__init__(config)
        config = self.config
        if config.add_cross_attention and not config.is_decoder:
            raise ValueError("add_cross_attention=True needs is_decoder=True: an encoder reads no other encoder.")
        self.embeddings = BigBirdEmbeddings(config)
        self.encoder = BigBirdEncoder(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        self.activation = nn.Tanh() if add_pooling_layer else None
        self.pooler_is_idle = False
        self.post_init()

    @property
    def attention_type(self) -> str:
        """How the layers read, see `set_attention_type`."""
        return self.encoder.attention_type

    @attention_type.setter
    def attention_type(self, value: str):
        self.set_attention_type(value)

    def freeze_pooler(self) -> None:
        """Keeps the pooling layer of a head that does not use it, for the sake of checkpoints, but out of training: a
        parameter without a gradient stops distributed training. Nor is padding computed for it any more."""
        self.pooler_is_idle = True
        if self.pooler is not None:
            self.pooler.requires_grad_(False)

    def _initialize_weights(self, module, *args):
        super()._initialize_weights(module, *args)
        if module is self and self.pooler_is_idle:
            self.freeze_pooler()  # transformers 5 calls this after it has made new parameters of what it has loaded

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

    def _prune_heads(self, heads_to_prune):
        for layer_idx, heads in heads_to_prune.items():
            self.encoder.layer[layer_idx].attention.prune_heads(heads)

    @uncompiled_for_documents
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        computes_padding: bool | Tensor = False,
        cache=None,
        **kwargs: Unpack[Flattened],
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple:
        """Hidden states of `[batch, length]` tokens.

        Args:
            input_ids: `int64`, `[batch, length]`.
            attention_mask: 1 where a token is real, 0 where it is padding, `[batch, length]`. With full attention
                also `[batch, queries, keys]` and `[batch, 1 or heads, queries, keys]`, see `masks.expand_mask`.
            token_type_ids: `int64`, `[batch, length]`, below `config.type_vocab_size`; zeros by default.
            position_ids: `int64`, `[batch, length]`, below `config.max_position_embeddings` unless they are rotary or
                `config.tiled_positions` is set; counted from the first place of the tensor by default, padding
                included.
            head_mask: `[heads]` or `[layers, heads]`: what the output of each attention head is multiplied by.
            inputs_embeds: `[batch, length, config.embedding_width]`, in the place of `input_ids`.
            encoder_hidden_states: `[batch, source length, hidden_size]`, for a decoder with cross-attention.
            encoder_attention_mask: `[batch, source length]`, as `attention_mask`.
            past_key_values: a cache of transformers, or the tuple of pairs of earlier versions.
            use_cache: whether a decoder fills and returns a cache; `config.use_cache` by default, False under
                `torch.export`.
            output_attentions, output_hidden_states, return_dict: as in all models of transformers.
            cache_position: `int64`, `[length]`: places of the tokens in the cache.
            global_attention_mask: `[batch, length]`, 1 for tokens that read everything and are read by all, besides
                what the pattern says; 0 for others. Without effect where attention is full. Encoders only.
            computes_padding: whether the states of padding shall be computed, too, as `config.computes_padding` has it
                for all calls; or of which places, `bool`, `[1 or batch, length]`. Otherwise they are zero, but in
                decoders and in eager attention, and but for those of first places that `pooler_output` is made of.
            cache: another name of `past_key_values`, that of transformers from 5.24 on.
            **kwargs: of rows that hold several documents, see `attention.documents`: each is read as it is alone, with
                a pattern of its own, and `pooler_output` is `[documents, hidden_size]`. Positions that start anew at 0
                within a row (`position_ids`, without `attention_mask`) are enough.

        Raises:
            ValueError: if both or neither of `input_ids` and `inputs_embeds` are given, if there are more tokens than
                positions, or if a mask does not fit the input or the model; within torch's `context_parallel`; and
                while `torch.onnx.export(..., dynamo=False)` traces a model that can read sparsely.
        """
        self._check(input_ids, inputs_embeds, token_type_ids, position_ids, attention_mask)
        inputs = the_inputs(input_ids, inputs_embeds)
        position_ids = document_positions(position_ids, attention_mask, inputs.shape[:2], kwargs)
        given_cache = the_cache(past_key_values, cache)
        has_documents = given_cache is None and holds_documents(position_ids, attention_mask)
        cache = self._prepare_cache(given_cache, use_cache, has_documents)
        tokens = self._tokens(inputs, position_ids, cache, cache_position)._replace(
            attention_mask=attention_mask,
            global_attention_mask=global_attention_mask,
            has_documents=has_documents,
            wanted=self._wanted(computes_padding, attention_mask),
        )
        plan = self._plan(tokens, computes_padding)

        scales = self._token_scales(input_ids, tokens)
        embeddings = self._embed(plan, input_ids, token_type_ids, inputs_embeds, scales)
        hidden_states = self.embeddings.append_extra_tokens(embeddings, plan.num_documents)
        asked = as_configured(self.config, output_attentions, output_hidden_states)
        asks_for_more = any(asked) or head_mask is not None or encoder_hidden_states is not None
        outputs = self.encoder(
            hidden_states,
            plan,
            self._head_masks(head_mask),
            encoder_hidden_states,
            self._encoder_plan(encoder_attention_mask, encoder_hidden_states, tokens),
            cache,
            cache_position=tokens.cache_position,
            output_attentions=asked[0],
            output_hidden_states=asked[1],
            streams=not asks_for_more and self._streams(hidden_states, plan),
        )
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            pooler_output=self._pool(
                plan, outputs.last_hidden_state, attention_mask, position_ids if has_documents else None
            ),
            **outputs,
        )
        if isinstance(given_cache, (tuple, list)):
            output[CACHE] = tuples_of_cache(cache)
        return as_requested(output, return_dict, self.config)

    def _check(self, input_ids, inputs_embeds, token_type_ids, position_ids, attention_mask):
        refuse_context_parallel()
        self._refuse_onnx_tracer()
        check_inputs(input_ids, inputs_embeds, token_type_ids, position_ids, self.config.embedding_width)
        refuse_empty(the_inputs(input_ids, inputs_embeds))
        if input_ids is not None and may_read_values(input_ids) and not self.config.is_decoder:
            # To a decoder `generate` gives no mask that hides nothing, and a padding token may be what it has chosen.
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)

    def _token_scales(self, input_ids, tokens: Tokens) -> Tensor | None:
        """See `token_scales`; None for none."""
        if input_ids is None or not self.config.token_dropout:
            return None
        positions = tokens.position_ids if tokens.has_documents else None
        return token_scales(input_ids, self.config.mask_token_id, tokens.attention_mask, positions)

    def _embed(self, plan, input_ids, token_type_ids, inputs_embeds, scales) -> Tensor:
        """What enters the layers. In inference only what is packed of a packed batch is embedded, unless somebody
        watches: hooks are shown the batch. (In training checkpointing adds a hook, and shall drop the same.)"""
        given = plan.own_tokens(input_ids, token_type_ids, plan.positions, inputs_embeds, scales)
        is_ours = type(self.embeddings) is BigBirdEmbeddings and not is_watched(self.embeddings)
        embeds_packed = plan.packing is not None and not torch.is_grad_enabled() and is_ours
        if embeds_packed:
            given = [
                None if tensor is None else plan.enter(tensor.expand(plan.batch, *tensor.shape[1:]))
                for tensor in given
            ]
        *given, scales = given
        embeddings = self.embeddings(*given, **({} if scales is None else {"scales": scales}))
        return embeddings if embeds_packed else plan.enter(embeddings)

    def _plan(self, tokens: Tokens, computes_padding: bool | Tensor) -> Plan:
        keeps_all = self.config.computes_padding
        if not isinstance(computes_padding, Tensor):  # else `tokens.wanted` says which
            keeps_all = keeps_all or bool(computes_padding)
        processes = active_processes()
        if processes is not None:
            return share_plan(self.config, self.attention_type, tokens, processes, keeps_all=keeps_all)
        return make_plan(self.config, self.attention_type, tokens, keeps_all=keeps_all)

    def _wanted(self, computes_padding: bool | Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """The places whose states are wanted even of padding, see `Tokens`."""
        if attention_mask is None or self.config.is_decoder:
            return None
        wanted = computes_padding if isinstance(computes_padding, Tensor) else None
        if not self._uses_pooler():
            return wanted
        first = is_first_place(attention_mask)
        return first if wanted is None else wanted | first

    def _tokens(self, inputs, position_ids, cache, cache_position) -> Tokens:
        """What the plan is made of, without masks; `inputs` are ids or embeddings."""
        batch, length = inputs.shape[:2]
        past = tokens_in_cache(cache, cache_position)
        if cache_position is None:
            cache_position = torch.arange(length, device=inputs.device) + past
        return Tokens(
            batch=batch,
            cache_position=cache_position,
            dtype=masks.compute_dtype(inputs.dtype if inputs.is_floating_point() else self.dtype, inputs.device),
            position_ids=position_ids,
            past=past,
            keys=None if cache is None else cached_key_length(cache, length, cache_position),
        )

    def _uses_pooler(self) -> bool:
        return self.pooler is not None and not self.pooler_is_idle

    def _pool(self, plan, hidden_states, attention_mask, position_ids):
        if self.pooler is None:
            return None
        states = plan.first_states(hidden_states, attention_mask, self.config, position_ids)
        return self.activation(self.pooler(states))

    def _refuse_onnx_tracer(self):
        """Its graphs would read inputs of all lengths as they read the one that it sees."""
        is_traced = torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()
        sparsity, longest = Sparsity.from_config(self.config), self.config.longest_input or torch.inf
        if is_traced and is_sparse(sparsity, self.attention_type, longest):
            raise ValueError(
                "torch.onnx.export(..., dynamo=False) cannot express block-sparse attention. Use dynamo=True, or call "
                "set_attention_type('original_full') on the model before."
            )

    def _streams(self, hidden_states: Tensor, plan: Plan) -> bool:
        """Whether the layers write over the states of large inputs, part after part: in inference on a CPU, where they
        can and nobody watches."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not plan.can_stream:
            return False
        layers = self.encoder.layer
        return (
            len(layers) > 0
            and all(type(layer) is BigBirdLayer and layer.can_stream for layer in layers)
            and len({layer.attention_type for layer in layers}) == 1
            and hidden_states[..., 0].numel() > layers[0].tokens_per_chunk(hidden_states)
            and not is_watched(self.embeddings)
            and not is_watched(self.encoder)
        )

    def _prepare_cache(self, past_key_values, use_cache, has_documents=False):
        """The cache to use, a new one where a decoder shall return one; None for none."""
        if has_documents and use_cache and self.config.is_decoder:
            raise ValueError(
                "use_cache=True is for rows of one document each, but position_ids start anew within one."
            )
        if isinstance(past_key_values, (tuple, list)):
            past_key_values = cache_of_tuples(past_key_values)
        if use_cache is None:  # torch.export knows no caches, nor do processes that share a document
            use_cache = self.config.use_cache and not is_exporting() and active_processes() is None
        if self.encoder.gradient_checkpointing and self.training:
            use_cache = False
        if past_key_values is None and use_cache and self.config.is_decoder and not has_documents:
            past_key_values = DynamicCache()  # of as many layers as there are, whatever the configuration says
            if self.config.add_cross_attention:
                past_key_values = EncoderDecoderCache(past_key_values, DynamicCache())
        return past_key_values

    def _encoder_plan(self, mask, encoder_hidden_states, tokens: Tokens) -> FullPart | None:
        """How cross-attention reads."""
        if encoder_hidden_states is None:
            return None
        if not self.config.add_cross_attention:
            raise ValueError("encoder_hidden_states needs a model with cross-attention: add_cross_attention=True.")
        if active_processes() is not None:
            raise ValueError("encoder_hidden_states are not for context_parallel, which shares encoders and decoders.")
        name = full_implementation(self.config)
        shape = ScoreShape(
            tokens.batch, self.config.num_attention_heads, tokens.length, encoder_hidden_states.shape[1]
        )
        mask = masks.cross_attention_mask(mask, shape, dtype=tokens.dtype, implementation=name)
        return FullPart(mask=mask, implementation=name)

    def _head_masks(self, head_mask) -> list[Tensor | None]:
        """The factors of each layer's heads."""
        layers, heads = len(self.encoder.layer), self.config.num_attention_heads
        if head_mask is None:
            return [None] * layers
        if head_mask.shape not in ((heads,), (layers, heads)):
            raise ValueError(
                f"head_mask must have the shape [heads] = [{heads}] or [layers, heads] = [{layers}, {heads}], but has "
                f"{list(head_mask.shape)}."
            )
        return list(head_mask.to(self.dtype).expand(layers, heads))
