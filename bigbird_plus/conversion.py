"""Makes BigBirds of other checkpoints: of encoders of transformers, of GENA-LM, and of Google's original BigBirds."""

import itertools
import re
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file, logging

from .attention.pattern import Sparsity
from .attention.random_blocks import write_random_blocks
from .configuration_big_bird import BigBirdConfig
from .modeling_big_bird import BigBirdModel
from .modeling_heads import (
    BigBirdForCausalLM,
    BigBirdForMaskedLM,
    BigBirdForMultipleChoice,
    BigBirdForPreTraining,
    BigBirdForQuestionAnswering,
    BigBirdForSequenceClassification,
    BigBirdForTokenClassification,
)
from .tf_checkpoint import find_checkpoint, read_index
from .tokenization_big_bird_fast import BigBirdTokenizerFast

LANGUAGE_MODELS = (BigBirdForPreTraining, BigBirdForMaskedLM, BigBirdForCausalLM)
HEADLESS = (BigBirdModel, BigBirdForQuestionAnswering)
"""Classes that take nothing but the encoder of a source."""
MODELS = (
    *HEADLESS,
    *LANGUAGE_MODELS,
    BigBirdForSequenceClassification,
    BigBirdForMultipleChoice,
    BigBirdForTokenClassification,
)

CARRIED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "initializer_range",
    "layer_norm_eps",
    "use_cache",
    "add_cross_attention",
    "tie_word_embeddings",
    "chunk_size_feed_forward",
)
LABEL_FIELDS = ("num_labels", "id2label", "label2id", "problem_type")
SPECIAL_TOKENS = ("pad", "bos", "eos", "sep")
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")

GOOGLE_VOCABULARY = Path(__file__).parent / "data" / "spiece.model"
GOOGLE_NEEDED = (
    "bert/embeddings/word_embeddings",
    "bert/embeddings/position_embeddings",
    "bert/embeddings/token_type_embeddings",
    "bert/encoder/layer_0/attention/self/query/kernel",
    "bert/encoder/layer_0/intermediate/dense/bias",
)
"""Variables whose shapes tell what the model is like."""
HEAD_SIZE = 64  # of all models that Google has published

WORDS = "bert.embeddings.word_embeddings.weight"
POSITIONS = "bert.embeddings.position_embeddings.weight"
TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"

# Regular expressions, and what takes the place of what they match, one after the other.
TRANSFORMERS_NAMES = (
    (r"^bert\.pooler\.dense\.", "bert.pooler."),
    (r"^lm_head\.dense\.", "cls.predictions.transform.dense."),
    (r"^lm_head\.layer_norm\.", "cls.predictions.transform.LayerNorm."),
    (r"^lm_head\.", "cls.predictions."),
)
GOOGLE_NAMES = (
    (r"^bert/encoder/LayerNorm/", "bert/embeddings/LayerNorm/"),
    (r"^bert/pooler/dense/", "bert/pooler/"),
    (r"^bert/classifier/", "classifier/"),
    (r"/layer_(\d+)/", r"/layer/\1/"),
    (r"/transform/(kernel|bias)$", r"/transform/dense/\1"),
    (r"/transform/(gamma|beta)$", r"/transform/LayerNorm/\1"),
    (r"_embeddings$", "_embeddings/weight"),
    (r"/(kernel|gamma|output_weights)$", "/weight"),
    (r"/(beta|output_bias)$", "/bias"),
    (r"/", "."),
)


