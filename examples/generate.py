"""Teach a BigBird to write from left to right, and have it go on from the beginning of a text.

    python examples/generate.py

takes the small model and the text that come with the package, learns the text by heart (within a minute on a CPU), and
continues it. With a text and a checkpoint of your own, and without further training:

    python examples/generate.py --train-data text.txt --steps 2000 --output-dir writer
    python examples/generate.py --model writer --steps 0 --prompt "In the beginning" --temperature 0.8

Any BigBird checkpoint becomes a decoder by `is_decoder=True`. Its attention is sparse: a token costs the same after
100,000 tokens as after 1,000.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TextStreamer,
    Trainer,
    TrainingArguments,
    set_seed,
)

import bigbird_plus


def parse_args(argv=None):
    demo = bigbird_plus.demo_checkpoint()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo), help="hub name or folder (default: the one in the package)")
    parser.add_argument("--train-data", default=str(demo / "excerpt.txt"), help="text file (default: as the model)")
    parser.add_argument("--output-dir", help="where the model goes, if it shall be kept")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens in a training input")
    parser.add_argument("--steps", type=int, default=50, help="0 for no training")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--prompt", help="what to go on from (default: the beginning of the text)")
    parser.add_argument("--prompt-tokens", type=int, default=400, help="length of this beginning")
    parser.add_argument("--max-new-tokens", type=int, default=60)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time")
    parser.add_argument("--static-cache", action="store_true", help="keys and values in memory that is taken once")
    parser.add_argument("--cpu", action="store_true", help="do not use an accelerator")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args(argv)


def learn(model, tokens, tokenizer, args, folder):
    """Trains on pieces of the text."""
    length = min(args.max_length, len(tokens))
    starts = range(0, len(tokens) - length + 1, length)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            warmup_steps=args.steps // 10,
            bf16=args.bf16,
            use_cpu=args.cpu,
            logging_steps=10,
            save_strategy="no",
            seed=args.seed,
            report_to=[],
        ),
        train_dataset=[{"input_ids": tokens[start : start + length]} for start in starts],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()


def go_on(model, prompt, tokenizer, args):
    """Writes the continuation as it comes; returns its tokens, and the seconds each of them took."""
    if args.temperature:
        choice = {"do_sample": True, "temperature": args.temperature, "top_k": 0}
    else:
        choice = {"do_sample": False}
    start = time.perf_counter()
    tokens = model.eval().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        cache_implementation="static" if args.static_cache else None,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
        **choice,
    )[0, prompt.shape[1] :]
    return tokens, (time.perf_counter() - start) / len(tokens)


def main(argv=None):
    args = parse_args(argv)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, is_decoder=True, use_cache=True)
    tokens = tokenizer(Path(args.train_data).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    if args.steps:
        with tempfile.TemporaryDirectory() as folder:
            learn(model, tokens, tokenizer, args, folder)
    if args.output_dir:
        model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
    prompt = tokens[: args.prompt_tokens]
    if args.prompt is not None:
        prompt = tokenizer(args.prompt, add_special_tokens=False)["input_ids"]
    print(f"... {tokenizer.decode(prompt[-40:])}\n--- and on:")
    written, seconds = go_on(model, torch.tensor([prompt], device=model.device), tokenizer, args)
    print(f"--- {len(written)} tokens, {1000 * seconds:.1f} ms each")
    if args.prompt is None:
        text = torch.tensor(tokens[len(prompt) : len(prompt) + len(written)])
        same = (written[: len(text)].cpu() == text).sum()
        print(f"--- {same} of {len(text)} are those of the text")


if __name__ == "__main__":
    main()
