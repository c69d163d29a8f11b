"""The configuration of BigBird: the fields of the public checkpoints, and those that only bigbird_plus has."""

import copy
import math
import reprlib
from numbers import Integral, Real

from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.models.big_bird.configuration_big_bird import BigBirdConfig as BuiltInConfig

from ._compat import CACHE
from .attention.pattern import Sparsity, check_whole_number

ATTENTION_TYPES = ("block_sparse", "original_full")
CHOICES = {"position_embedding_type": ("absolute", "rotary"), "norm_position": ("post", "pre")}
"""Fields that hold one of a few words."""
WHOLE_NUMBERS = {
    "vocab_size": 1,
    "hidden_size": 0,  # none yet; a model wants one
    "num_hidden_layers": 0,
    "num_attention_heads": 1,
    "intermediate_size": 1,
    "max_position_embeddings": 1,
    "type_vocab_size": 1,
    "num_extra_global_tokens": 0,
    "chunk_size_feed_forward": 0,
}
"""Fields that hold a whole number, with the least that makes a model."""
FLAGS = (
    "use_cache",
    "use_bias",
    "rescale_embeddings",
    "eval_random_blocks",
    "different_layout_per_head",
    "global_question_tokens",
    "pattern_per_document",
    "tiled_positions",
    "computes_padding",
    "sparse_prediction",
    "embedding_layer_norm",
    "final_layer_norm",
    "token_dropout",
    "is_decoder",
    "add_cross_attention",
    "tie_word_embeddings",
)

ENCODER_FIELDS = (
    "global_block_indices",
    "num_extra_global_tokens",
    "global_question_tokens",
    "random_blocks",
    "token_dropout",
)
"""Fields that say more than nothing in encoders alone."""


