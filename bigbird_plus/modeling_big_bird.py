"""BigBird, from embeddings to `BigBirdModel` (arXiv 2007.14062)."""

from functools import partial

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GradientCheckpointingLayer, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.pytorch_utils import prune_linear_layer

from ._compat import CACHE, cache_of_tuples, cached_key_length, tokens_in_cache, tuples_of_cache, wants_tuples
from .attention import (
    SparseInput,
    attend_fully,
    attend_in_documents,
    attend_sparsely,
    cut,
    make_sparse_input,
    masks,
    pad_to_blocks,
    sparse_engine,
)
from .attention.causal import CausalInput, attend_causally, make_causal_input
from .attention.packing import PackedInput, pack_documents
from .attention.pattern import Sparsity, check_whole_number
from .attention.sdpa import can_merge
from .attention.streaming import AttentionStream, is_streamable
from .configuration_big_bird import BigBirdConfig, check_attention_type
from .linear import linear, tanh_gelu
from .memory import pieces_at_once, runs
from .pieces import in_pieces, is_watched

# Three formulas of one function, the tanh approximation of GELU, for which torch has a fused kernel.
TANH_GELUS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")


def activation_function(hidden_act):
    """The activation that `BigBirdConfig.hidden_act` names, or is."""
    if callable(hidden_act):
        return hidden_act
    if hidden_act in TANH_GELUS:
        return tanh_gelu
    return ACT2FN[hidden_act]


def as_requested(output, return_dict: bool | None, config):
    """`output`, or a tuple of what it holds if the caller or the configuration wants one."""
    if wants_tuples(config) if return_dict is None else not return_dict:
        return output.to_tuple()
    return output


def the_cache(past_key_values, cache):
    """That which was given, under one of its names.

    Raises:
        ValueError: if both are given.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of the same. Give one of them.")
    return cache if past_key_values is None else past_key_values


def first_places(states: Tensor, attention_mask: Tensor | None, config) -> Tensor:
    """`int64`, `[batch]`: where the documents of `states`, `[batch, length, ...]`, begin. That is the first place of
    the tensor, padding or not, unless documents are read as they are alone (`config.pattern_per_document`)."""
    if not config.pattern_per_document or attention_mask is None or attention_mask.dim() != 2:
        return torch.zeros(states.shape[0], dtype=torch.int64, device=states.device)
    return (attention_mask != 0).int().argmax(dim=-1)


def first_states(states: Tensor, attention_mask: Tensor | None, config) -> Tensor:
    """`[batch, hidden_size]`: the state of each document's first token."""
    if not config.pattern_per_document:
        return states[:, 0]
    return states[torch.arange(states.shape[0], device=states.device), first_places(states, attention_mask, config)]


class BigBirdEmbeddings(nn.Module):
    """Tokens, positions and token types, added and normalised."""

    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.scale = config.hidden_size**0.5 if config.rescale_embeddings else 1.0
        if config.num_extra_global_tokens:
            self.extra_global_tokens = nn.Embedding(config.num_extra_global_tokens, config.hidden_size)

    def forward(self, input_ids, token_type_ids, position_ids, inputs_embeds) -> Tensor:
        """`[batch, length, hidden_size]`, from ids of `[batch, length]`; `inputs_embeds` stands for `input_ids`."""
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(position_ids)
        width = self.word_embeddings.embedding_dim
        tensors = (inputs, token_type_ids, position_ids)
        return in_pieces(self._embed, *tensors, width=width, modules=self.children())

    def _embed(self, inputs, token_type_ids, position_ids):
        words = inputs if inputs.is_floating_point() else self.word_embeddings(inputs)
        if self.scale != 1.0:
            words = words * self.scale
        embeddings = words + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)
        return self.LayerNorm(self.dropout(embeddings))

    def append_extra_tokens(self, hidden_states: Tensor, documents: int) -> Tensor:
        """`hidden_states`, `[batch, length, hidden_size]`, and behind them the extra global tokens, if there are any:
        those of each document."""
        if not hasattr(self, "extra_global_tokens"):
            return hidden_states
        tokens = self.extra_global_tokens.weight.expand(documents, -1, -1)
        tokens = self.LayerNorm(self.dropout(tokens)).reshape(hidden_states.shape[0], -1, tokens.shape[-1])
        return torch.cat((hidden_states, tokens), dim=1)


