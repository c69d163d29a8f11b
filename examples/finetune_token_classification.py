"""Fine-tune BigBird to label the words of long documents: names, parts of speech, ...

    python examples/finetune_token_classification.py --train-data train.jsonl --eval-data dev.jsonl --output-dir tagger

The data are JSON lines (`{"tokens": ["John", "lives", ...], "tags": ["B-PER", "O", ...]}`) or the name of a data set
for `datasets.load_dataset`.
"""

import argparse
import os

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

import bigbird_plus  # noqa: F401, makes the Auto classes load BigBird from here

NO_LABEL = -100  # is left out of the loss


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google/bigbird-roberta-base", help="hub name or folder")
    parser.add_argument("--train-data", required=True, help="JSON lines file, or the name of a data set")
    parser.add_argument("--eval-data", help="another file; without it, the data set's test split, if it has one")
    parser.add_argument("--tokens-column", default="tokens", help="the words of a document")
    parser.add_argument("--tags-column", default="tags", help="a label for each word")
    parser.add_argument("--output-dir", required=True, help="where the model goes")
    parser.add_argument("--max-length", type=int, default=4096, help="longer documents are cut")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--gradient-accumulation", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--cpu", action="store_true", help="do not use an accelerator")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args(argv)


def read_data(train, held_out):
    """The splits for training and evaluation (None without any)."""
    if os.path.isfile(train):
        data = load_dataset("json", data_files={"train": train, **({"test": held_out} if held_out else {})})
    else:
        data = load_dataset(train)
    return data["train"], data.get("test")


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
        args=TrainingArguments(
            output_dir=args.output_dir,
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            gradient_accumulation_steps=args.gradient_accumulation,
            learning_rate=args.learning_rate,
            bf16=args.bf16,
            use_cpu=args.cpu,
            logging_steps=10,
            save_total_limit=1,
            seed=args.seed,
            report_to=[],
        ),
        train_dataset=encode(train, tokenizer, label_ids, args),
        eval_dataset=held_out and encode(held_out, tokenizer, label_ids, args),
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    trainer.train()
    if held_out:
        figures = trainer.evaluate()
        print(f"loss {figures['eval_loss']:.4f}, accuracy of words {figures['eval_accuracy']:.4f}")
    trainer.save_model()


if __name__ == "__main__":
    main()
