"""Fine-tune BigBird to classify long documents.

    python examples/finetune_classification.py --train-data train.jsonl --eval-data dev.jsonl --output-dir classifier

The data are JSON lines (`{"text": "...", "label": "..."}`), a CSV file with these columns, or the name of a data set
for `datasets.load_dataset`.
"""

import argparse
import os

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import bigbird_plus  # noqa: F401, makes the Auto classes load BigBird from here


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google/bigbird-roberta-base", help="hub name or folder")
    parser.add_argument("--train-data", required=True, help="JSON lines or CSV file, or the name of a data set")
    parser.add_argument("--eval-data", help="another file; without it, the data set's test split, if it has one")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--output-dir", required=True, help="where the model goes")
    parser.add_argument("--max-length", type=int, default=4096, help="longer documents are cut")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--gradient-accumulation", type=int, default=8)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third slower")
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--warmup-steps", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--cpu", action="store_true", help="do not use an accelerator")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args(argv)


def read_data(train, held_out):
    """The splits for training and evaluation (None without any)."""
    if not os.path.isfile(train):
        data = load_dataset(train)
        return data["train"], data.get("test")
    files = {"train": train, **({"test": held_out} if held_out else {})}
    data = load_dataset("csv" if train.endswith(".csv") else "json", data_files=files)
    return data["train"], data.get("test")


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
        args=TrainingArguments(
            output_dir=args.output_dir,
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            gradient_accumulation_steps=args.gradient_accumulation,
            gradient_checkpointing=args.gradient_checkpointing,
            learning_rate=args.learning_rate,
            warmup_steps=args.warmup_steps,
            bf16=args.bf16,
            use_cpu=args.cpu,
            logging_steps=10,
            save_total_limit=1,
            seed=args.seed,
            report_to=[],
        ),
        train_dataset=encode(train, tokenizer, label_ids, args),
        eval_dataset=held_out and encode(held_out, tokenizer, label_ids, args),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    trainer.train()
    if held_out:
        figures = trainer.evaluate()
        print(f"loss {figures['eval_loss']:.4f}, accuracy {figures['eval_accuracy']:.4f}")
    trainer.save_model()


if __name__ == "__main__":
    main()
