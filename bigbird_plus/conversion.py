"""Makes BigBirds of other checkpoints: of BERT, RoBERTa and its kin, and of Google's original BigBirds."""

import itertools
import re
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file, logging

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

FAMILIES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}
"""What the names of transformers' classes begin with, by `model_type`."""

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


@dataclass
class Source:
    """What a checkpoint has to give: fields of our configuration, weights under the names of our task models."""

    model_class: type
    fields: dict
    weights: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase | None = None
    generation_config: GenerationConfig | None = None


def convert_checkpoint(source, target, max_position_embeddings=4096, *, architecture=None, **fields):
    """Makes a block-sparse BigBird of another checkpoint, and writes it with its tokenizer into a new folder.

    Inputs that fit the source and are short enough to be read in full (up to 704 tokens, with the default pattern)
    get the source's logits. Longer ones are read sparsely, at positions that repeat those of the source. The head of
    question answering is not BERT's: it is new, and has to be trained.

    RoBERTa counts positions from the first token that is not padding, BigBird from the beginning of the tensor. Pass
    `position_ids` where padding stands on the left.

    Args:
        source: a checkpoint of BERT, RoBERTa, XLM-RoBERTa or CamemBERT, as a folder or a name on the Hub; or one of
            Google's TensorFlow checkpoints of BigBird, as the path of its `.index` file, with or without the ending,
            or as the folder of that.
        target: the folder to write, which must be new or empty.
        max_position_embeddings: longest input of the new model, in tokens.
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
    origin.weights[POSITIONS] = _repeat_positions(origin.weights[POSITIONS], max_position_embeddings)
    fields = {"num_attention_heads": origin.fields["hidden_size"] // HEAD_SIZE} | fields | origin.fields
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


def _choose_class(architecture, names, source) -> tuple[type, type | None]:
    """The class named by `architecture`, or else by the first of `names`; and what the latter names, if anything."""
    own = _counterpart(names[0]) if names else None
    chosen = own if architecture is None else _counterpart(architecture)
    if chosen is None:
        classes = ", ".join(model.__name__ for model in MODELS)
        raise ValueError(
            f"No BigBird corresponds to {architecture or names}, the architecture of {source}. Choose one with "
            f"architecture: {classes}."
        )
    return chosen, own


def _counterpart(architecture: str) -> type | None:
    """Our class for the name of one of transformers' or our own."""
    prefixes = "|".join(("BigBird", *FAMILIES.values()))
    ending = re.sub(f"^({prefixes})", "", architecture.replace("LMHeadModel", "ForCausalLM"))
    return {model.__name__: model for model in MODELS}.get(f"BigBird{ending}")


def _rename(name: str, rules) -> str:
    for expression, replacement in rules:
        name = re.sub(expression, replacement, name)
    return name


def _split_classifier(weights) -> None:
    """BERT's classifier is the pooling layer and one more. Ours has both of them to itself."""
    for part in ("weight", "bias"):
        if f"classifier.{part}" in weights:
            weights[f"classifier.out_proj.{part}"] = weights.pop(f"classifier.{part}")
            weights[f"classifier.dense.{part}"] = weights[f"bert.pooler.{part}"]


# -------------------------------------------------------------------------------------------------------------------
# BERT, RoBERTa and its kin
# -------------------------------------------------------------------------------------------------------------------


def _from_transformers(source, architecture) -> Source:
    config = AutoConfig.from_pretrained(source)
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{source} is a checkpoint of model type {config.model_type!r}. Those that can be converted are "
            f"{', '.join(FAMILIES)}, and Google's TensorFlow checkpoints of BigBird."
        )
    model_class, own_class = _choose_class(architecture, config.architectures, source)
    _check_config(config, model_class, source)
    tokenizer = _load_tokenizer(source)
    origin = Source(model_class, {}, _load_weights(source, config, "Model"), tokenizer)
    _fit_embeddings(origin.weights, config)
    origin.fields.update({name: getattr(config, name) for name in CARRIED_FIELDS}, **_special_ids(config, tokenizer))
    origin.fields["type_vocab_size"] = len(origin.weights[TOKEN_TYPES])
    # Who asks for a decoder shall get one. Otherwise the source knows what it is.
    origin.fields["is_decoder"] = config.is_decoder or (model_class is BigBirdForCausalLM is not own_class)
    if _has_head(own_class, model_class):
        origin.fields.update({name: getattr(config, name) for name in LABEL_FIELDS})
        origin.weights.update(_load_weights(source, config, model_class.__name__.removeprefix("BigBird")))
    if model_class is BigBirdForSequenceClassification:
        origin.fields["classifier_activation"] = "tanh"
        _split_classifier(origin.weights)
    if model_class is BigBirdForCausalLM and _has_file(source, "generation_config.json"):
        origin.generation_config = GenerationConfig.from_pretrained(source)
    return origin


