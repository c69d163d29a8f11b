"""Fine-tune BigBird to answer questions by a span of a long text.

    python examples/finetune_qa.py --train-data train-v1.1.json --eval-data dev-v1.1.json --output-dir reader

The data are files in the format of SQuAD (1.1 or 2.0), or the names of data sets in the format of `squad` on the hub.
A context that is longer than the model's input is read in overlapping parts.
"""

import collections
import json
import os
import re
import string

import numpy as np
import torch
from common import make_parser, training_arguments
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    set_seed,
)

import bigbird_plus  # noqa: F401, makes the Auto classes load BigBird from here


def parse_args(argv=None):
    parser = make_parser(__doc__, epochs=2, learning_rate=3e-5)
    parser.add_argument("--stride", type=int, default=256, help="tokens that two parts of one text have in common")
    parser.add_argument("--max-answer-length", type=int, default=30, help="in tokens")
    return parser.parse_args(argv)


def read_questions(source, split):
    """A list of `{"id", "question", "context", "answers": [(text, first character), ...]}`."""
    if not os.path.isfile(source):
        from datasets import load_dataset

        rows = load_dataset(source, split=split)
        answers = (zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True) for row in rows)
        keys = ("id", "question", "context")
        return [{**{key: row[key] for key in keys}, "answers": list(a)} for row, a in zip(rows, answers, strict=True)]
    with open(source, encoding="utf-8") as file:
        paragraphs = [paragraph for article in json.load(file)["data"] for paragraph in article["paragraphs"]]
    return [
        {
            "id": question["id"],
            "question": question["question"].strip(),
            "context": paragraph["context"],
            "answers": [(answer["text"], answer["answer_start"]) for answer in question["answers"]],
        }
        for paragraph in paragraphs
        for question in paragraph["qas"]
    ]


def cut_into_parts(questions, tokenizer, args):
    """Model inputs: a question and a part of its context each, and what is needed to find the way back.

    Returns:
        The inputs, and for each the number of its question and the characters `(first, one past last)` of each
        token in the context, None for tokens that are not of the context.
    """
    encoded = tokenizer(
        [question["question"] for question in questions],
        [question["context"] for question in questions],
        truncation="only_second",
        max_length=args.max_length,
        stride=args.stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    inputs, places = [], []
    for part, number in enumerate(encoded["overflow_to_sample_mapping"]):
        sequences = encoded.sequence_ids(part)
        offsets = encoded["offset_mapping"][part]
        places.append((number, [o if s == 1 else None for s, o in zip(sequences, offsets, strict=True)]))
        inputs.append({key: encoded[key][part] for key in ("input_ids", "attention_mask")})
    return inputs, places


def add_answers(inputs, places, questions):
    """Adds the first and the last token of the first answer, or `[CLS]` for both if it is not in the part."""
    for row, (number, offsets) in zip(inputs, places, strict=True):
        row["start_positions"] = row["end_positions"] = 0
        for text, first in questions[number]["answers"][:1]:
            last = first + len(text)
            tokens = [i for i, o in enumerate(offsets) if o is not None and o[0] < last and o[1] > first]
            if tokens and offsets[tokens[0]][0] <= first and last <= offsets[tokens[-1]][1]:
                row["start_positions"], row["end_positions"] = tokens[0], tokens[-1]
    return inputs


def best_answers(start_logits, end_logits, places, questions, max_answer_length):
    """The text of the best span of each question, over all parts of its context; "" if `[CLS]` scores higher."""
    best = {question["id"]: (-np.inf, "") for question in questions}
    no_answer = {question["id"]: np.inf for question in questions}
    for starts, ends, (number, offsets) in zip(start_logits, end_logits, places, strict=True):
        question = questions[number]
        no_answer[question["id"]] = min(no_answer[question["id"]], starts[0] + ends[0])
        inside = np.array([offset is not None for offset in offsets])
        starts = np.where(inside, starts[: len(offsets)], -np.inf)
        ends = np.where(inside, ends[: len(offsets)], -np.inf)
        for first in np.argsort(starts)[-20:]:
            last = first + int(np.argmax(ends[first : first + max_answer_length]))
            score = starts[first] + ends[last]
            if score > best[question["id"]][0]:
                text = question["context"][offsets[first][0] : offsets[last][1]].strip()
                best[question["id"]] = (score, text)
    may_be_unanswerable = any(not question["answers"] for question in questions)
    return {key: "" if may_be_unanswerable and no_answer[key] > s else text for key, (s, text) in best.items()}


def words(text):
    """What SQuAD compares: lower case, without punctuation, without articles."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(prediction, answer):
    """Harmonic mean of precision and recall of the words of an answer."""
    predicted, right = words(prediction), words(answer)
    if not predicted or not right:
        return float(predicted == right)
    common = (collections.Counter(predicted) & collections.Counter(right)).total()
    return 2 * common / (len(predicted) + len(right))


def score(predictions, questions):
    """Exact match and F1 in percent: of the best of the right answers, averaged over the questions."""
    exact, overlap = [], []
    for question in questions:
        answers = [text for text, _ in question["answers"]] or [""]
        prediction = predictions[question["id"]]
        exact.append(max(words(prediction) == words(answer) for answer in answers))
        overlap.append(max(f1(prediction, answer) for answer in answers))
    return {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(overlap))}


def evaluate(trainer, tokenizer, questions, args):
    """Answers the questions, writes the answers down, and prints how good they are."""
    inputs, places = cut_into_parts(questions, tokenizer, args)
    start_logits, end_logits = trainer.predict(inputs).predictions[:2]
    predictions = best_answers(start_logits, end_logits, places, questions, args.max_answer_length)
    with open(os.path.join(args.output_dir, "predictions.json"), "w", encoding="utf-8") as file:
        json.dump(predictions, file, indent=2, ensure_ascii=False)
    figures = score(predictions, questions)
    print(f"exact match {figures['exact_match']:.2f}, F1 {figures['f1']:.2f}")


def main(argv=None):
    args = parse_args(argv)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForQuestionAnswering.from_pretrained(args.model, dtype=torch.float32)
    questions = read_questions(args.train_data, "train")
    trainer = Trainer(
        model=model,
        args=training_arguments(args),
        train_dataset=add_answers(*cut_into_parts(questions, tokenizer, args), questions),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    if args.eval_data or not os.path.isfile(args.train_data):
        evaluate(trainer, tokenizer, read_questions(args.eval_data or args.train_data, "validation"), args)


if __name__ == "__main__":
    main()