DISTILBERT_NAMES = (
    (r"^bert\.transformer\.", "bert.encoder."),
    (r"\.attention\.q_lin\.", ".attention.self.query."),
    (r"\.attention\.k_lin\.", ".attention.self.key."),
    (r"\.attention\.v_lin\.", ".attention.self.value."),
    (r"\.attention\.out_lin\.", ".attention.output.dense."),
    (r"\.sa_layer_norm\.", ".attention.output.LayerNorm."),
    (r"\.ffn\.lin1\.", ".intermediate.dense."),
    (r"\.ffn\.lin2\.", ".output.dense."),
    (r"\.output_layer_norm\.", ".output.LayerNorm."),
    (r"^vocab_transform\.", "cls.predictions.transform.dense."),
    (r"^vocab_layer_norm\.", "cls.predictions.transform.LayerNorm."),
    (r"^vocab_projector\.", "cls.predictions.decoder."),
)
ELECTRA_NAMES = (
    (r"^bert\.embeddings_project\.", "bert.embeddings.projection."),
    (r"^generator_predictions\.", "cls.predictions.transform."),
    (r"^generator_lm_head\.", "cls.predictions.decoder."),
)
ALBERT_NAMES = (
    (r"^bert\.encoder\.embedding_hidden_mapping_in\.", "bert.embeddings.projection."),
    (r"\.attention\.(query|key|value)\.", r".attention.self.\1."),
    (r"\.attention\.(dense|LayerNorm)\.", r".attention.output.\1."),
    (r"\.full_layer_layer_norm\.", ".output.LayerNorm."),
    (r"\.ffn\.", ".intermediate.dense."),
    (r"\.ffn_output\.", ".output.dense."),
    (r"^predictions\.(dense|LayerNorm)\.", r"cls.predictions.transform.\1."),
    (r"^predictions\.", "cls.predictions."),
)
ESM_NAMES = (
    (r"^bert\.embeddings\.layer_norm\.", "bert.embeddings.LayerNorm."),
    (r"^bert\.encoder\.emb_layer_norm_after\.", "bert.encoder.LayerNorm."),
)
GENA_NAMES = (
    (r"^(embeddings|encoder|pooler)\.", r"bert.\1."),
    (r"\.pre_attention_ln\.", ".attention.LayerNorm."),
    (r"\.post_attention_ln\.", ".LayerNorm."),
    (r"\.last_layer_ln\.", ".LayerNorm."),
)


@dataclass
class Source:
    """What a checkpoint has to give: fields of our configuration, weights under the names of our task models.
    `defaults` are fields that the caller may choose otherwise."""

    model_class: type
    fields: dict
    weights: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase | None = None
    generation_config: GenerationConfig | None = None
    defaults: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """How a kind of source differs from BERT.

    prefix: what the names of transformers' classes begin with.
    names: rules that make our names of its own.
    fields: names that fields of our configuration have in its.
    heads: endings of the classes whose heads we have, too.
    counts_from_padding: whether positions are counted from behind the id of padding, as RoBERTa does.
    head_activation: of language modelling; None for the one of the configuration.
    classifier_activation: of sequence classification.
    positions: the kinds of positions that can be converted.
    adapt: takes the source and its configuration, and changes what else has to be.
    """

    prefix: str
    names: tuple = ()
    fields: dict = field(default_factory=dict)
    heads: tuple = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
    counts_from_padding: bool = False
    head_activation: str | None = None
    classifier_activation: str = "tanh"
    positions: tuple = ("absolute",)
    adapt: Callable[[Source, PretrainedConfig], None] = lambda origin, config: None


