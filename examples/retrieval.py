"""Train an embedder of long documents, by sentence-transformers, and search with it.

    python examples/retrieval.py --output-dir embedder

makes its own documents: verses between which, now and then, it says who reigned where for how long. A query says the
same in other words. In about a minute on two cores the small checkpoint that comes with bigbird_plus learns from short
documents to find long ones, of 4,096 tokens: 20 of 24 held-out queries find theirs first (23 with version 5.7 of
sentence-transformers), 4 before training. With data of your own:

    python examples/retrieval.py --train-data train.jsonl --eval-data dev.jsonl --output-dir embedder \
        --model google/bigbird-roberta-base --max-length 16384 --train-length 4096 --steps 2000 \
        --learning-rate 2e-5

The data are JSON lines: `{"query": "...", "document": "..."}`.
"""

import argparse
import random
import re
from itertools import product

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from summarize_encoder_decoder import KINGS, LANDS, YEARS
from transformers import set_seed

import bigbird_plus

WORDINGS = ["And {0} reigned over {1} {2} years.", "And {2} years was {0} king in {1}."]
QUERY = "The king of {1} for {2} years was {0}."
HELD_OUT = 24
POOLING = "mean of the hidden states, the first of them, or one vector a token (from sentence-transformers 6 on)"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-data", help="JSON lines file (default: documents are made)")
    parser.add_argument("--eval-data", help="another file, to be given with it")
    parser.add_argument("--model", default=str(bigbird_plus.demo_checkpoint()), help="hub name or folder")
    parser.add_argument("--output-dir", required=True, help="where the embedder goes")
    parser.add_argument("--pooling", choices=["mean", "cls", "tokens"], default="cls", help=POOLING)
    parser.add_argument("--max-length", type=int, default=4096, help="tokens; longer documents are cut")
    parser.add_argument("--train-length", type=int, default=384, help="the same in training")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16, help="each document is compared with so many queries")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--cpu", action="store_true", help="do not use an accelerator")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args(argv)


def make_data(facts, length, draw):
    """For each fact a query, and a document of `length` tokens or a few more that says it now and then."""
    verses = re.split(r"(?<=\.) ", bigbird_plus.demo.document())
    for fact in facts:
        document = draw.choices(verses, k=length // 60)
        document += [wording.format(*fact) for wording in draw.choices(WORDINGS, k=length // 20)]
        draw.shuffle(document)
        yield {"query": QUERY.format(*fact), "document": " ".join(document)}


def read_data(args):
    """The pairs to train on, and those held out."""
    if args.train_data:
        return Dataset.from_json(args.train_data), Dataset.from_json(args.eval_data or args.train_data)
    draw = random.Random(args.seed)
    facts = list(product(KINGS, LANDS, YEARS))
    draw.shuffle(facts)
    chosen = draw.choices(facts[HELD_OUT:], k=args.steps * args.batch_size)
    made = make_data(chosen, args.train_length, draw), make_data(facts[:HELD_OUT], args.max_length, draw)
    return [Dataset.from_list(list(pairs)) for pairs in made]


def read_model(args):
    """The model, with as many positions as asked for; each document of a batch is read as it is alone."""
    transformer = Transformer(args.model, max_seq_length=args.max_length)
    model = transformer.auto_model.float()
    model.config.pattern_per_document = True
    if args.max_length > model.config.max_position_embeddings:
        model.resize_position_embeddings(args.max_length)
    device = "cpu" if args.cpu else None
    if args.pooling == "tokens":
        from sentence_transformers import MultiVectorEncoder
        from sentence_transformers.base.modules import Normalize
        from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

        modules = [transformer, MultiVectorMask(), Normalize(module_input_name="token_embeddings")]
        return MultiVectorEncoder(modules=modules, device=device)
    pooling = Pooling(model.config.hidden_size, pooling_mode=args.pooling)
    return SentenceTransformer(modules=[transformer, pooling], device=device)


def train(model, pairs, args):
    """Pulls each query to its document, and away from the others of the batch."""
    trainer_class, arguments_class = SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    loss = MultipleNegativesRankingLoss
    if args.pooling == "tokens":
        from sentence_transformers.multi_vector_encoder import MultiVectorEncoderTrainer as trainer_class
        from sentence_transformers.multi_vector_encoder import MultiVectorEncoderTrainingArguments as arguments_class
        from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss as loss
    arguments = arguments_class(
        args.output_dir,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=args.steps // 10,
        batch_sampler="no_duplicates",
        bf16=args.bf16,
        use_cpu=args.cpu,
        seed=args.seed,
        logging_steps=4,
        save_strategy="no",
        report_to=[],
    )
    model.max_seq_length = args.train_length
    trainer_class(model, arguments, train_dataset=pairs, loss=loss(model)).train()
    model.max_seq_length = args.max_length


def accuracy(model, pairs):
    """The share of queries that find their document first."""
    queries = model.encode_query(list(pairs["query"]))
    documents = model.encode_document(list(pairs["document"]), batch_size=4)
    best = model.similarity(queries, documents).argmax(-1).cpu()
    return float((best == torch.arange(len(pairs))).float().mean())


def main(argv=None):
    args = parse_args(argv)
    set_seed(args.seed)
    pairs, held_out = read_data(args)
    model = read_model(args)
    before = accuracy(model, held_out)
    train(model, pairs, args)
    print(f"accuracy {accuracy(model, held_out):.3f}, before training {before:.3f}")
    model.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
