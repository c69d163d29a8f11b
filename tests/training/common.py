"""What the tests of training share: small models, data for each of them, and a `Trainer` that does nothing else."""

from transformers import Trainer, TrainingArguments

import bigbird_plus
from tests.peers import random_inputs, scale_weights, tiny_settings

LENGTH = 96  # sparse attention begins at 89


def tiny_model(name, **overrides):
    """A model of the class `name` with weights that matter; the causal one is a decoder."""
    settings = tiny_settings(is_decoder=name == "BigBirdForCausalLM", **overrides)
    return scale_weights(getattr(bigbird_plus, name)(bigbird_plus.BigBirdConfig(**settings)))


def labelled_rows(name, count=4, length=LENGTH, seed=0):
    """`count` inputs with labels, as a data set for `Trainer`."""
    batch = random_inputs(name, count, length, padded=False, seed=seed)
    if "end_positions" in batch:  # those beyond the input do not count, but here every row shall
        batch["end_positions"].clamp_(max=length - 1)
    return [{key: value[row] for key, value in batch.items()} for row in range(count)]


def make_trainer(model, rows, folder, *, trainer_class=Trainer, **settings):
    """A `Trainer` on the CPU, without warm-up, decay of the learning rate, clipping or noise on the console."""
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    trainer_only = {key: settings.pop(key) for key in list(settings) if key in TRAINER_ONLY}
    return trainer_class(
        model=model, args=TrainingArguments(**{**arguments, **settings}), train_dataset=rows, **trainer_only
    )


TRAINER_ONLY = ("model_init", "eval_dataset", "data_collator", "compute_metrics", "callbacks", "processing_class")


def trained_weights(name, folder, *, settings=None, rows=None, **arguments):
    """The weights of a small model after training, by name."""
    trainer = make_trainer(tiny_model(name, **(settings or {})), rows or labelled_rows(name), folder, **arguments)
    trainer.train()
    return {key: value.detach().clone() for key, value in trainer.model.state_dict().items()}