def convert_checkpoint(source, target, max_position_embeddings=4096, *, architecture=None, **fields):
    """Makes a block-sparse BigBird of another checkpoint, and writes it with its tokenizer into a new folder.

    Inputs that fit the source and are short enough to be read in full (up to 704 tokens, with the default pattern)
    get the source's logits. Longer ones are read sparsely, at positions that repeat those of the source. The head of
    question answering is not BERT's: it is new, and has to be trained.

    RoBERTa counts positions from the first token that is not padding, BigBird from the beginning of the tensor. Pass
    `position_ids` where padding stands on the left.

    What a source has beyond that is told by a warning, or refused:

    * ALBERT: the shared layers become layers of their own, alike at first.
    * Longformer: the window is widened to whole blocks, and there are no random blocks, unless `fields` say otherwise.
      Short inputs are those of half its window. Its global attention is ours (`global_attention_mask`), but for
      projections of its own: where these differ from the local ones, they are left out.
    * GENA-LM: it is sparse at all lengths, and so is its BigBird, which keeps its random blocks (`random_blocks` of
      the configuration). They determine the fields of the pattern.
    * With rotary positions, as ESM and GENA-LM have them, inputs can have any length.

    Args:
        source: a checkpoint of BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, DistilBERT, ALBERT, Longformer, ESM or
            GENA-LM, as a folder or a name on the Hub; or one of Google's TensorFlow checkpoints of BigBird, as the
            path of its `.index` file, with or without the ending, or as the folder of that.
        target: the folder to write, which must be new or empty.
        max_position_embeddings: longest input of the new model, in tokens; with rotary positions the length for which
            random blocks are drawn.
        architecture: the class of the new model, by name (`"BigBirdForMaskedLM"`); by default the counterpart of the
            source's own.
        **fields: other fields of `BigBirdConfig`, such as `block_size` or `num_random_blocks`; where the heads of one
            of Google's checkpoints have not 64 dimensions, also `num_attention_heads`.

    Returns:
        The new model, in evaluation mode.

    Raises:
        ValueError: if `target` is not empty, if there is no counterpart of the source, if it has more positions than
            `max_position_embeddings`, or if it determines one of `fields` itself.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"target must be a new or an empty folder, but {target} is not empty.")
    checkpoint = None if Path(source, "config.json").is_file() else find_checkpoint(source)
    origin = _from_google(checkpoint, architecture) if checkpoint else _from_transformers(source, architecture)
    determined = sorted(fields.keys() & origin.fields.keys())
    if determined:
        raise ValueError(f"{', '.join(determined)} cannot be chosen: the source {source} determines it.")
    if POSITIONS in origin.weights:
        origin.weights[POSITIONS] = _repeat_positions(origin.weights[POSITIONS], max_position_embeddings)
    fields = origin.defaults | fields | origin.fields
    model = _build(origin, BigBirdConfig(max_position_embeddings=max_position_embeddings, **fields))
    model.save_pretrained(target)
    if origin.tokenizer is not None:
        origin.tokenizer.model_max_length = max_position_embeddings
        origin.tokenizer.save_pretrained(target)
    return model


def _repeat_positions(embeddings: Tensor, length: int) -> Tensor:
    """`[length, hidden_size]`: all embeddings one after the other, again and again."""
    if length < len(embeddings):
        raise ValueError(
            f"max_position_embeddings must be at least {len(embeddings)}, which the source has, but is {length}."
        )
    return embeddings[torch.arange(length) % len(embeddings)]


def _build(origin: Source, config: BigBirdConfig):
    """The model, with the weights of the source. Those it does not have are new, which is worth a warning."""
    model = origin.model_class(config)
    own, weights = model.state_dict(), origin.weights
    if origin.model_class is BigBirdModel:
        weights = {name.removeprefix("bert."): weight for name, weight in weights.items()}
    weights = {name: weight for name, weight in weights.items() if name in own}
    model.load_state_dict(weights, strict=False)
    filled = {own[name].data_ptr() for name in weights}  # a weight can have a second name
    new = [name for name, weight in own.items() if weight.data_ptr() not in filled and ".pooler." not in name]
    if new:
        layers = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in new))
        warnings.warn(
            f"The source has no weights for {layers} of {type(model).__name__}. They are new: train them first.",
            stacklevel=3,
        )
    if origin.generation_config is not None:
        model.generation_config = origin.generation_config
    return model.to(origin.weights[WORDS].dtype).eval()


def _choose_class(architecture, names, source, kind) -> tuple[type, type | None]:
    """The class named by `architecture`, or else by the first of `names`; and what the latter names, if anything."""
    own = _counterpart(names[0], kind.prefix) if names else None
    own = own if own in HEADLESS or _has_head(kind, own, own) else None
    chosen = own if architecture is None else _counterpart(architecture, kind.prefix)
    if chosen is None:
        classes = ", ".join(model.__name__ for model in MODELS)
        raise ValueError(
            f"No BigBird corresponds to {architecture or names}, the architecture of {source}. Choose one with "
            f"architecture: {classes}."
        )
    return chosen, own


def _counterpart(architecture: str, prefix: str) -> type | None:
    """Our class for the name of one of transformers', which begins with `prefix`, or of our own."""
    ending = re.sub(f"^(BigBird|{prefix})", "", architecture.replace("LMHeadModel", "ForCausalLM"))
    return {model.__name__: model for model in MODELS}.get(f"BigBird{ending}")


def _ending(model_class: type) -> str:
    return model_class.__name__.removeprefix("BigBird")


def _rename(name: str, rules) -> str:
    for expression, replacement in rules:
        name = re.sub(expression, replacement, name)
    return name


def _split_classifier(weights) -> None:
    """BERT's classifier is the pooling layer and one more, DistilBERT's a layer of its own and one more. Ours has both
    of them to itself."""
    for part in ("weight", "bias"):
        if f"classifier.{part}" in weights:
            weights[f"classifier.out_proj.{part}"] = weights.pop(f"classifier.{part}")
            first = "pre_classifier" if f"pre_classifier.{part}" in weights else "bert.pooler"
            weights[f"classifier.dense.{part}"] = weights[f"{first}.{part}"]


