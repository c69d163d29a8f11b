"""Train a BigBird encoder and a BigBird decoder to summarize.

    python examples/summarize_encoder_decoder.py --output-dir summarizer

makes its own documents: verses between which, now and then, it says who reigned where for how long. That is the
summary to be found. A small model from scratch learns it in a minute or two on a CPU. With data of your own, and from
checkpoints:

    python examples/summarize_encoder_decoder.py --train-data train.jsonl --eval-data dev.jsonl \
        --encoder google/bigbird-roberta-base --decoder google/bigbird-roberta-base --output-dir summarizer \
        --steps 5000 --batch-size 4 --learning-rate 5e-5 --max-length 4096 --max-summary-length 256

The data are JSON lines: `{"document": "...", "summary": "..."}`.
"""

import argparse
import json
import random
import re
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EncoderDecoderModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

import bigbird_plus

KINGS = ["Abner", "Ahab", "Asa", "David", "Hiram", "Josiah", "Omri", "Saul"]
LANDS = ["Babylon", "Edom", "Egypt", "Gilead", "Judah", "Moab", "Syria", "Tyre"]
YEARS = ["two", "three", "five", "seven", "ten", "twelve", "twenty", "forty"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-data", help="JSON lines file (default: documents are made)")
    parser.add_argument("--eval-data", help="another file, to be given with it")
    parser.add_argument("--encoder", help="hub name or folder (default: a small one from scratch)")
    parser.add_argument("--decoder", help="hub name or folder (default: a small one from scratch)")
    parser.add_argument("--output-dir", required=True, help="where the model goes")
    parser.add_argument("--max-length", type=int, default=1024, help="longer documents are cut")
    parser.add_argument("--max-summary-length", type=int, default=32, help="tokens of a summary")
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup-steps", type=int, default=20)
    parser.add_argument("--num-beams", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--cpu", action="store_true", help="do not use an accelerator")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args(argv)


def make_data(count, seed):
    """Documents of some 400 tokens, and what each of them says four times among other things."""
    draw = random.Random(seed)
    text = Path(bigbird_plus.demo_checkpoint(), "excerpt.txt").read_text(encoding="utf-8")
    verses = re.findall(r"[^.]+\.", " ".join(text.split()))
    for _ in range(count):
        summary = f"{draw.choice(KINGS)} reigned over {draw.choice(LANDS)} {draw.choice(YEARS)} years."
        document = draw.choices(verses, k=7)
        for _ in range(4):
            document.insert(draw.randrange(len(document)), f" And {summary}")
        yield {"document": "".join(document), "summary": summary}


def read_data(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def new_model(tokenizer):
    """An encoder and a decoder with cross-attention, both small, from scratch."""
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "max_position_embeddings": 1024,
        "block_size": 16,
        "num_random_blocks": 2,
        "initializer_range": 0.05,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    encoder = bigbird_plus.BigBirdModel(bigbird_plus.BigBirdConfig(**shape))
    decoder_config = bigbird_plus.BigBirdConfig(**shape, is_decoder=True, add_cross_attention=True)
    return EncoderDecoderModel(encoder=encoder, decoder=bigbird_plus.BigBirdForCausalLM(decoder_config))


def load(args):
    """The model and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(args.encoder or bigbird_plus.demo_checkpoint())
    if args.encoder and args.decoder:
        model = EncoderDecoderModel.from_encoder_decoder_pretrained(args.encoder, args.decoder).float()
    elif args.encoder or args.decoder:
        raise SystemExit("Give both --encoder and --decoder, or neither.")
    else:
        model = new_model(tokenizer)
    for settings in (model.config, model.generation_config):
        settings.decoder_start_token_id = tokenizer.bos_token_id
        settings.eos_token_id = tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def encode(examples, tokenizer, args):
    """Token ids of documents and, as labels, of summaries, each with an end."""
    documents = tokenizer([row["document"] for row in examples], truncation=True, max_length=args.max_length)
    longest = args.max_summary_length - 1
    labels = tokenizer(
        [row["summary"] for row in examples], truncation=True, max_length=longest, add_special_tokens=False
    )
    ends = [[*ids, tokenizer.eos_token_id] for ids in labels["input_ids"]]
    return [{"input_ids": ids, "labels": end} for ids, end in zip(documents["input_ids"], ends, strict=True)]


def main(argv=None):
    args = parse_args(argv)
    set_seed(args.seed)
    if args.train_data:
        train, held_out = read_data(args.train_data), read_data(args.eval_data or args.train_data)
    else:
        train, held_out = list(make_data(args.steps * args.batch_size, args.seed)), list(make_data(16, args.seed + 1))
    model, tokenizer = load(args)
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=args.output_dir,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            warmup_steps=args.warmup_steps,
            max_grad_norm=1.0,
            bf16=args.bf16,
            use_cpu=args.cpu,
            logging_steps=20,
            save_strategy="no",
            seed=args.seed,
            report_to=[],
        ),
        train_dataset=encode(train, tokenizer, args),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    summaries = summarize(model, tokenizer, [row["document"] for row in held_out], args)
    for row, summary in list(zip(held_out, summaries, strict=True))[:4]:
        print(f"wanted: {row['summary']}\nwritten: {summary}")
    right = sum(summary == row["summary"] for row, summary in zip(held_out, summaries, strict=True))
    print(f"{right} of {len(held_out)} held-out summaries are right to the letter")


def summarize(model, tokenizer, documents, args):
    """The summaries of documents, which are batches of padded inputs to the encoder."""
    model.eval()
    summaries = []
    for start in range(0, len(documents), args.batch_size):
        inputs = tokenizer(
            documents[start : start + args.batch_size],
            truncation=True,
            max_length=args.max_length,
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        with torch.inference_mode():
            tokens = model.generate(
                inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=args.max_summary_length,
                num_beams=args.num_beams,
            )
        summaries += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [summary.strip() for summary in summaries]


if __name__ == "__main__":
    main()
