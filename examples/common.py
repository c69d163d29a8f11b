"""What the examples that train by transformers' Trainer have in common."""

import argparse
import os

from datasets import load_dataset
from transformers import TrainingArguments


def make_parser(description, *, epochs=3, learning_rate):
    """The arguments of every fine-tuning, with these defaults. Each example adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google/bigbird-roberta-base", help="hub name or folder")
    parser.add_argument("--train-data", required=True, help="a file as described above, or the name of a data set")
    parser.add_argument(
        "--eval-data", help="the same, held out (default: the data set's own test split, if it has one)"
    )
    parser.add_argument("--output-dir", required=True, help="where the model goes")
    parser.add_argument("--max-length", type=int, default=4096, help="tokens; longer documents are cut")
    parser.add_argument("--epochs", type=float, default=epochs)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--gradient-accumulation", type=int, default=8)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third slower")
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--warmup-steps", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--cpu", action="store_true", help="do not use an accelerator")
    parser.add_argument("--seed", type=int, default=42)
    return parser


def training_arguments(args):
    """For the Trainer, from the arguments of `make_parser`."""
    return TrainingArguments(
        output_dir=args.output_dir,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation,
        gradient_checkpointing=args.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},  # adapters learn behind frozen embeddings, too
        learning_rate=args.learning_rate,
        warmup_steps=args.warmup_steps,
        bf16=args.bf16,
        use_cpu=args.cpu,
        logging_steps=10,
        save_total_limit=1,
        seed=args.seed,
        report_to=[],
    )


def read_data(train, held_out):
    """The splits for training and evaluation; None where there is nothing to evaluate."""
    has_own_split = held_out is None and not os.path.isfile(train)
    return _read(train, "train"), _read(train if has_own_split else held_out, "test")


def _read(source, split):
    """A split of a data set, or all of a file of JSON lines or CSV."""
    if source is None or not os.path.isfile(source):
        return source and load_dataset(source).get(split)
    return load_dataset("csv" if source.endswith(".csv") else "json", data_files=source, split="train")


def train_and_evaluate(trainer):
    """Trains, prints loss and accuracy on the held-out data, if there are any, and saves the model."""
    trainer.train()
    if trainer.eval_dataset:
        figures = trainer.evaluate()
        print(f"loss {figures['eval_loss']:.4f}, accuracy {figures['eval_accuracy']:.4f}")
    trainer.save_model()
