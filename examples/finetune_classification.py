"""Fine-tune BigBird to classify long documents.

    python examples/finetune_classification.py --train-data train.jsonl --eval-data dev.jsonl --output-dir classifier

The data are JSON lines (`{"text": "...", "label": "..."}`), a CSV file with these columns, or the name of a data set
for `datasets.load_dataset`.
"""

import torch
from common import make_parser, read_data, train_and_evaluate, training_arguments
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    set_seed,
)

import bigbird_plus  # noqa: F401, makes the Auto classes load BigBird from here


def parse_args(argv=None):
    parser = make_parser(__doc__, learning_rate=3e-5)
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    return parser.parse_args(argv)


def encode(data, tokenizer, label_ids, args):
    """Token ids and label ids, instead of texts and labels."""

    def encode_batch(batch):
        encoded = tokenizer(batch[args.text_column], truncation=True, max_length=args.max_length)
        return {**encoded, "labels": [label_ids[str(label)] for label in batch[args.label_column]]}

    return data.map(encode_batch, batched=True, remove_columns=data.column_names)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(argv=None):
    args = parse_args(argv)
    set_seed(args.seed)
    train, held_out = read_data(args.train_data, args.eval_data)
    labels = sorted({str(label) for label in train[args.label_column]})
    label_ids = {label: index for index, label in enumerate(labels)}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, dtype=torch.float32, num_labels=len(labels), id2label=dict(enumerate(labels)), label2id=label_ids
    )
    trainer = Trainer(
        model=model,
        args=training_arguments(args),
        train_dataset=encode(train, tokenizer, label_ids, args),
        eval_dataset=held_out and encode(held_out, tokenizer, label_ids, args),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    train_and_evaluate(trainer)


if __name__ == "__main__":
    main()
