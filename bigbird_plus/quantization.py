"""`quantize(model)`: the linear layers of encoders in 8 bits. `save_pretrained` and `from_pretrained` keep them, by
transformers' registry of quantizers (see `auto`)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import AutoConfig, BigBirdPegasusConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .configuration_big_bird import BigBirdConfig
from .conversion import MODELS, load_tokenizer
from .int8 import Int8Linear, require_int8, rounding_error
from .modeling_big_bird import BigBirdEncoder, BigBirdPreTrainedModel
from .modeling_bigbird_pegasus import (
    BigBirdPegasusEncoder,
    BigBirdPegasusForConditionalGeneration,
    BigBirdPegasusForQuestionAnswering,
    BigBirdPegasusForSequenceClassification,
    BigBirdPegasusModel,
    BigBirdPegasusPreTrainedModel,
)

METHOD = "bigbird_int8"
MOST_ROUNDING_ERROR = 0.025
"""Of a layer that is turned into int8, see `int8.rounding_error`: 2.5 times what is usual."""

ENCODERS = (BigBirdEncoder, BigBirdPegasusEncoder)
PEGASUS_MODELS = (
    BigBirdPegasusModel,
    BigBirdPegasusForConditionalGeneration,
    BigBirdPegasusForSequenceClassification,
    BigBirdPegasusForQuestionAnswering,
)

AnyModel = TypeVar("AnyModel", BigBirdPreTrainedModel, BigBirdPegasusPreTrainedModel)


def quantize(model: AnyModel) -> AnyModel:
    """Turn the linear layers of a model's encoder into int8 ones, in place, for inference on a CPU.

    Weights are rounded once, with a scale for each output; the states that they meet are rounded as they come, with a
    scale for each token. Nothing is calibrated. Layers whose weights have outliers, which make the rounding too
    coarse, stay what they are. So do embeddings, the decoder of BigBird-Pegasus, and heads: those of language models
    share their weights with embeddings. All but heads is frozen.

    Args:
        model: a BigBird or BigBird-Pegasus of this package, with any head, on a CPU.

    Returns:
        The same model. `save_pretrained` writes it, and `from_pretrained` reads it back.

    Raises:
        ValueError: if the model is another one, is quantized by now, is not on a CPU, or if torch lacks the operators.
    """
    _check(model)
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("model is quantized by now. Give the one that it was made of.")
    require_int8(model.device)
    quantizer = BigBirdInt8Quantizer(BigBirdInt8Config(), pre_quantized=False)
    quantizer.preprocess_model(model)
    model.hf_quantizer = quantizer  # type: ignore[assignment]  # as transformers does
    quantizer.postprocess_model(model)
    return model


def quantize_checkpoint(source: str | Path, target: str | Path) -> PreTrainedModel:
    """`quantize`s a checkpoint, and writes it with its tokenizer, where it has one, into a new folder.

    Args:
        source: a local folder, or a name on the Hub. The model is of the class that its configuration names.
        target: the folder to write, which must be new or empty.

    Returns:
        The new model, in evaluation mode.

    Raises:
        ValueError: if `target` is not empty or `source` no BigBird, and as `quantize` does.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"target must be a new or an empty folder, but {target} is not empty.")
    config = AutoConfig.from_pretrained(source)
    name = (config.architectures or ["BigBirdModel"])[0]
    model_class = {model.__name__: model for model in (*MODELS, *PEGASUS_MODELS)}.get(name)
    if not isinstance(config, (BigBirdConfig, BigBirdPegasusConfig)) or model_class is None:
        raise ValueError(f"source must be a BigBird, but {source} is a {config.model_type}, {name}.")
    model = quantize(model_class.from_pretrained(source).eval())
    model.save_pretrained(target)
    tokenizer = load_tokenizer(source)
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    return model


class BigBirdInt8Config(QuantizationConfigMixin):
    """What `config.json` says of a quantized model. `quantize(from_pretrained(name))` is the same as
    `from_pretrained(name, quantization_config=BigBirdInt8Config())`."""

    def __init__(self, quant_method: str = METHOD, kept_layers: Sequence[str] = ()):
        """Without options: these are what the file says.

        Args:
            quant_method: the name of the method.
            kept_layers: the linear layers that were not turned into int8 ones, named as in the encoder.
        """
        self.quant_method = quant_method  # type: ignore[assignment]  # theirs are an enumeration
        self.kept_layers = list(kept_layers)

    def to_diff_dict(self) -> dict:
        """What `repr` shows."""
        return self.to_dict()


class BigBirdInt8Quantizer(HfQuantizer):
    """What `from_pretrained` calls before and after it loads weights."""

    quantization_config: BigBirdInt8Config

    def validate_environment(self, *args, **kwargs):
        """Raises a ValueError where torch lacks the operators."""
        require_int8(torch.device("cpu"))

    def is_serializable(self, safe_serialization=None):
        """Yes, as any model."""
        return True

    @property
    def is_trainable(self):
        """No, not even by adapters: rounding has no gradients."""
        return False

    def _convert_model_for_quantization(self, model):
        """Nothing that there were other layers for."""

    def _process_model_before_weight_loading(self, model, **kwargs):
        _check(model)
        if self.pre_quantized:
            kept = set(self.quantization_config.kept_layers)
            _replace_layers(model, lambda name, layer: layer if name in kept else Int8Linear.like(layer))
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            self.quantization_config = BigBirdInt8Config()  # the one that was given may be for several models
            _replace_layers(model, self._quantized)
            model.config.quantization_config = self.quantization_config
        for module in model.modules():
            if isinstance(module, Int8Linear):
                module.pack()
        model.base_model.requires_grad_(False)
        return model

    def _quantized(self, name: str, layer: nn.Linear) -> nn.Module:
        if rounding_error(layer) <= MOST_ROUNDING_ERROR:
            return Int8Linear.of(layer)
        self.quantization_config.kept_layers.append(name)
        return layer


def _check(model) -> None:
    if not isinstance(model, (BigBirdPreTrainedModel, BigBirdPegasusPreTrainedModel)):
        raise ValueError(
            f"model must be a BigBird of bigbird_plus, not a {type(model).__module__}.{type(model).__name__}."
        )


def _replace_layers(model: nn.Module, make: Callable[[str, nn.Linear], nn.Module]) -> None:
    """Puts `make(name, layer)` in the place of each linear layer of encoders."""
    encoders = [module for module in model.modules() if isinstance(module, ENCODERS)]
    layers = [
        (encoder, name, part)
        for encoder in encoders
        for name, part in encoder.named_modules()
        if type(part) is nn.Linear
    ]
    for encoder, name, layer in layers:
        encoder.set_submodule(name, make(name, layer))
