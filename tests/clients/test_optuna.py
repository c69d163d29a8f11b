"""optuna, through `Trainer.hyperparameter_search`."""

from tests.training.common import labelled_rows, make_trainer, tiny_model

NAME = "BigBirdForSequenceClassification"


def test_hyperparameter_search(tmp_path):
    rows, made = labelled_rows(NAME), []

    def model_init(trial=None):
        made.append(tiny_model(NAME))
        return made[-1]

    trainer = make_trainer(None, rows, tmp_path, eval_dataset=rows, model_init=model_init, eval_strategy="epoch")
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-7, 3e-3])},
        n_trials=4,
        direction="minimize",
        backend="optuna",
    )
    assert best.hyperparameters == {"learning_rate": 3e-3}
    assert best.objective < 0.9 * tiny_model(NAME)(**trainer.data_collator(rows)).loss
    assert len(made) >= 4
