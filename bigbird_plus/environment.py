"""What a model runs on: the answers of `bigbird-plus env`."""

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers import AutoModel

from . import __version__
from .attention.engines import Call, Choice, choose_engine
from .configuration_big_bird import BigBirdConfig
from .cpu import prefers_onednn

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
        **_sparse_attention(),
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
    model_class: type = AutoModel._model_mapping[BigBirdConfig]  # type: ignore[assignment]  # annotated for tokenizers
    return f"{model_class.__module__}.{model_class.__name__}"


def _sparse_attention() -> dict[str, str]:
    """What computes block-sparse attention, by default and under names that need not be what runs."""
    default = _choose("sdpa", learns=False)
    engines = {"block-sparse attention is": default.name}
    engines |= {f"not {name}, as": reason for name, reason in default.passed_over.items()}
    for name in ("flex_attention", "flash_attention_2"):
        inference, training = (_choose(name, learns=learns).name for learns in (False, True))
        engines[f"block-sparse {name} is"] = (
            inference if inference == training else f"{inference}, and {training} in training"
        )
    return engines


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _choose(implementation: str, *, learns: bool) -> Choice:
    call = Call(_device(), torch.float32, head_dim=64, block_size=64, needs_gradients=learns)
    return choose_engine(implementation, call)