# -------------------------------------------------------------------------------------------------------------------
# Encoders of transformers, and GENA-LM
# -------------------------------------------------------------------------------------------------------------------


def _from_transformers(source, architecture) -> Source:
    config = AutoConfig.from_pretrained(source)
    kind = _kind_of(config, source)
    model_class, own_class = _choose_class(architecture, config.architectures, source, kind)
    _check_config(kind, config, model_class, source)
    if model_class in LANGUAGE_MODELS and not _has_head(kind, None, model_class):
        missing = kind.prefix + _ending(model_class)
        raise ValueError(f"{source} cannot become a {model_class.__name__}: {config.model_type} has no {missing}.")
    tokenizer = load_tokenizer(source)
    origin = Source(model_class, _fields(kind, config), _load_weights(source, kind, "Model"), tokenizer)
    origin.fields |= _special_ids(kind, config, tokenizer)
    # Who asks for a decoder shall get one. Otherwise the source knows what it is.
    is_decoder = getattr(config, "is_decoder", False)
    origin.fields["is_decoder"] = is_decoder or (model_class is BigBirdForCausalLM is not own_class)
    if _has_head(kind, own_class, model_class):
        origin.fields.update({name: getattr(config, name) for name in LABEL_FIELDS})
        origin.weights.update(_load_weights(source, kind, _ending(model_class)))
    _fit_embeddings(origin, kind, config)
    kind.adapt(origin, config)
    if model_class is BigBirdForSequenceClassification:
        origin.fields["classifier_activation"] = kind.classifier_activation
        _split_classifier(origin.weights)
    if model_class is BigBirdForCausalLM and _has_file(source, "generation_config.json"):
        origin.generation_config = GenerationConfig.from_pretrained(source)
    return origin


def _kind_of(config, source) -> Kind:
    model_type = config.model_type
    if model_type in NOT_CONVERTED:
        raise ValueError(f"{source} is a checkpoint of model type {model_type!r}, {NOT_CONVERTED[model_type]}")
    if model_type not in KINDS:
        raise ValueError(
            f"{source} is a checkpoint of model type {model_type!r}. Those that can be converted are "
            f"{', '.join(KINDS)}, GENA-LM's, and Google's TensorFlow checkpoints of BigBird."
        )
    is_gena = any(hasattr(config, name) for name in ("pre_layer_norm", "sparse_attention", "rotary_base"))
    return GENA if model_type == "bert" and is_gena else KINDS[model_type]


def _check_config(kind, config, model_class, source) -> None:
    """Refuses what BigBird has nothing for."""
    positions = getattr(config, "position_embedding_type", "absolute")
    if positions not in kind.positions:
        raise ValueError(
            f"{source} has {positions!r} position embeddings. Of such models only {' and '.join(kind.positions)} ones "
            "can be converted."
        )
    if model_class in LANGUAGE_MODELS and kind.head_activation and kind.head_activation != config.hidden_act:
        raise ValueError(
            f"{source} has hidden_act={config.hidden_act!r}, but its language modelling head uses "
            f"{kind.head_activation!r}. A BigBird has one activation for all its parts."
        )


def _has_head(kind, own_class, model_class) -> bool:
    """Whether the head of a source of `own_class` (None: not known) fits `model_class`."""
    if model_class is None or _ending(model_class) not in kind.heads:
        return False
    return own_class in (None, model_class) or (own_class in LANGUAGE_MODELS and model_class in LANGUAGE_MODELS)


def _fields(kind, config) -> dict:
    """The fields of our configuration that the source has, whatever it calls them."""
    names = {name: kind.fields.get(name, name) for name in CARRIED_FIELDS}
    return {name: getattr(config, theirs) for name, theirs in names.items() if hasattr(config, theirs)}


def _load_weights(source, kind, ending) -> dict[str, Tensor]:
    """The weights, under our names, that the source has for the class with this ending: of the encoder ("Model"), or
    of a head alone."""
    if kind is GENA:
        weights = {_rename(name, GENA_NAMES): weight for name, weight in _read_weights(source).items()}
        is_wanted = {name: name.startswith("bert.") == (ending == "Model") for name in weights}
        weights = {name: weight for name, weight in weights.items() if is_wanted[name]}
    else:
        weights = _weights_of_class(source, (kind.prefix + ending).replace("BertForCausalLM", "BertLMHeadModel"))
    return {_rename(name, (*kind.names, *TRANSFORMERS_NAMES)): weight for name, weight in weights.items()}


