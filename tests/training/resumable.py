"""A run with dropout, and one that kills itself in its fifth step."""

import os
import signal

from transformers import TrainerCallback, set_seed

from tests.training.common import labelled_rows, make_trainer, tiny_model

NAME = "BigBirdForMaskedLM"


class Kill(TrainerCallback):
    """Ends the process the hard way."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, resume=False, callbacks=None):
    """The weights after seven steps."""
    set_seed(0)
    trainer = make_trainer(
        tiny_model(NAME, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1),
        labelled_rows(NAME, count=10),
        folder,
        max_steps=7,
        save_strategy="steps",
        save_steps=3,
        lr_scheduler_type="linear",
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def train_until_killed(folder):
    train(folder, callbacks=[Kill()])