def _check_config(config, model_class, source) -> None:
    """Refuses what BigBird has nothing for."""
    positions = getattr(config, "position_embedding_type", "absolute")
    if positions != "absolute":
        raise ValueError(f"{source} has {positions!r} position embeddings. Only absolute ones can be converted.")
    if config.model_type != "bert" and model_class in LANGUAGE_MODELS and config.hidden_act != "gelu":
        raise ValueError(
            f"{source} has hidden_act={config.hidden_act!r}, but its language modelling head uses 'gelu'. "
            "A BigBird has one activation for all its parts."
        )


def _has_head(own_class, model_class) -> bool:
    """Whether the head of a source of `own_class` (None: not known) fits `model_class`."""
    if model_class in HEADLESS:
        return False
    return own_class in (None, model_class) or (own_class in LANGUAGE_MODELS and model_class in LANGUAGE_MODELS)


def _load_weights(source, config, ending) -> dict[str, Tensor]:
    """The weights, under our names, that the source has for the class with this ending: of the encoder ("Model"), or
    of a head alone."""
    class_name = (FAMILIES[config.model_type] + ending).replace("BertForCausalLM", "BertLMHeadModel")
    if not hasattr(transformers, class_name):
        raise ValueError(f"{source} cannot become a BigBird{ending}: {config.model_type} has no {class_name}.")
    with _without_messages():
        model, report = getattr(transformers, class_name).from_pretrained(
            source, dtype="auto", output_loading_info=True
        )
    weights = {name: weight for name, weight in model.state_dict().items() if name not in report["missing_keys"]}
    if ending == "Model":
        weights = {f"bert.{name}": weight for name, weight in weights.items()}
    else:
        encoder = f"{model.base_model_prefix}."
        weights = {name: weight for name, weight in weights.items() if not name.startswith(encoder)}
    return {_rename(name, TRANSFORMERS_NAMES): weight for name, weight in weights.items()}


@contextmanager
def _without_messages():
    """Keeps transformers from telling which weights it did not find: `_build` tells what is missing in the end."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _fit_embeddings(weights, config) -> None:
    """Removes the rows of RoBERTa that come before its first position, and doubles its only token type: BigBird's
    question answering tells the question from the document by two."""
    if config.model_type != "bert":
        weights[POSITIONS] = weights[POSITIONS][config.pad_token_id + 1 :]
    if len(weights[TOKEN_TYPES]) == 1:
        weights[TOKEN_TYPES] = weights[TOKEN_TYPES].repeat(2, 1)


def _special_ids(config, tokenizer) -> dict[str, int | None]:
    """Ids of the special tokens, from the configuration, or else from the tokenizer."""
    ids = {}
    for token in SPECIAL_TOKENS:
        name = f"{token}_token_id"
        ids[name] = getattr(config, name, None)
        if ids[name] is None:
            ids[name] = getattr(tokenizer, name, None)
    if ids["sep_token_id"] is None and config.model_type != "bert":
        ids["sep_token_id"] = ids["eos_token_id"]
    return ids


def _load_tokenizer(source) -> PreTrainedTokenizerBase | None:
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
    model_class, _ = _choose_class(architecture, [own], checkpoint)
    tokenizer = None
    if fields["vocab_size"] == BigBirdConfig().vocab_size:
        tokenizer = BigBirdTokenizerFast(str(GOOGLE_VOCABULARY))
    return Source(model_class, fields, weights, tokenizer)


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