def _weights_of_class(source, class_name) -> dict[str, Tensor]:
    model_class = getattr(transformers, class_name)
    with _without_messages():
        model, report = model_class.from_pretrained(source, dtype="auto", output_loading_info=True)
    weights = {name: weight for name, weight in model.state_dict().items() if name not in report["missing_keys"]}
    if class_name.endswith("Model") and not class_name.endswith("LMHeadModel"):
        return {f"bert.{name}": weight for name, weight in weights.items()}
    encoder = f"{model.base_model_prefix}."
    return {name: weight for name, weight in weights.items() if not name.startswith(encoder)}


def _read_weights(source) -> dict[str, Tensor]:
    """The tensors in the file of a model that transformers has no class for."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if _has_file(source, name):
            file = str(cached_file(source, name))
            return load_file(file) if name.endswith("safetensors") else torch.load(file, weights_only=True)
    raise ValueError(f"{source} has neither model.safetensors nor pytorch_model.bin.")


@contextmanager
def _without_messages():
    """Keeps transformers from telling which weights it did not find: `_build` tells what is missing in the end."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _fit_embeddings(origin, kind, config) -> None:
    """Removes the rows of RoBERTa that come before its first position, and doubles its only token type: BigBird's
    question answering tells the question from the document by two. A source without token types gets zeros."""
    weights = origin.weights
    if kind.counts_from_padding and POSITIONS in weights:
        weights[POSITIONS] = weights[POSITIONS][config.pad_token_id + 1 :]
    types = weights.get(TOKEN_TYPES, torch.zeros_like(weights[WORDS][:1]))
    weights[TOKEN_TYPES] = types.repeat(2, 1) if len(types) == 1 else types
    origin.fields["type_vocab_size"] = len(weights[TOKEN_TYPES])


def _adapt_electra(origin, config) -> None:
    if config.embedding_size != config.hidden_size:
        origin.fields["embedding_size"] = config.embedding_size


def _adapt_albert(origin, config) -> None:
    """Gives each layer weights of its own, those that it shares with others."""
    inner, groups = config.inner_group_num, config.num_hidden_groups
    shared = {name: weight for name, weight in origin.weights.items() if ".albert_layer_groups." in name}
    for name, weight in shared.items():
        group, layer = map(int, re.findall(r"\.(\d+)\.", name))
        ending = re.sub(r".*\.albert_layers\.\d+\.", "", name)
        del origin.weights[name]
        for turn in range(config.num_hidden_layers):
            if turn * groups // config.num_hidden_layers == group:
                origin.weights[f"bert.encoder.layer.{turn * inner + layer}.{ending}"] = weight
    origin.fields |= {"num_hidden_layers": config.num_hidden_layers * inner, "embedding_size": config.embedding_size}


