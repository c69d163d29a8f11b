"""Fine-tune BigBird by LoRA (arXiv 2106.09685): the checkpoint stays as it is, small adapters and the head learn.

    python examples/lora.py --train-data train.jsonl --eval-data dev.jsonl --output-dir adapter --merge-into merged

The data are those of `finetune_classification.py`. PEFT puts the adapters on the query and value projections.
"""

import argparse
import os

import torch
from datasets import load_dataset
from peft import LoraConfig, TaskType, get_peft_model
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
    parser.add_argument("--eval-data", help="another file; or a data set, whose test split is taken")
    parser.add_argument("--output-dir", required=True, help="where the adapter goes")
    parser.add_argument("--merge-into", help="also write the model with the adapter merged into it, to this folder")
    parser.add_argument("--rank", type=int, default=8, help="width of the adapters")
    parser.add_argument("--max-length", type=int, default=4096, help="longer documents are cut")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--gradient-accumulation", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--cpu", action="store_true", help="do not use an accelerator")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args(argv)


def read_data(source, split, tokenizer, max_length, label_ids=None):
    """Encoded documents with labels, and the id of each label (those given, if there are any)."""
    if os.path.isfile(source):
        data = load_dataset("csv" if source.endswith(".csv") else "json", data_files=source, split="train")
    else:
        data = load_dataset(source, split=split)
    if label_ids is None:
        label_ids = {label: index for index, label in enumerate(sorted({str(label) for label in data["label"]}))}

    def encode(batch):
        encoded = tokenizer(batch["text"], truncation=True, max_length=max_length)
        return {**encoded, "labels": [label_ids[str(label)] for label in batch["label"]]}

    return data.map(encode, batched=True, remove_columns=data.column_names), label_ids


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(argv=None):
    args = parse_args(argv)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train, label_ids = read_data(args.train_data, "train", tokenizer, args.max_length)
    held_out = args.eval_data and read_data(args.eval_data, "test", tokenizer, args.max_length, label_ids)[0]
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, dtype=torch.float32, num_labels=len(label_ids)
    )
    adapters = LoraConfig(task_type=TaskType.SEQ_CLS, r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.05)
    model = get_peft_model(model, adapters)
    model.print_trainable_parameters()
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
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    trainer.train()
    if held_out:
        figures = trainer.evaluate()
        print(f"loss {figures['eval_loss']:.4f}, accuracy {figures['eval_accuracy']:.4f}")
    trainer.save_model()
    if args.merge_into:
        model.merge_and_unload().save_pretrained(args.merge_into)
        tokenizer.save_pretrained(args.merge_into)


if __name__ == "__main__":
    main()
