"""Pre-train BigBird by masked language modelling, from scratch or from a checkpoint.

From scratch, with a vocabulary of its own, on one paragraph a line of plain text:

    python examples/pretrain_mlm.py --train-data train.txt --eval-data heldout.txt --vocab-size 4000 \
        --hidden-size 192 --layers 4 --heads 4 --block-size 32 --positions 2048 --max-length 128 --output-dir short

and on with long inputs:

    python examples/pretrain_mlm.py --model short --train-data train.txt --max-length 2048 --output-dir long

A published checkpoint is trained on in the same way: `--model google/bigbird-roberta-base`.
"""

import argparse
import io
import math
import os

import torch
from sentencepiece import SentencePieceTrainer
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from bigbird_plus import BigBirdConfig, BigBirdForMaskedLM, BigBirdTokenizer


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-data", required=True, help="text file (a paragraph a line), or a name for `datasets`")
    parser.add_argument("--eval-data", help="the same, held out")
    parser.add_argument("--text-column", default="text", help="column of a `datasets` data set (default: text)")
    parser.add_argument("--output-dir", required=True, help="where the model goes")

    start = parser.add_argument_group("where to start")
    start.add_argument("--model", help="hub name or folder of a checkpoint; without it, training starts from scratch")
    start.add_argument("--tokenizer", help="hub name or folder, if it is not the model's")
    start.add_argument("--vocab-size", type=int, help="make a SentencePiece vocabulary of this size from the text")
    start.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")

    shape = parser.add_argument_group("shape of a model from scratch")
    shape.add_argument("--hidden-size", type=int, default=768)
    shape.add_argument("--layers", type=int, default=12)
    shape.add_argument("--heads", type=int, default=12)
    shape.add_argument("--positions", type=int, default=4096, help="longest input in tokens")
    shape.add_argument("--block-size", type=int, default=64)
    shape.add_argument("--random-blocks", type=int, default=3)
    shape.add_argument("--initializer-range", type=float, default=0.02, help="spread of the first weights")
    shape.add_argument("--dropout", type=float, default=0.1)

    training = parser.add_argument_group("training")
    training.add_argument("--max-length", type=int, default=4096, help="tokens in a training input")
    training.add_argument("--mlm-probability", type=float, default=0.15, help="share of tokens to predict")
    training.add_argument("--shift-positions", action="store_true", help="train all positions by shorter inputs, too")
    training.add_argument("--steps", type=int, default=1000)
    training.add_argument("--stop-after", type=int, help="end after so many steps of a schedule for --steps")
    training.add_argument("--batch-size", type=int, default=8)
    training.add_argument("--gradient-accumulation", type=int, default=1)
    training.add_argument("--learning-rate", type=float, default=1e-4)
    training.add_argument("--warmup-steps", type=int, default=100)
    training.add_argument("--save-steps", type=int, default=500)
    training.add_argument("--logging-steps", type=int, default=50)
    training.add_argument("--bf16", action="store_true", help="mixed precision")
    training.add_argument("--save-bfloat16", action="store_true", help="write the final weights in bfloat16")
    training.add_argument("--cpu", action="store_true", help="do not use an accelerator")
    training.add_argument("--seed", type=int, default=42)
    return parser.parse_args(argv)


def read_texts(source, column):
    """The paragraphs of a text file, or of the training split of a data set."""
    if os.path.isfile(source):
        with open(source, encoding="utf-8") as file:
            return [line.strip() for line in file if line.strip()]
    from datasets import load_dataset

    return list(load_dataset(source, split="train")[column])