def _adapt_longformer(origin, config) -> None:
    """Its window in blocks, and what becomes of the projections of its global attention."""
    windows = config.attention_window if isinstance(config.attention_window, list) else [config.attention_window]
    blocks = -(-(max(windows) // 2) // BigBirdConfig().block_size)
    origin.defaults = {"num_sliding_window_blocks": 2 * blocks + 1, "num_random_blocks": 0}
    projections = [name for name in origin.weights if "_global." in name]
    if all(torch.equal(origin.weights[name], origin.weights[name.replace("_global", "")]) for name in projections):
        return
    lost = "query_global, key_global and value_global of the source differ from its query, key and value"
    if origin.model_class in (BigBirdForSequenceClassification, BigBirdForMultipleChoice):
        raise ValueError(
            f"{lost}, and {origin.model_class.__name__} tells by tokens that use them: BigBird has one projection for "
            "all tokens. Convert the encoder (architecture='BigBirdModel'), and train a head."
        )
    warnings.warn(f"{lost}. They are left out: tokens that are global use the latter.", stacklevel=4)


def _adapt_esm(origin, config) -> None:
    origin.fields |= {"hidden_act": "gelu", "norm_position": "pre"}
    origin.fields["embedding_layer_norm"] = bool(config.emb_layer_norm_before)
    if config.position_embedding_type == "rotary":
        origin.fields |= {"position_embedding_type": "rotary", "rope_theta": getattr(config, "rope_theta", 10000.0)}
    if config.token_dropout:
        origin.fields |= {"token_dropout": True, "mask_token_id": config.mask_token_id}


def _adapt_gena(origin, config) -> None:
    """Layer normalisation, rotary positions, and the pattern that DeepSpeed's configuration names."""
    is_pre = getattr(config, "pre_layer_norm", False)
    origin.fields["norm_position"] = "pre" if is_pre else "post"
    origin.fields["final_layer_norm"] = getattr(config, "last_layer_norm", is_pre)
    if getattr(config, "position_embedding_type", "absolute") == "rotary":
        origin.fields["position_embedding_type"] = "rotary"
        origin.fields["rotary_dim"] = getattr(config, "rotary_dim", None)
        origin.fields["rope_theta"] = config.rotary_base
    pattern = dict(getattr(config, "sparse_attention", None) or {})
    name = getattr(config, "sparse_config_cls", DEEPSPEED_BIGBIRD)
    if not name.endswith(DEEPSPEED_BIGBIRD) or pattern.get("attention", "bidirectional") != "bidirectional":
        raise ValueError(
            f"sparse_config_cls is {name!r} with {pattern}. Only {DEEPSPEED_BIGBIRD}, and that of encoders, "
            "can be converted."
        )
    if pattern:
        _carry_pattern(origin, pattern)


def _carry_pattern(origin, settings) -> None:
    """The pattern of a configuration of DeepSpeed's, and the random blocks that were drawn for it.

    Each layer has a layout, `[heads, blocks, blocks]`: whether a block reads another. DeepSpeed computes with that of
    the first layer in all of them, as it keeps what it makes of a layout by the length of the input alone."""
    fields = {
        "block_size": settings.get("block", 16),
        "num_random_blocks": settings.get("num_random_blocks", 1),
        "num_sliding_window_blocks": settings.get("num_sliding_window_blocks", 3),
        "global_block_indices": list(range(settings.get("num_global_blocks", 1))),
        "different_layout_per_head": settings.get("different_layout_per_head", False),
    }
    if GENA_LAYOUT not in origin.weights:
        origin.defaults = fields
        warnings.warn("The source has no random blocks (master_layout). BigBird draws its own.", stacklevel=5)
        return
    sparsity = Sparsity(origin.fields["num_attention_heads"], **fields)
    is_read = origin.weights[GENA_LAYOUT][: sparsity.num_layouts].numpy() > 0
    is_structure = sparsity.structure(is_read.shape[1]).counts > 0
    if (is_structure & ~is_read).any():
        raise ValueError(f"{GENA_LAYOUT} of the source is no layout of {DEEPSPEED_BIGBIRD} with {settings}.")
    origin.fields |= fields | {"random_blocks": write_random_blocks(is_read & ~is_structure)}


DEEPSPEED_BIGBIRD = "BigBirdSparsityConfig"
GENA_LAYOUT = "bert.encoder.layer.0.attention.self.sparse_self_attention.master_layout"
ROBERTA_HEADS = (
    "ForMaskedLM",
    "ForCausalLM",
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForTokenClassification",
)


def _roberta(prefix: str) -> Kind:
    return Kind(prefix, heads=ROBERTA_HEADS, counts_from_padding=True, head_activation="gelu")


KINDS = {
    "bert": Kind("Bert", heads=(*ROBERTA_HEADS, "ForPreTraining")),
    "roberta": _roberta("Roberta"),
    "xlm-roberta": _roberta("XLMRoberta"),
    "camembert": _roberta("Camembert"),
    "distilbert": Kind(
        "DistilBert",
        DISTILBERT_NAMES,
        {
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
            "classifier_dropout": "seq_classif_dropout",
        },
        classifier_activation="relu",
    ),
    "electra": Kind(
        "Electra",
        ELECTRA_NAMES,
        heads=("ForMaskedLM", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification"),
        head_activation="gelu",
        classifier_activation="gelu",
        adapt=_adapt_electra,
    ),
    "albert": Kind(
        "Albert",
        ALBERT_NAMES,
        {"classifier_dropout": "classifier_dropout_prob"},
        heads=("ForMaskedLM", "ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification"),
        adapt=_adapt_albert,
    ),
    "longformer": Kind(
        "Longformer",
        heads=("ForMaskedLM", "ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification"),
        counts_from_padding=True,
        head_activation="gelu",
        adapt=_adapt_longformer,
    ),
    "esm": Kind("Esm", ESM_NAMES, counts_from_padding=True, positions=("absolute", "rotary"), adapt=_adapt_esm),
}
"""Kinds of source, by `model_type`."""
GENA = Kind("Bert", heads=KINDS["bert"].heads, positions=("absolute", "rotary"), adapt=_adapt_gena)
"""BERT with layer normalisation before attention, rotary positions, or DeepSpeed's sparse attention."""
NOT_CONVERTED = {
    "mpnet": "whose attention adds a learned bias for the distance of two tokens (relative_attention_bias) to each "
    "score. BigBird has nothing for it.",
    "modernbert": "whose feed-forward parts are gated (GeGLU), and most layers of which read nothing but the tokens "
    "around each, with rotary positions of another base (local_rope_theta). BigBird has nothing for it.",
}
"""Model types for which BigBird has no parts, with the reason."""


def _special_ids(kind, config, tokenizer) -> dict[str, int | None]:
    """Ids of the special tokens, from the configuration, or else from the tokenizer."""
    ids = {}
    for token in SPECIAL_TOKENS:
        name = f"{token}_token_id"
        ids[name] = getattr(config, name, None)
        if ids[name] is None:
            ids[name] = getattr(tokenizer, name, None)
    if ids["sep_token_id"] is None and kind.counts_from_padding:
        ids["sep_token_id"] = ids["eos_token_id"]
    return ids


def load_tokenizer(source) -> PreTrainedTokenizerBase | None:
    """The source's tokenizer. (Without files, some versions of transformers make up an empty one.)"""
    has_files = any(_has_file(source, name) for name in VOCABULARY_FILES)
    return AutoTokenizer.from_pretrained(source) if has_files else None


def _has_file(source, name) -> bool:
    try:
        return cached_file(source, name) is not None
    except OSError:
        return False


# -------------------------------------------------------------------------------------------------------------------
# Google's TensorFlow checkpoints
# -------------------------------------------------------------------------------------------------------------------


def _from_google(checkpoint, architecture) -> Source:
    variables = read_index(checkpoint)
    for name in GOOGLE_NEEDED:
        if name not in variables:
            raise ValueError(f"{checkpoint} is no checkpoint of BigBird: it has no {name}.")
    names = {_rename(name, GOOGLE_NAMES): name for name in variables}
    weights = {
        ours: _google_weight(name, variables[name].load())
        for ours, name in names.items()
        if ours.endswith((".weight", ".bias"))  # the others belong to an optimizer
    }
    fields = _google_fields(weights)
    heads = variables["bert/encoder/layer_0/attention/self/query/kernel"].shape[1:-1]
    if heads:
        fields["num_attention_heads"] = heads[0]
    if "classifier.bias" in weights:
        own = "BigBirdForSequenceClassification"
        fields |= {"num_labels": len(weights["classifier.bias"]), "classifier_activation": "tanh"}
        _split_classifier(weights)
    elif "cls.predictions.bias" in weights:
        own = "BigBirdForPreTraining" if "cls.seq_relationship.bias" in weights else "BigBirdForMaskedLM"
    else:
        own = "BigBirdModel"
    model_class, _ = _choose_class(architecture, [own], checkpoint, KINDS["bert"])
    tokenizer = None
    if fields["vocab_size"] == BigBirdConfig().vocab_size:
        tokenizer = BigBirdTokenizerFast(str(GOOGLE_VOCABULARY))
    defaults = {"num_attention_heads": fields["hidden_size"] // HEAD_SIZE}
    return Source(model_class, fields, weights, tokenizer, defaults=defaults)


def _google_weight(name, weight: Tensor) -> Tensor:
    """A weight as torch has it. Attention may have a dimension for the heads and one for what is in a head, and
    kernels are `[in, out]` instead of `[out, in]`."""
    if name.endswith("/bias"):
        return weight.flatten()
    if not name.endswith("/kernel"):
        return weight
    if weight.dim() == 3:
        weight = weight.flatten(1) if "/self/" in name else weight.flatten(0, 1)
    return weight.T.contiguous()


def _google_fields(weights) -> dict:
    """What the shapes tell."""
    layer = "bert.encoder.layer.{}.intermediate.dense.bias"
    vocab_size, hidden_size = weights[WORDS].shape
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": next(i for i in itertools.count() if layer.format(i) not in weights),
        "intermediate_size": len(weights[layer.format(0)]),
        "type_vocab_size": len(weights[TOKEN_TYPES]),
        "use_bias": "bert.encoder.layer.0.attention.self.query.bias" in weights,
    }
