"""Lightning: a model inside a LightningModule."""

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from bigbird_plus import BigBirdForSequenceClassification
from tests.peers import random_inputs
from tests.training.common import tiny_model

NAME = "BigBirdForSequenceClassification"
LENGTH = 96  # sparse attention begins at 89


class Classifier(lightning.LightningModule):
    def __init__(self, settings):
        super().__init__()
        self.save_hyperparameters()
        self.model = tiny_model(NAME, **settings)

    def training_step(self, batch, _):
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, _):
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def trainer(folder, **settings):
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


@pytest.fixture
def batches():
    return DataLoader([random_inputs(NAME, 3, LENGTH, seed=seed) for seed in range(2)], batch_size=None)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fit_save_and_reload(precision, batches, tmp_path):
    module = Classifier({"hidden_dropout_prob": 0.1})
    fitter = trainer(tmp_path, max_epochs=4, precision=precision, gradient_clip_val=1.0)
    before = fitter.validate(module, batches, verbose=False)[0]["val_loss"]
    fitter.fit(module, batches, batches)
    assert fitter.callback_metrics["val_loss"] < before - 0.02
    loaded = Classifier.load_from_checkpoint(fitter.checkpoint_callback.best_model_path)
    inputs = batches.dataset[0]
    expected = module.eval().model(**inputs).logits
    torch.testing.assert_close(loaded.eval().model(**inputs).logits, expected, atol=0, rtol=0)
    loaded.model.save_pretrained(tmp_path / "plain")
    plain = BigBirdForSequenceClassification.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(plain(**inputs).logits, expected, atol=0, rtol=0)


def test_resumed_training_is_that_of_one_run(batches, tmp_path):
    whole, first, second = (Classifier({}) for _ in range(3))
    trainer(tmp_path / "whole", max_epochs=3).fit(whole, batches)
    fitter = trainer(tmp_path / "half", max_epochs=1)
    fitter.fit(first, batches)
    path = fitter.checkpoint_callback.best_model_path
    trainer(tmp_path / "half", max_epochs=3).fit(second, batches, ckpt_path=path)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], weight, atol=0, rtol=0)
