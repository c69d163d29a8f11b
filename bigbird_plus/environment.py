"""What a model runs on: the answers of `bigbird-plus env`."""

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers import AutoModel

from . import __version__
from .attention import sparse_engine
from .configuration_big_bird import BigBirdConfig
from .demo import attention_in_use
from .linear import prefers_onednn
from .modeling_big_bird import BigBirdModel

PACKAGES = ("torch", "transformers", "tokenizers", "sentencepiece", "accelerate", "peft", "flash-attn", "triton")


def describe_environment() -> dict[str, str]:
    """Names of things that matter for speed and results, each with what is found here."""
    return {
        "bigbird_plus": __version__,
        "Python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
        "accelerator": _accelerator(),
        "CPU": _cpu(),
        "CPU threads of torch": str(torch.get_num_threads()),
        "AutoModel gives": _auto_model(),
        "float32 linear layers": "oneDNN" if prefers_onednn(torch.ones(1)) else "torch's default",
        "default attention type, implementation": ", ".join(_default_attention()),
        "block-sparse flex_attention is": _sparse_engines("flex_attention"),
        "block-sparse flash_attention_2 is": _sparse_engines("flash_attention_2"),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _accelerator() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "none" if device is None else str(device)


def _cpu() -> str:
    """Vendor and model on Linux, what the platform tells elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = [re.search(rf"^{key}\s*: (.+)$", text, re.MULTILINE) for key in ("vendor_id", "model name")]
    return ", ".join(match[1] for match in found if match) or platform.processor() or platform.machine()


def _auto_model() -> str:
    model_class = AutoModel._model_mapping[BigBirdConfig]
    return f"{model_class.__module__}.{model_class.__name__}"


def _default_attention() -> tuple[str, str]:
    with _device():
        model = BigBirdModel(BigBirdConfig(num_hidden_layers=1, vocab_size=128)).eval()
    return attention_in_use(model, length=model.config.max_position_embeddings)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _sparse_engines(implementation: str) -> str:
    """What computes block-sparse attention under a name on this machine, in inference and in training."""
    inference, training = (torch.empty(0, 64, device=_device(), requires_grad=learns) for learns in (False, True))
    engines = [sparse_engine(implementation, *3 * (states,), block_size=64) for states in (inference, training)]
    return engines[0] if engines[0] == engines[1] else f"{engines[0]}, and {engines[1]} in training"