class BigBirdConfig(PretrainedConfig):
    r"""What a BigBird is made of. The defaults are those of
    [google/bigbird-roberta-base](https://huggingface.co/google/bigbird-roberta-base).

    Keys that are not listed here (old checkpoints have some) are kept as attributes and saved again.

    Args:
        vocab_size (`int`, defaults to 50358): number of token ids.
        hidden_size (`int`, defaults to 768): width of the hidden states; a multiple of `num_attention_heads`.
        num_hidden_layers (`int`, defaults to 12): number of layers.
        num_attention_heads (`int`, defaults to 12): attention heads of each layer.
        intermediate_size (`int`, defaults to 3072): width of the feed-forward part of a layer.
        hidden_act (`str` or callable, defaults to `"gelu_new"`): activation of the feed-forward part and the heads.
        hidden_dropout_prob (`float`, defaults to 0.1): dropout of embeddings, projections and heads.
        attention_probs_dropout_prob (`float`, defaults to 0.1): dropout of attention probabilities. Full attention
            only: block-sparse attention has none.
        max_position_embeddings (`int`, defaults to 4096): longest input, in tokens, unless positions are rotary.
        type_vocab_size (`int`, defaults to 2): number of token type ids.
        initializer_range (`float`, defaults to 0.02): standard deviation of new weights.
        layer_norm_eps (`float`, defaults to 1e-12): epsilon of layer normalisation.
        use_cache (`bool`, defaults to `True`): whether a decoder returns keys and values for the next step.
        pad_token_id, bos_token_id, eos_token_id, sep_token_id (`int`, default to 0, 1, 2, 66): special ids.
        attention_type (`str`, defaults to `"block_sparse"`): which tokens read which: `"block_sparse"` (linear in the
            length; inputs too short for it are read in full) or `"original_full"` (quadratic).
        use_bias (`bool`, defaults to `True`): whether query, key and value projections have a bias.
        rescale_embeddings (`bool`, defaults to `False`): multiply token embeddings by `sqrt(hidden_size)`.
        block_size (`int`, defaults to 64): tokens in a block.
        num_random_blocks (`int`, defaults to 3): random blocks that each block reads; 0 is fine.
        classifier_dropout (`float`, *optional*): dropout of classification heads; `None` means `hidden_dropout_prob`.
        classifier_activation (`str` or callable, *optional*): activation of the sequence classification head; `None`
            means `hidden_act`. Converted BERT and RoBERTa checkpoints have `"tanh"`. Only bigbird_plus reads this
            field: transformers' own BigBird ignores it, and gives other logits wherever it is set.
        eval_random_blocks (`bool`, defaults to `False`): read the random blocks of training in evaluation, too, as
            the paper's code did. By default evaluation reads block 0 instead of each of them, which is what
            transformers' own BigBird does.
        num_sliding_window_blocks (`int`, defaults to 3): width of the window in blocks, itself included; odd.
        num_global_blocks (`int`, defaults to 2): blocks that read everything and are read by all. The first half of
            them (rounded up) stands at the beginning of the input, the others at its end; these are lost behind right
            padding, unless `pattern_per_document` is set.
        global_block_indices (`list[int]`, *optional*): which blocks are global, instead of a number of them. Negative
            indices count from the end; what is out of range is ignored. Encoders only.
        num_extra_global_tokens (`int`, defaults to 0): learned tokens besides those of the input that read everything
            and are read by all, in every layer (ETC, arXiv 2004.08483). They have no positions and are no part of what
            models return. Encoders only.
        different_layout_per_head (`bool`, defaults to `True`): whether each head draws random blocks of its own.
        global_question_tokens (`bool`, defaults to `False`): whether question answering makes the tokens of the
            question global, as `global_attention_mask` does. Encoders only.
        pattern_per_document (`bool`, defaults to `False`): give each document of a padded batch, left or right, the
            outputs that it has alone: blocks, pattern and default positions are counted over its own tokens. By
            default they follow the tensor, padding included, as in transformers' own BigBird. Encoders only; has no
            effect while a graph is traced (`torch.compile`, `torch.export`).
        computes_padding (`bool`, defaults to `False`): compute the hidden states of padding, as transformers' own
            BigBird does, for scripts that take means over them. By default they are zero, and cost nothing.
        sparse_prediction (`bool`, defaults to `False`): let `BigBirdForMaskedLM` compute logits only where a label
            counts, if labels are given: `logits` then is `[labels that count, vocab_size]`. The loss is the same.
        random_plan_positions (`int`, *optional*): length, in tokens, for which random blocks are drawn; `None` means
            `max_position_embeddings`. `resize_position_embeddings` keeps it, so that a model with more positions reads
            the same random blocks as before.
        random_blocks (`str`, *optional*): random blocks that all layers read, in training and in evaluation, instead
            of drawing them: the numbers of the blocks between spaces, the rows that read them between commas, heads
            between semicolons (one for all unless `different_layout_per_head`), as in `",,,0,0 2"`. Blocks that a row
            reads anyway may be named, too, and are read once. Rows behind the last read as the first ones do, so many
            blocks further on. Inputs are then read sparsely however short they are. GENA-LM's checkpoints are like
            that. Encoders only.
        position_embedding_type (`str`, defaults to `"absolute"`): `"absolute"` positions are learned and added to the
            embeddings; `"rotary"` ones turn queries and keys. With these there is no longest input:
            `max_position_embeddings` is the length for which random blocks are drawn, and nothing else.
        rotary_dim (`int`, *optional*): numbers of each head that rotary positions turn, an even number; `None` means
            all of them.
        rope_theta (`float`, defaults to 10000.0): base of the angles of rotary positions.
        norm_position (`str`, defaults to `"post"`): where layers normalise: `"post"`, what they add up, as BERT does;
            or `"pre"`, what enters attention and the feed-forward part.
        embedding_layer_norm (`bool`, defaults to `True`): whether embeddings are normalised.
        final_layer_norm (`bool`, defaults to `True`): whether what leaves the last layer is normalised; without effect
            unless `norm_position` is `"pre"`.
        embedding_size (`int`, *optional*): width of the embeddings, from which a projection leads to `hidden_size`;
            `None` means `hidden_size`, and no projection.
        token_dropout (`bool`, defaults to `False`): whether mask tokens are embedded as zeros, and the other tokens of
            a document scaled for their share in it, as ESM does. Needs `mask_token_id`. Encoders only.
        mask_token_id (`int`, *optional*): id of the mask token; `None` unless there is `token_dropout`.
        tiled_positions (`bool`, defaults to `False`): whether positions from `max_position_embeddings` on get the
            embeddings again from the beginning, so that inputs may be of any length. By default they are an error.
        is_decoder (`bool`, defaults to `False`): whether attention is causal.
        add_cross_attention (`bool`, defaults to `False`): whether the layers also read an encoder's states.
        tie_word_embeddings (`bool`, defaults to `True`): whether the language modelling head shares the embeddings.

    Raises:
        ValueError: for a value that makes no model; the message names the field.
    """

    model_type = "big_bird"
    keys_to_ignore_at_inference = [CACHE]
    base_model_tp_plan = {
        "encoder.layer.*.attention.self.query": "colwise",
        "encoder.layer.*.attention.self.key": "colwise",
        "encoder.layer.*.attention.self.value": "colwise",
        "encoder.layer.*.attention.output.dense": "rowwise",
        "encoder.layer.*.intermediate.dense": "colwise",
        "encoder.layer.*.output.dense": "rowwise",
    }

    def __init__(
        self,
        vocab_size=50358,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        hidden_act="gelu_new",
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        max_position_embeddings=4096,
        type_vocab_size=2,
        initializer_range=0.02,
        layer_norm_eps=1e-12,
        use_cache=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        sep_token_id=66,
        attention_type="block_sparse",
        use_bias=True,
        rescale_embeddings=False,
        block_size=64,
        num_random_blocks=3,
        classifier_dropout=None,
        *,
        classifier_activation=None,
        eval_random_blocks=False,
        num_sliding_window_blocks=3,
        num_global_blocks=2,
        global_block_indices=None,
        num_extra_global_tokens=0,
        different_layout_per_head=True,
        global_question_tokens=False,
        pattern_per_document=False,
        computes_padding=False,
        sparse_prediction=False,
        random_plan_positions=None,
        random_blocks=None,
        position_embedding_type="absolute",
        rotary_dim=None,
        rope_theta=10000.0,
        norm_position="post",
        embedding_layer_norm=True,
        final_layer_norm=True,
        embedding_size=None,
        token_dropout=False,
        mask_token_id=None,
        tiled_positions=False,
        is_decoder=False,
        add_cross_attention=False,
        tie_word_embeddings=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.use_cache = use_cache
        self.attention_type = attention_type
        self.use_bias = use_bias
        self.rescale_embeddings = rescale_embeddings
        self.block_size = block_size
        self.num_random_blocks = num_random_blocks
        self.classifier_dropout = classifier_dropout
        self.classifier_activation = classifier_activation
        self.eval_random_blocks = eval_random_blocks
        self.num_sliding_window_blocks = num_sliding_window_blocks
        self.num_global_blocks = num_global_blocks
        self.global_block_indices = global_block_indices
        self.num_extra_global_tokens = num_extra_global_tokens
        self.different_layout_per_head = different_layout_per_head
        self.global_question_tokens = global_question_tokens
        self.pattern_per_document = pattern_per_document
        self.computes_padding = computes_padding
        self.sparse_prediction = sparse_prediction
        self.random_plan_positions = random_plan_positions
        self.random_blocks = random_blocks
        self.position_embedding_type = position_embedding_type
        self.rotary_dim = rotary_dim
        self.rope_theta = rope_theta
        self.norm_position = norm_position
        self.embedding_layer_norm = embedding_layer_norm
        self.final_layer_norm = final_layer_norm
        self.embedding_size = embedding_size
        self.token_dropout = token_dropout
        self.mask_token_id = mask_token_id
        self.tiled_positions = tiled_positions
        # Newer transformers do not declare these three in the base class, and read them all the same.
        self.is_decoder = is_decoder
        self.add_cross_attention = add_cross_attention
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            sep_token_id=sep_token_id,
            is_decoder=is_decoder,
            add_cross_attention=add_cross_attention,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        self.check_fields()

    @classmethod
    def of(cls, config):
        """`config` itself, or if it is transformers' own `BigBirdConfig`, ours with the same fields.

        Raises:
            ValueError: for any other object, and for a field whose value makes no model.
        """
        if isinstance(config, BigBirdConfig):
            return config
        if not isinstance(config, BuiltInConfig):
            raise ValueError(f"config must be a BigBirdConfig, but is a {type(config).__name__}.")
        own = cls()
        own.__dict__.update(copy.deepcopy(config.__dict__))
        own.check_fields()
        return own

    def check_fields(self):
        """Raises a `ValueError` that names the first field whose value makes no model. Models call it, too, since a
        configuration can be changed after it was made."""
        check_attention_type(self.attention_type)
        for field, least in WHOLE_NUMBERS.items():
            check_whole_number(field, getattr(self, field), least)
        for field in ("random_plan_positions", "embedding_size"):
            if getattr(self, field) is not None:
                check_whole_number(field, getattr(self, field), 1)
        for field, choices in CHOICES.items():
            check_choice(field, getattr(self, field), choices)
        for field in FLAGS:
            check_flag(field, getattr(self, field))
        Sparsity.from_config(self)
        if self.is_decoder:
            self._check_decoder()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})."
            )
        self._check_rotation()
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            check_number(field, getattr(self, field), most=1)
        if self.classifier_dropout is not None:
            check_number("classifier_dropout", self.classifier_dropout, most=1)
        for field in ("initializer_range", "layer_norm_eps"):
            check_number(field, getattr(self, field))
        self._check_token_ids()
        check_activation("hidden_act", self.hidden_act)
        if self.classifier_activation is not None:
            check_activation("classifier_activation", self.classifier_activation)

    @property
    def longest_input(self) -> int | None:
        """How many positions there are; None for any number."""
        is_endless = self.position_embedding_type == "rotary" or self.tiled_positions
        return None if is_endless else self.max_position_embeddings

    @property
    def embedding_width(self) -> int:
        """The width of the embeddings."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    def _check_rotation(self):
        check_number("rope_theta", self.rope_theta)
        head_size = self.hidden_size // self.num_attention_heads
        dim = head_size if self.rotary_dim is None else self.rotary_dim
        check_whole_number("rotary_dim", dim, 0)
        if self.position_embedding_type == "rotary" and (dim % 2 or not 0 < dim <= head_size or not self.rope_theta):
            raise ValueError(
                f"rotary_dim must be an even number from 2 to the size of a head ({head_size}), and rope_theta more "
                f"than 0, but they are {self.rotary_dim} and {self.rope_theta}."
            )

    def _check_token_ids(self):
        """Only the embeddings need any of these ids: that of padding, which may count from the end as in torch, and
        for `token_dropout` that of the mask."""
        for field in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "mask_token_id"):
            value = getattr(self, field)
            several = value if field == "eos_token_id" and isinstance(value, (list, tuple)) else [value]
            if not all(one is None or is_whole_number(one) for one in several):
                raise ValueError(f"{field} must be a whole number or None, but is {value!r}.")
        pad = self.pad_token_id
        if pad is not None and not -self.vocab_size <= pad < self.vocab_size:
            raise ValueError(
                f"pad_token_id must be below vocab_size ({self.vocab_size}), but is {pad}. Of "
                "negative ones, which count from the end, -vocab_size is the least."
            )
        if self.token_dropout and self.mask_token_id is None:
            raise ValueError("token_dropout (True) needs mask_token_id: which tokens shall be embedded as zeros.")

    def _check_decoder(self):
        """Raises a `ValueError` for what lets a token read later ones, or has no meaning."""
        for field in ENCODER_FIELDS:
            if getattr(self, field) not in (None, 0, False):
                raise ValueError(
                    f"{field} ({reprlib.repr(getattr(self, field))}) is for encoders: with it, tokens would read the "
                    "future. Leave it out, or set is_decoder=False."
                )
        if self.pattern_per_document:
            raise ValueError(
                "pattern_per_document (True) is for encoders: a decoder counts its blocks from the first real token "
                "of each row in any case. Leave it out, or set is_decoder=False."
            )

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """As in all configurations of transformers, for subclasses of your own.

        Raises:
            ValueError: for this class, see `BigBirdPreTrainedModel.register_for_auto_class`.
        """
        refuse_auto_class(cls)
        super().register_for_auto_class(auto_class)

    def __init_subclass__(cls, **kwargs):
        # transformers 5 makes a dataclass of every subclass, with a generated __init__ and an __eq__ that compares
        # the base class's fields only. A subclass that defines neither keeps ours.
        if "__init__" not in cls.__dict__:

            def __init__(self, *args, **kwargs):
                super(cls, self).__init__(*args, **kwargs)

            cls.__init__ = __init__
        if "__eq__" not in cls.__dict__:
            cls.__eq__ = BigBirdConfig.__eq__
        super().__init_subclass__(**kwargs)

    def __eq__(self, other):
        return isinstance(other, PretrainedConfig) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]  # configurations can be changed


def is_whole_number(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def refuse_auto_class(cls):
    """Raises a `ValueError` if a class is one of this package."""
    if cls.__module__.startswith(__package__ + "."):
        raise ValueError(
            f"{cls.__name__}.register_for_auto_class would save one file of bigbird_plus, which needs all. "
            "Install bigbird_plus where the model is loaded: `import bigbird_plus` registers its classes."
        )


def check_number(name, value, most=math.inf):
    """Raises a `ValueError` that names the field unless `value` is a finite number from 0 to `most`."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= most or math.isinf(value):
        limits = "of at least 0, and finite" if most == math.inf else f"between 0 and {most}"
        raise ValueError(f"{name} must be a number {limits}, but is {value!r}.")


def check_flag(name, value):
    """Raises a `ValueError` that names the field unless `value` is True or False. (A string would be true.)"""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, but is {value!r}.")


def check_activation(name, value):
    """Raises a `ValueError` that names the field unless `value` is an activation, or the name of one."""
    is_known = value in ACT2FN if isinstance(value, str) else callable(value) and not isinstance(value, type)
    if not is_known:
        raise ValueError(
            f"{name} must be a callable or the name of an activation of transformers, but is {value!r}. "
            "Names are the keys of transformers.activations.ACT2FN."
        )


def check_choice(name, value, choices):
    """Raises a `ValueError` that names the field unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, but is {value!r}.")


def check_attention_type(value):
    """Raises a `ValueError` unless `value` is one of `ATTENTION_TYPES`."""
    check_choice("attention_type", value, ATTENTION_TYPES)
