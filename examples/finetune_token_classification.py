"""Fine-tune BigBird to label the words of long documents: names, parts of speech, ...

    python examples/finetune_token_classification.py --train-data train.jsonl --eval-data dev.jsonl --output-dir tagger

The data are JSON lines (`{"tokens": ["John", "lives", ...], "tags": ["B-PER", "O", ...]}`) or the name of a data set
for `datasets.load_dataset`.
"""

import torch
from common import make_parser, read_data, train_and_evaluate, training_arguments
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    set_seed,
)

import bigbird_plus  # noqa: F401, makes the Auto classes load BigBird from here

NO_LABEL = -100  # is left out of the loss


def parse_args(argv=None):
    parser = make_parser(__doc__, learning_rate=5e-5)
    parser.add_argument("--tokens-column", default="tokens", help="the words of a document")
    parser.add_argument("--tags-column", default="tags", help="a label for each word")
    return parser.parse_args(argv)


def encode(data, tokenizer, label_ids, args):
    """Token ids, and for the first piece of each word the id of its label."""

    def encode_document(document):
        input_ids, labels = [], []
        for word, tag in zip(document[args.tokens_column], document[args.tags_column], strict=True):
            pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
            input_ids += pieces
            labels += [label_ids[str(tag)], *[NO_LABEL] * (len(pieces) - 1)] if pieces else []
        room = args.max_length - 2
        return {
            "input_ids": tokenizer.build_inputs_with_special_tokens(input_ids[:room]),
            "labels": [NO_LABEL, *labels[:room], NO_LABEL],
        }

    return data.map(encode_document, remove_columns=data.column_names)


def accuracy(prediction):
    counted = prediction.label_ids != NO_LABEL
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": float(right[counted].mean())}


def main(argv=None):
    args = parse_args(argv)
    set_seed(args.seed)
    train, held_out = read_data(args.train_data, args.eval_data)
    labels = sorted({str(tag) for tags in train[args.tags_column] for tag in tags})
    label_ids = {label: index for index, label in enumerate(labels)}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForTokenClassification.from_pretrained(
        args.model, dtype=torch.float32, num_labels=len(labels), id2label=dict(enumerate(labels)), label2id=label_ids
    )
    trainer = Trainer(
        model=model,
        args=training_arguments(args),
        train_dataset=encode(train, tokenizer, label_ids, args),
        eval_dataset=held_out and encode(held_out, tokenizer, label_ids, args),
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    train_and_evaluate(trainer)


if __name__ == "__main__":
    main()