class BigBirdSelfAttention(nn.Module):
    """Every token asks, and reads tokens of its own sequence."""

    def __init__(self, config, layer_idx, is_causal):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal  # transformers' attention functions look for it
        self.heads = list(range(config.num_attention_heads))  # those that were not pruned
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.value = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        hidden_states: Tensor,
        mask: SparseInput | CausalInput | Tensor | None,
        head_mask: Tensor | None = None,
        past_key_values=None,
        cache_position: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The context, `[batch, length, heads * head_dim]`, and the probabilities or None."""
        key, value = self.keys_and_values(hidden_states)
        if isinstance(past_key_values, EncoderDecoderCache):
            past_key_values = past_key_values.self_attention_cache
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, {"cache_position": cache_position})
        return self._attend(hidden_states, key, value, mask, head_mask, output_attentions)

    def _attend(self, hidden_states, key, value, mask, head_mask, output_attentions):
        query = self.queries(hidden_states)
        how = {
            "scaling": self.scaling,
            "implementation": self.config._attn_implementation,
            "output_attentions": output_attentions,
        }
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        if isinstance(mask, PackedInput):
            how = {**how, "dropout": dropout, "layer_idx": self.layer_idx, "heads": self.heads}
            context, probabilities = attend_in_documents(self, query, key, value, mask, **how)
        elif isinstance(mask, SparseInput):
            pattern = mask.pattern(self.layer_idx, self.training).for_heads(self.heads)
            tokens = mask.global_tokens
            context, probabilities = attend_sparsely(query, key, value, pattern, mask.key_mask, tokens, **how)
        elif isinstance(mask, CausalInput):
            pattern = mask.sparsity.causal_pattern(mask.num_blocks, layer_idx=self.layer_idx).for_heads(self.heads)
            context, probabilities = attend_causally(query, key, value, pattern, mask, **how)
        else:
            context, probabilities = attend_fully(self, query, key, value, mask, dropout=dropout, **how)
        if head_mask is not None:
            context = context * head_mask[:, None, None]
            probabilities = None if probabilities is None else probabilities * head_mask[:, None, None]
        return context.transpose(1, 2).flatten(2), probabilities

    def queries(self, states: Tensor) -> Tensor:
        """`[batch, heads, length, head_dim]` of `[batch, length, hidden_size]`."""
        return self._split_heads(linear(self.query, states))

    def keys_and_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Both in the shape of the queries."""
        return self._split_heads(linear(self.key, states)), self._split_heads(linear(self.value, states))

    def _split_heads(self, states: Tensor) -> Tensor:
        """`[batch, length, heads * head_dim]` -> `[batch, heads, length, head_dim]`."""
        # Not `unflatten`: the graphs of `torch.onnx.export(..., dynamo=False)` would take the length for a constant.
        return states.view(*states.shape[:-1], len(self.heads), self.head_dim).transpose(1, 2)


