"""optuna, through `Trainer.hyperparameter_search`."""

from optuna.samplers import GridSampler

from tests.training.common import labelled_rows, make_trainer, tiny_model

NAME = "BigBirdForSequenceClassification"


def test_hyperparameter_search(tmp_path):
    rows, made, rates = labelled_rows(NAME), [], [1e-7, 3e-3]

    def model_init(trial=None):
        made.append(tiny_model(NAME))
        return made[-1]

    trainer = make_trainer(None, rows, tmp_path, eval_dataset=rows, model_init=model_init, eval_strategy="epoch")
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates)},
        n_trials=2,
        direction="minimize",
        backend="optuna",
        sampler=GridSampler({"learning_rate": rates}, seed=0),  # one that draws may try one rate alone
    )
    assert best.hyperparameters == {"learning_rate": 3e-3}
    assert best.objective < 0.9 * tiny_model(NAME)(**trainer.data_collator(rows)).loss
    assert len(made) >= 2
