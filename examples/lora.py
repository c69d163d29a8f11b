"""Fine-tune BigBird by LoRA (arXiv 2106.09685): the checkpoint stays as it is, small adapters and the head learn.

    python examples/lora.py --train-data train.jsonl --eval-data dev.jsonl --output-dir adapter --merge-into merged

The data are those of `finetune_classification.py`. PEFT puts the adapters on the query and value projections.
"""

import torch
from common import make_parser, read_data, train_and_evaluate, training_arguments
from finetune_classification import accuracy, encode
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    set_seed,
)

import bigbird_plus  # noqa: F401, makes the Auto classes load BigBird from here


def parse_args(argv=None):
    parser = make_parser(__doc__, learning_rate=5e-4)
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--merge-into", help="also write the model with the adapter merged into it, to this folder")
    parser.add_argument("--rank", type=int, default=8, help="width of the adapters")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train, held_out = read_data(args.train_data, args.eval_data)
    labels = sorted({str(label) for label in train[args.label_column]})
    label_ids = {label: index for index, label in enumerate(labels)}
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, dtype=torch.float32, num_labels=len(label_ids)
    )
    adapters = LoraConfig(task_type=TaskType.SEQ_CLS, r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.05)
    model = get_peft_model(model, adapters)
    model.print_trainable_parameters()
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
    if args.merge_into:
        model.merge_and_unload().save_pretrained(args.merge_into)
        tokenizer.save_pretrained(args.merge_into)


if __name__ == "__main__":
    main()