def train_tokenizer(texts, vocab_size, positions, folder):
    """A unigram vocabulary with the special pieces of BigBird's, and the tokenizer for it."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        pad_id=0,
        eos_id=1,
        bos_id=-1,
        unk_id=6,
        user_defined_symbols=["<s>", "[CLS]", "[SEP]", "[MASK]"],
        num_threads=1,
        minloglevel=1,
    )
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "spiece.model")
    with open(f"{path}.{os.getpid()}", "wb") as file:
        file.write(model.getvalue())
    os.replace(file.name, path)  # as a whole: several processes may do this at once
    return BigBirdTokenizer(path, model_max_length=positions)


def new_model(args, tokenizer):
    """A model from scratch, with positions that mean something from the first step on: see `start_with_neighbours`."""
    model = BigBirdForMaskedLM(
        BigBirdConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            intermediate_size=4 * args.hidden_size,
            max_position_embeddings=args.positions,
            block_size=args.block_size,
            num_random_blocks=args.random_blocks,
            initializer_range=args.initializer_range,
            hidden_dropout_prob=args.dropout,
            attention_probs_dropout_prob=args.dropout,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            sep_token_id=tokenizer.sep_token_id,
        )
    )
    with torch.no_grad():
        start_with_neighbours(model.bert)
    return model


def start_with_neighbours(bert, gain=4.0):
    """Lets the heads of the first layer start by reading the token to the left, to the right, two to the left, ...

    A small model that has to find out about neighbours by itself stays at the frequencies of the words for a long
    time. So positions start as sinusoids, in dimensions that words leave free at first. A sinusoid moved by a distance
    is a rotated one, and queries and keys start as what takes such a pair out of the hidden states, and rotates it.
    """
    attention = bert.encoder.layer[0].attention.self
    size, pairs = attention.attention_head_size, attention.attention_head_size // 2
    words, places = bert.embeddings.word_embeddings.weight, bert.embeddings.position_embeddings.weight
    frequency = len(places) ** -torch.linspace(0, 1, pairs)
    angle = torch.arange(len(places))[:, None] * frequency
    words[:, : 2 * pairs] = 0
    places.zero_()
    places[:, : 2 * pairs] = torch.cat((angle.sin(), angle.cos()), dim=1) * 2**0.5 * bert.config.initializer_range
    for head in range(len(attention.heads)):
        distance = (head // 2 + 1) * (1 if head % 2 else -1)
        cos, sin = (distance * frequency).cos().diag(), (distance * frequency).sin().diag()
        rotation = torch.cat((torch.cat((cos, -sin), dim=1), torch.cat((sin, cos), dim=1)))
        rows, columns = slice(head * size, head * size + 2 * pairs), slice(2 * pairs)
        for projection, start in ((attention.query, torch.eye(2 * pairs)), (attention.key, rotation)):
            projection.weight[rows] = 0
            projection.weight[rows, columns] = gain * start


def cut_into_inputs(texts, tokenizer, max_length):
    """All texts, one after the other, in inputs of `max_length` tokens; a rest that does not fill one is left out."""
    tokens = [token for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in ids]
    size = max_length - 2
    pieces = (tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size))
    return [{"input_ids": tokenizer.build_inputs_with_special_tokens(piece)} for piece in pieces]


class ShiftPositions:
    """Puts each input at a random place among the positions of the model, so that short ones train them all."""

    def __init__(self, collator, positions):
        self.collator = collator
        self.positions = positions

    def __call__(self, examples):
        batch = self.collator(examples)
        size, length = batch["input_ids"].shape
        batch["position_ids"] = torch.randint(self.positions - length + 1, (size, 1)) + torch.arange(length)
        return batch


class StopAfter(TrainerCallback):
    """Ends training while the learning rate is still high, for a model that is to be trained on."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.steps:
            control.should_training_stop = True


class PrintLogs(TrainerCallback):
    """Progress as lines of text, for log files."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        figures = ", ".join(f"{name} {value:.4g}" for name, value in logs.items() if isinstance(value, float))
        print(f"step {state.global_step}/{state.max_steps}: {figures}", flush=True)


def prepare(args):
    """The model, its tokenizer, and the inputs for training and evaluation (None without any)."""
    texts = read_texts(args.train_data, args.text_column)
    if args.vocab_size:
        tokenizer = train_tokenizer(texts, args.vocab_size, args.positions, args.output_dir)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model or args.output_dir)
    if args.model:
        model = BigBirdForMaskedLM.from_pretrained(args.model, dtype=torch.float32)
    else:
        model = new_model(args, tokenizer)
    train = cut_into_inputs(texts, tokenizer, args.max_length)
    if not train:
        raise SystemExit(
            f"--train-data {args.train_data} holds less than one input of --max-length {args.max_length}."
        )
    if args.eval_data is None:
        return model, tokenizer, train, None
    return (
        model,
        tokenizer,
        train,
        cut_into_inputs(read_texts(args.eval_data, args.text_column), tokenizer, args.max_length),
    )


def main(argv=None):
    args = parse_args(argv)
    if not (args.model or args.tokenizer or args.vocab_size):
        raise SystemExit("Give --model to train one on, or --tokenizer or --vocab-size to start from scratch.")
    set_seed(args.seed)
    model, tokenizer, train, held_out = prepare(args)
    print(f"{model.num_parameters():,} parameters, {len(train):,} inputs of {args.max_length} tokens", flush=True)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=args.mlm_probability)
    if args.shift_positions:
        collator = ShiftPositions(collator, model.config.max_position_embeddings)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            gradient_accumulation_steps=args.gradient_accumulation,
            learning_rate=args.learning_rate,
            warmup_steps=args.warmup_steps,
            weight_decay=0.01,
            save_steps=args.save_steps,
            save_total_limit=1,
            logging_steps=args.logging_steps,
            bf16=args.bf16,
            use_cpu=args.cpu,
            seed=args.seed,
            report_to=[],
        ),
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[PrintLogs(), StopAfter(args.stop_after or args.steps)],
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    if held_out:
        set_seed(args.seed)  # the same words masked in every run
        loss = trainer.evaluate()["eval_loss"]
        print(f"held-out loss {loss:.4f}, perplexity {math.exp(loss):.1f}", flush=True)
    if args.save_bfloat16:
        model.to(torch.bfloat16)
    trainer.save_model()


if __name__ == "__main__":
    main()
