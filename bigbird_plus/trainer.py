"""`Trainer` for documents that several processes share. Not imported with the package: it needs accelerate."""

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from transformers import Trainer

from .parallel import context_parallel


class ContextParallelTrainer(Trainer):
    """A `Trainer` whose processes share each document, within `context_parallel`.

    How many do is `cp_size` of `TrainingArguments.parallelism_config`, or of accelerate's own configuration. Those get
    the same batches, and the loss of whole documents, in evaluation, too. Other processes get other batches.

    Args:
        *args, **kwargs: those of `Trainer`.

    Raises:
        ValueError: where no processes share documents, and for what would see the logits of a process's own tokens
            alone: `compute_metrics`, `compute_loss_func` and `label_smoothing_factor`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        parallelism = self.accelerator.parallelism_config
        if parallelism is None or not parallelism.cp_enabled:
            raise ValueError(
                f"parallelism_config is {parallelism}, so that no processes share documents. Give "
                "TrainingArguments(parallelism_config=ParallelismConfig(cp_size=...)), or use Trainer."
            )
        sees_logits = {
            "compute_metrics": self.compute_metrics,
            "compute_loss_func": self.compute_loss_func,
            "label_smoothing_factor": self.args.label_smoothing_factor,
        }
        for name, value in sees_logits.items():
            if value:
                raise ValueError(
                    f"{name} is {value}, but no process has the logits of whole documents. Leave the loss to the "
                    "model, and compute metrics by a Trainer in one process."
                )
        self.model_accepts_loss_kwargs = False  # the model's loss is a mean already

    def compute_loss(self, model: nn.Module, inputs: dict, *args, **kwargs):
        """That of `Trainer`, of whole documents."""
        with context_parallel(self.accelerator.torch_device_mesh["cp"]):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _prepare_context_parallel_inputs(
        self, model: nn.Module, inputs: dict
    ) -> tuple[type[AbstractContextManager], dict]:
        return nullcontext, inputs  # whole, where `Trainer` would cut them