class BigBirdCrossAttention(BigBirdSelfAttention):
    """Every token asks, and reads the states of an encoder. Their keys and values are computed once per sequence."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        mask: Tensor | None,
        past_key_values=None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `BigBirdSelfAttention.forward`, on `encoder_hidden_states` of `[batch, source length, hidden_size]`."""
        key, value = self._cached_keys_and_values(encoder_hidden_states, past_key_values)
        return self._attend(hidden_states, key, value, mask, None, output_attentions)

    def _cached_keys_and_values(self, encoder_hidden_states, past_key_values):
        cache = past_key_values if isinstance(past_key_values, EncoderDecoderCache) else None
        if cache is not None and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        key, value = self.keys_and_values(encoder_hidden_states)
        if cache is not None:
            key, value = cache.cross_attention_cache.update(key, value, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        return key, value


class BigBirdOutput(nn.Module):
    """A projection back to the hidden size, added to what went in, and normalised."""

    def __init__(self, config, input_size):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        """`[batch, length, hidden_size]` from `states` of `[batch, length, input_size]`."""
        return in_pieces(self._project, states, residual, width=residual.shape[-1], modules=self.children())

    def _project(self, states, residual):
        if self.dropout.training:
            return self.LayerNorm(self.dropout(linear(self.dense, states)) + residual)
        return self.LayerNorm(linear(self.dense, states, residual=residual))


class BigBirdAttention(nn.Module):
    """Attention, and the projection of its context."""

    def __init__(self, config, layer_idx, is_cross_attention=False):
        super().__init__()
        attention_class = BigBirdCrossAttention if is_cross_attention else BigBirdSelfAttention
        self.self = attention_class(config, layer_idx, is_causal=config.is_decoder and not is_cross_attention)
        self.output = BigBirdOutput(config, config.hidden_size)

    def forward(self, hidden_states, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """The new hidden states and the probabilities or None; arguments as those of the attention within."""
        context, probabilities = self.self(hidden_states, *args, **kwargs)
        return self.output(context, hidden_states), probabilities

    def prune_heads(self, heads) -> None:
        """Removes heads, given by their index among all that there were at first."""
        attention = self.self
        kept = [head for head in attention.heads if head not in heads]
        places = torch.tensor([attention.heads.index(head) for head in kept], dtype=torch.long)
        index = (places[:, None] * attention.head_dim + torch.arange(attention.head_dim)).flatten()
        for name in ("query", "key", "value"):
            setattr(attention, name, prune_linear_layer(getattr(attention, name), index))
        self.output.dense = prune_linear_layer(self.output.dense, index, dim=1)
        attention.heads = kept


class BigBirdIntermediate(nn.Module):
    """The widening half of the feed-forward part."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = activation_function(config.hidden_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., intermediate_size]` from `[..., hidden_size]`."""
        return linear(self.dense, hidden_states, self.activation)


class BigBirdLayer(GradientCheckpointingLayer):
    """Self-attention, cross-attention if there is any, and the feed-forward part."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.intermediate_size = config.intermediate_size
        self.attention = BigBirdAttention(config, layer_idx)
        if config.add_cross_attention:
            self.crossattention = BigBirdAttention(config, layer_idx, is_cross_attention=True)
        self.intermediate = BigBirdIntermediate(config)
        self.output = BigBirdOutput(config, config.intermediate_size)

    def forward(
        self,
        hidden_states: Tensor,
        mask: SparseInput | CausalInput | Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        cache_position: Tensor | None = None,
        output_attentions: bool = False,
        past_key_values=None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """New hidden states, `[batch, length, hidden_size]`, probabilities, and those of cross-attention."""
        hidden_states, probabilities = self.attention(
            hidden_states, mask, head_mask, past_key_values, cache_position, output_attentions
        )
        cross_probabilities = None
        if encoder_hidden_states is not None:
            hidden_states, cross_probabilities = self.crossattention(
                hidden_states, encoder_hidden_states, encoder_mask, past_key_values, output_attentions
            )
        if self.chunk_size_feed_forward:  # any size will do: a packed batch is no multiple of it
            chunks = hidden_states.split(self.chunk_size_feed_forward, dim=1)
            hidden_states = torch.cat([self.feed_forward(chunk) for chunk in chunks], dim=1)
        else:
            modules = (self.intermediate, self.output)
            hidden_states = in_pieces(self.feed_forward, hidden_states, width=self.intermediate_size, modules=modules)
        return hidden_states, probabilities, cross_probabilities

    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        """`[batch, length, hidden_size]`, each token by itself."""
        return self.output(self.intermediate(hidden_states), hidden_states)

    def stream(self, states: Tensor, part: SparseInput | PackedInput) -> None:
        """As `forward`, in inference, but written over `states`, one of the `parts` of an input: of a document that is
        longer than `tokens_at_once` some blocks after others. What that takes does not grow with the length."""
        attention, size = self.attention.self, self.tokens_at_once(states)
        document = part.only_document(attention.layer_idx) if states[..., 0].numel() > size else None
        if document is None or not is_streamable(document[0]):
            states.copy_(self(states, part)[0])
        else:
            self._stream_document(states, *document, part.sparsity.block_size, size)

    def tokens_at_once(self, hidden_states: Tensor) -> int:
        """How many tokens `stream` takes together."""
        return pieces_at_once(self.intermediate_size * hidden_states.element_size())

    def _stream_document(self, states, pattern, key_mask, block_size, size):
        attention = self.attention.self
        first, last = pattern.first_row * block_size, pattern.last_row * block_size
        ends = torch.cat((states[:, :first], states[:, last:]), dim=1)
        asked, read = attention.queries(ends), attention.keys_and_values(ends)
        stream = AttentionStream(pattern, block_size, asked, *read, key_mask, scaling=attention.scaling)
        for rows in runs(pattern.first_row, pattern.last_row, max(1, size // block_size)):
            blocks = stream.blocks_before(rows)
            if blocks:
                stream.read(*attention.keys_and_values(states[:, stream.tokens(blocks)]))
            run = states[:, stream.tokens(rows)]
            run.copy_(self._after_attention(stream.attend(rows, attention.queries(run)), run))
        ends = self._after_attention(stream.outer_context(), ends)
        states[:, :first], states[:, last:] = ends[:, :first], ends[:, first:]

    def _after_attention(self, context, states):
        return self.feed_forward(self.attention.output(context.transpose(1, 2).flatten(2), states))


class BigBirdEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config):
        super().__init__()
        self.layer = nn.ModuleList(BigBirdLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.num_extra = config.num_extra_global_tokens
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states,
        mask,
        head_masks,
        *others,
        length,
        kept,
        past_key_values,
        output_attentions,
        output_hidden_states,
        streams,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """All layers on `[batch, padded length and extra tokens, hidden_size]`, or on a packed batch; what comes out
        is `[batch, length, hidden_size]`, with zeros where `kept`, `bool` of `[batch, length]`, is False. With
        `streams`, the layers write over the states that come in, part after part."""
        restore = mask.unpack if isinstance(mask, PackedInput) else partial(_restore, length=length, kept=kept)
        if streams:
            for states, part in mask.parts(hidden_states, self.layer[0].tokens_at_once(hidden_states)):
                for layer in self.layer:
                    layer.stream(states, part)
            return BaseModelOutputWithPastAndCrossAttentions(restore(hidden_states))
        attentions, cross_attentions = (), ()
        all_hidden_states = (restore(hidden_states),) if output_hidden_states else None
        for layer, head_mask in zip(self.layer, head_masks, strict=True):
            hidden_states, attention, cross_attention = layer(
                hidden_states, mask, head_mask, *others, output_attentions, past_key_values=past_key_values
            )
            if output_hidden_states:
                all_hidden_states += (restore(hidden_states),)
            if output_attentions:
                attentions += (self._of_tokens(attention, mask, length),)
                cross_attentions += () if cross_attention is None else (cross_attention,)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=restore(hidden_states),
            hidden_states=all_hidden_states,
            attentions=attentions if output_attentions else None,
            cross_attentions=cross_attentions or None,
            **{CACHE: past_key_values},
        )

    def _of_tokens(self, probabilities, mask, length):
        """Probabilities without the rows and columns of what is no token of the input."""
        if isinstance(mask, SparseInput):
            return cut(cut(probabilities, length, 2), length, 3)
        if isinstance(mask, PackedInput) or not self.num_extra:
            return probabilities
        return probabilities[:, :, :length, : -self.num_extra]


def _restore(hidden_states: Tensor, length: int, kept: Tensor | None) -> Tensor:
    hidden_states = cut(hidden_states, length, 1)
    return hidden_states if kept is None else hidden_states.masked_fill(~kept[..., None], 0)


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

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        config.check_fields()
        check_whole_number("hidden_size", config.hidden_size, 1)

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

    def get_position_embeddings(self) -> nn.Embedding:
        """The position embeddings, `[max_position_embeddings, hidden_size]`."""
        return self.base_model.embeddings.position_embeddings

    def resize_position_embeddings(self, new_num_position_embeddings: int, method: str = "tile") -> None:
        """Gives the model another number of positions, and says so in its configuration.

        Args:
            new_num_position_embeddings: how many. With fewer than before, the last ones are cut off.
            method: where more come from. `"tile"` repeats those that there are from the beginning, which leaves the
                outputs for short inputs as they were; `"interpolate"` stretches them.

        Raises:
            ValueError: for another method, or fewer than one position.
        """
        check_whole_number("new_num_position_embeddings", new_num_position_embeddings, 1)
        if method not in ("tile", "interpolate"):
            raise ValueError(f"method must be 'tile' or 'interpolate', but is {method!r}.")
        old = self.get_position_embeddings()
        count = old.num_embeddings
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
        if self.config.random_plan_positions is None:
            self.config.random_plan_positions = count
        self.config.max_position_embeddings = new_num_position_embeddings

    def set_attention_type(self, value: str) -> None:
        """Chooses which tokens read which, from the next call on: `"block_sparse"` or `"original_full"`.

        Raises:
            ValueError: for any other value.
        """
        check_attention_type(value)
        self.base_model.attention_type = value


def refuse_context_parallel() -> None:
    """Raises a `ValueError` within torch's `context_parallel`, which gives each process a part of every document. It
    puts a function of its own into the place of `scaled_dot_product_attention`."""
    attention = nn.functional.scaled_dot_product_attention
    if str(getattr(attention, "__module__", "")).startswith("torch.distributed."):
        raise ValueError(
            "context_parallel splits documents over processes, and BigBird would read each part as a document of its "
            "own. Use cp_size=1, and share out whole documents: with DDP or FSDP."
        )


class BigBirdPooler(nn.Linear):
    """The layer behind `pooler_output`. Frozen it stays frozen, also as it gets other parameters: transformers 5 makes
    new ones of what it loads."""

    is_frozen = False

    def freeze(self) -> None:
        self.is_frozen = True
        self.requires_grad_(False)

    def register_parameter(self, name, param):
        if self.is_frozen:
            param.requires_grad_(False)
        super().register_parameter(name, param)


class BigBirdModel(BigBirdPreTrainedModel):
    """BigBird without a head on top: an encoder, or with `config.is_decoder` a decoder.

    Args:
        config: a `BigBirdConfig`.
        add_pooling_layer: whether to add the layer that makes `pooler_output` of the first token's state.
    """

    def __init__(self, config, add_pooling_layer=True):
        super().__init__(config)
        if config.add_cross_attention and not config.is_decoder:
            raise ValueError("add_cross_attention=True needs is_decoder=True: an encoder reads no other encoder.")
        self.attention_type = config.attention_type
        self.embeddings = BigBirdEmbeddings(config)
        self.encoder = BigBirdEncoder(config)
        self.pooler = BigBirdPooler(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

    def _prune_heads(self, heads_to_prune):
        for layer_idx, heads in heads_to_prune.items():
            self.encoder.layer[layer_idx].attention.prune_heads(heads)

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
        computes_padding: bool = False,
        cache=None,
        **kwargs,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple:
        """Hidden states of `[batch, length]` tokens.

        Args:
            input_ids: `int64`, `[batch, length]`.
            attention_mask: 1 where a token is real, 0 where it is padding, `[batch, length]`. With full attention
                also `[batch, queries, keys]` and `[batch, 1 or heads, queries, keys]`, see `masks.expand_mask`.
            token_type_ids: `int64`, `[batch, length]`, below `config.type_vocab_size`; zeros by default.
            position_ids: `int64`, `[batch, length]`, below `config.max_position_embeddings`; counted from the first
                place of the tensor by default, padding included.
            head_mask: `[heads]` or `[layers, heads]`: what the output of each attention head is multiplied by.
            inputs_embeds: `[batch, length, hidden_size]`, in the place of `input_ids`.
            encoder_hidden_states: `[batch, source length, hidden_size]`, for a decoder with cross-attention.
            encoder_attention_mask: `[batch, source length]`, as `attention_mask`.
            past_key_values: a cache of transformers, or the tuple of pairs of earlier versions.
            use_cache: whether a decoder fills and returns a cache; `config.use_cache` by default, False under
                `torch.export`.
            output_attentions, output_hidden_states, return_dict: as in all models of transformers.
            cache_position: `int64`, `[length]`: places of the tokens in the cache.
            global_attention_mask: `[batch, length]`, 1 for tokens that read everything and are read by all, besides
                what the pattern says; 0 for others. Without effect where attention is full. Encoders only.
            computes_padding: whether the states of padding shall be computed, too. Otherwise they are zero, but in
                decoders and in eager attention, and but for those of first places that `pooler_output` is made of.
            cache: another name of `past_key_values`, that of transformers from 5.24 on.

        Raises:
            ValueError: if both or neither of `input_ids` and `inputs_embeds` are given, if there are more tokens than
                positions, or if a mask does not fit the input or the model; within torch's `context_parallel`; and
                while `torch.onnx.export(..., dynamo=False)` traces a model that can read sparsely.
        """
        refuse_context_parallel()
        self._refuse_onnx_tracer()
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds: one of them, and not both.")
        if input_ids is not None and masks.may_read_values(input_ids) and not config.is_decoder:
            # To a decoder `generate` gives no mask that hides nothing, and a padding token may be what it has chosen.
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        batch, length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        device = (input_ids if inputs_embeds is None else inputs_embeds).device

        past_key_values = the_cache(past_key_values, cache)
        wants_tuple_cache = isinstance(past_key_values, (tuple, list))
        past_key_values = self._prepare_cache(past_key_values, use_cache)
        past = tokens_in_cache(past_key_values, cache_position)
        if cache_position is None:
            cache_position = torch.arange(length, device=device) + past
        chosen = self._chosen_tokens(global_attention_mask, batch, length)
        kept = None if computes_padding else self._kept_states(attention_mask, batch, length, past_key_values)
        packed = self._pack(kept, attention_mask, chosen, length, past_key_values)
        self._check_length(past, length, position_ids, packed)
        positions = cache_position[None] if position_ids is None else position_ids
        if packed is not None:
            positions = packed.positions if position_ids is None else packed.pack(position_ids)
            input_ids, token_type_ids, inputs_embeds = map(packed.pack, (input_ids, token_type_ids, inputs_embeds))

        hidden_states = self.embeddings(input_ids, token_type_ids, positions, inputs_embeds)
        mask = packed
        if packed is None:
            mask = self._mask(
                attention_mask, chosen, position_ids, hidden_states, cache_position, past, past_key_values
            )
        if isinstance(mask, SparseInput):
            hidden_states = pad_to_blocks(hidden_states, config.block_size, dim=1)
        asks_for_more = output_attentions or output_hidden_states or head_mask is not None
        documents = batch if packed is None else len(packed.spans)
        hidden_states = self.embeddings.append_extra_tokens(hidden_states, documents)
        outputs = self.encoder(
            hidden_states,
            mask,
            self._head_masks(head_mask),
            encoder_hidden_states,
            self._cross_attention_mask(encoder_attention_mask, encoder_hidden_states, hidden_states),
            cache_position,
            length=length,
            kept=kept,
            past_key_values=past_key_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            streams=not asks_for_more and self._streams(hidden_states, mask),
        )
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            pooler_output=self._pool(outputs.last_hidden_state, attention_mask), **outputs
        )
        if wants_tuple_cache:
            output[CACHE] = tuples_of_cache(past_key_values)
        return as_requested(output, return_dict, config)

    def _pool(self, hidden_states, attention_mask):
        if self.pooler is None:
            return None
        return torch.tanh(self.pooler(first_states(hidden_states, attention_mask, self.config)))

    def _reads_sparsely(self, keys, past_key_values) -> bool:
        """Whether this call does: if there are more keys than the pattern lets a token read anyway. (A decoder's first
        tokens read in full all the same.)"""
        sparsity = Sparsity.from_config(self.config)
        knows_how = self.config.is_decoder or past_key_values is None
        return knows_how and self.attention_type == "block_sparse" and keys > sparsity.full_attention_length

    def _refuse_onnx_tracer(self):
        """Its graphs would read inputs of all lengths as they read the one that it sees."""
        is_traced = torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()
        if is_traced and self._reads_sparsely(self.config.max_position_embeddings, None):
            raise ValueError(
                "torch.onnx.export(..., dynamo=False) cannot express block-sparse attention. Use dynamo=True, or call "
                "set_attention_type('original_full') on the model before."
            )

    def _mask(self, attention_mask, chosen, position_ids, hidden_states, cache_position, past, cache):
        """What self-attention has to know of an input that is not packed."""
        batch, length = hidden_states.shape[:2]
        keys = length if cache is None else cached_key_length(cache, length, cache_position)
        no_mask = self.config.is_decoder and cache is None and attention_mask is None
        document_positions = position_ids if no_mask else None
        if not self._reads_sparsely(keys, cache):
            return self._full_mask(attention_mask, document_positions, hidden_states, cache_position, past, keys)
        if self.config.is_decoder:
            return self._causal_input(attention_mask, document_positions, batch, cache_position, past, keys)
        return self._sparse_input(attention_mask, chosen, batch, length, hidden_states.device)

    def _streams(self, hidden_states: Tensor, mask) -> bool:
        """Whether the layers write over the states of large inputs, part after part: in inference on a CPU, where they
        can and nobody watches."""
        if torch.is_grad_enabled() or not can_merge(hidden_states):
            return False
        if not isinstance(mask, (SparseInput, PackedInput)) or mask.has_global_tokens:
            return False
        layers = self.encoder.layer
        name, block_size = self.config._attn_implementation, self.config.block_size
        engine = sparse_engine(name, hidden_states, hidden_states, hidden_states, block_size=block_size)
        return (
            len(layers) > 0
            and engine == "sdpa"
            and all(type(layer) is BigBirdLayer and not layer.attention.self.training for layer in layers)
            and hidden_states[..., 0].numel() > layers[0].tokens_at_once(hidden_states)
            and not is_watched(self.embeddings)
            and not is_watched(self.encoder)
        )

    def _prepare_cache(self, past_key_values, use_cache):
        """The cache to use, a new one where a decoder shall return one; None for none."""
        if isinstance(past_key_values, (tuple, list)):
            past_key_values = cache_of_tuples(past_key_values)
        if use_cache is None:
            use_cache = self.config.use_cache and not masks.is_exporting()  # torch.export knows no caches
        if self.encoder.gradient_checkpointing and self.training:
            use_cache = False
        if past_key_values is None and use_cache and self.config.is_decoder:
            past_key_values = DynamicCache(config=self.config)
            if self.config.add_cross_attention:
                past_key_values = EncoderDecoderCache(past_key_values, DynamicCache(config=self.config))
        return past_key_values

    def _kept_states(self, attention_mask, batch, length, cache) -> Tensor | None:
        """`bool`, `[batch, length]`: whose states are returned; None for all. Those are the real tokens, and the first
        place of a document even if it is padding, if it is to tell something of the document."""
        config = self.config
        keeps_all = config._attn_implementation == "eager" and not config.pattern_per_document
        if keeps_all or config.is_decoder or cache is not None:
            return None
        if attention_mask is None or attention_mask.dim() != 2:
            return None
        real = masks.padding_mask(attention_mask, batch, length)
        if real is None or config.pattern_per_document or self.pooler is None or self.pooler.is_frozen:
            return real
        is_first = torch.arange(length, device=real.device) == 0
        return real | (is_first & real.any(-1, keepdim=True))

    def _chosen_tokens(self, global_attention_mask, batch, length) -> Tensor | None:
        if global_attention_mask is not None and self.config.is_decoder:
            raise ValueError(
                "global_attention_mask is for encoders: in a decoder (is_decoder=True) a token that is read by all "
                "would be read by earlier ones. Leave it out."
            )
        return masks.global_mask(global_attention_mask, batch, length)

    def _pack(self, kept, attention_mask, chosen, length, cache) -> PackedInput | None:
        """The batch without its padding, where that saves anything, or is to change how documents are read."""
        if kept is None or masks.is_tracing():
            return None
        real = attention_mask != 0
        if (kept & ~real).any():
            return None
        return pack_documents(
            Sparsity.from_config(self.config),
            real,
            reads_sparsely=self._reads_sparsely(length, cache),
            per_document=self.config.pattern_per_document,
            chosen=chosen,
            num_extra=self.config.num_extra_global_tokens,
        )

    def _check_length(self, past, length, position_ids, packed):
        most = self.config.max_position_embeddings
        if packed is not None and self.config.pattern_per_document:
            length = max(span.length for span in packed.spans)
        if position_ids is None and isinstance(past, int) and past + length > most:
            raise ValueError(
                f"The input has {past + length} tokens, but max_position_embeddings is {most}. Cut it "
                f"(truncation=True in the tokenizer), or use a model with more positions."
            )

    def _sparse_input(self, attention_mask, chosen, batch, length, device) -> SparseInput:
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask has the shape {list(attention_mask.shape)}, but block-sparse attention takes "
                f"[batch, length]. Masks of more dimensions need attention_type='original_full'."
            )
        mask = masks.padding_mask(attention_mask, batch, length)
        sparsity, num_extra = Sparsity.from_config(self.config), self.config.num_extra_global_tokens
        return make_sparse_input(sparsity, mask, batch, length, device, chosen=chosen, num_extra=num_extra)

    def _causal_input(self, attention_mask, document_positions, batch, cache_position, past, keys) -> CausalInput:
        is_known = document_positions is not None and not torch.compiler.is_compiling()
        if is_known and masks.document_starts(document_positions).any():
            raise ValueError(
                "position_ids start anew within a row, as those of packed documents do. Give each document a row of "
                "its own, or use attention_type='original_full'."
            )
        return make_causal_input(
            Sparsity.from_config(self.config), attention_mask, batch=batch, places=cache_position, past=past, keys=keys
        )

    def _full_mask(
        self, attention_mask, document_positions, hidden_states, cache_position, past, keys
    ) -> Tensor | None:
        batch = hidden_states.shape[0]
        if document_positions is not None:
            attention_mask = masks.same_document_mask(document_positions.expand(batch, -1))
        num_extra = self.config.num_extra_global_tokens
        if num_extra:
            attention_mask = masks.with_extra_tokens(attention_mask, num_extra)
            cache_position = torch.arange(cache_position.shape[0] + num_extra, device=cache_position.device)
            keys += num_extra
        return masks.full_attention_mask(
            attention_mask,
            batch=batch,
            heads=self.config.num_attention_heads,
            query_positions=cache_position,
            past=past,
            keys=keys,
            is_causal=self.config.is_decoder,
            dtype=masks.compute_dtype(hidden_states),
            implementation=self.config._attn_implementation,
        )

    def _cross_attention_mask(self, mask, encoder_hidden_states, hidden_states) -> Tensor | None:
        if encoder_hidden_states is None:
            return None
        if not self.config.add_cross_attention:
            raise ValueError("encoder_hidden_states needs a model with cross-attention: add_cross_attention=True.")
        return masks.cross_attention_mask(
            mask,
            batch=hidden_states.shape[0],
            heads=self.config.num_attention_heads,
            queries=hidden_states.shape[1],
            keys=encoder_hidden_states.shape[1],
            dtype=masks.compute_dtype(hidden_states),
            implementation=self.config._attn_implementation,
        )

    def _head_masks(self, head_mask) -> list[Tensor | None]:
        """The factors of each layer's heads."""
        layers, heads = self.config.num_hidden_layers, self.config.num_attention_heads
        if head_mask is None:
            return [None] * layers
        if head_mask.shape not in ((heads,), (layers, heads)):
            raise ValueError(
                f"head_mask must have the shape [heads] = [{heads}] or [layers, heads] = [{layers}, {heads}], but has "
                f"{list(head_mask.shape)}."
            )
        return list(head_mask.to(self.dtype).expand(layers, heads))
