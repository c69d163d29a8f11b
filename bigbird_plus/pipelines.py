"""Question answering and summarization of long documents, as pipelines of transformers."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.pipelines.base import ChunkPipeline, Pipeline
from transformers.utils import logging

from .attention.pattern import check_whole_number

logger = logging.get_logger(__name__)

TASK = "extractive-question-answering"
DEFAULT_LENGTH = 384  # of transformers 4, for models and tokenizers that know no limit
SUMMARIZATION = "summarization"
NO_LIMIT = 10**9  # tokenizers that know no limit have a larger number


class _TextPipeline(Pipeline):
    """A pipeline with a model and a tokenizer, both of which `Pipeline` declares to be None or something else."""

    _load_tokenizer = True  # type: ignore[assignment]
    _load_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    tokenizer: PreTrainedTokenizerFast  # type: ignore[assignment]
    model: Any


class ExtractiveQuestionAnsweringPipeline(_TextPipeline, ChunkPipeline):
    """Finds the answers to questions in documents.

    `pipeline("extractive-question-answering", model=...)` makes one. It has the arguments and results of the task
    "question-answering", which transformers had up to version 4, and works with any model for extractive question
    answering that has a fast tokenizer. What differs is good for long documents: chunks are as long as the model
    allows (in transformers 4, 384 tokens), memory grows linearly with them, and questions that are too long are cut
    as `max_question_len` says. Answers begin and end with no white space.
    """

    def __call__(self, *args, question=None, context=None, **parameters):
        """Answers questions.

        Args:
            *args: in the place of `question` and `context`: a string for each of them; or examples, one or more or a
                list or generator of them, which are dictionaries with the keys "question" and "context" or objects
                like `SquadExample`.
            question: a string or a list of them.
            context: the document to search, or a list of them, one for each question.
            top_k (`int`, defaults to 1): how many answers to return, at most.
            handle_impossible_answer (`bool`, defaults to `False`): whether there may be no answer, which is returned
                as an empty one.
            max_answer_len (`int`, defaults to 15): the longest answer, in tokens.
            max_question_len (`int`, defaults to 64): the longest question, in tokens.
            max_seq_len (`int`, *optional*): the longest input of the model, in tokens. By default what tokenizer and
                model allow. Longer documents are read in several chunks.
            doc_stride (`int`, *optional*): how many tokens of a document two chunks have in common, 128 if they fit.
            align_to_words (`bool`, defaults to `True`): whether answers begin and end with whole words.
            padding (`str` or `bool`, defaults to `"do_not_pad"`): as in tokenizers.
            batch_size, num_workers: as in all pipelines.

        Returns:
            A dictionary for each question: `score`, the sum of the probabilities of all places where the answer was
            found; `start` and `end`, the characters of the document; `answer`, the text between them. With `top_k`
            above 1 a list of them, the best first. For several questions a list of that.

        Raises:
            ValueError: for arguments that cannot be understood, and empty questions and documents.
        """
        examples = _examples(args, question, context)
        if isinstance(examples, list) and len(examples) == 1:
            examples = examples[0]
        return super().__call__(examples, **parameters)

    def _sanitize_parameters(
        self,
        padding=None,
        top_k=None,
        doc_stride=None,
        max_answer_len=None,
        max_seq_len=None,
        max_question_len=None,
        handle_impossible_answer=None,
        align_to_words=None,
    ):
        numbers = {
            "top_k": top_k,
            "max_answer_len": max_answer_len,
            "max_seq_len": max_seq_len,
            "max_question_len": max_question_len,
            "doc_stride": doc_stride,
        }
        for name, number in numbers.items():
            if number is not None:
                check_whole_number(name, number, 0 if name == "doc_stride" else 1)
        preprocess = {
            "padding": padding,
            "doc_stride": doc_stride,
            "max_seq_len": max_seq_len,
            "max_question_len": max_question_len,
        }
        postprocess = {
            "top_k": top_k,
            "max_answer_len": max_answer_len,
            "handle_impossible_answer": handle_impossible_answer,
            "align_to_words": align_to_words,
        }
        return _given(preprocess), {}, _given(postprocess)

    def preprocess(self, example, padding="do_not_pad", doc_stride=None, max_question_len=64, max_seq_len=None):
        """Yields the inputs of the model for each chunk of a document."""
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} does not know which characters its tokens stand for. Take the fast "
                "tokenizer of this model."
            )
        question, context = _question_and_context(example)
        question = self._cut(question, max_question_len)
        max_seq_len = self._longest_input() if max_seq_len is None else max_seq_len
        room = (
            max_seq_len - self.tokenizer.num_special_tokens_to_add(pair=True) - len(self.tokenizer.tokenize(question))
        )
        if doc_stride is None:
            doc_stride = min(128, max_seq_len // 2, room - 1)
        if not 0 <= doc_stride < room:
            raise ValueError(
                f"max_seq_len ({max_seq_len}) leaves room for {room} tokens of the document beside the question. That "
                f"must be more than doc_stride ({doc_stride})."
            )
        encoded = self.tokenizer(
            question,
            context,
            padding=padding,
            truncation="only_second",
            max_length=max_seq_len,
            stride=doc_stride,
            return_overflowing_tokens=True,
        )
        for index, encoding in enumerate(encoded.encodings):
            inputs = {name: torch.tensor([encoded[name][index]]) for name in self.tokenizer.model_input_names}
            is_last = index == len(encoded.encodings) - 1
            yield {"is_last": is_last, "context": context, "encoding": encoding, **inputs}

    def _longest_input(self) -> int:
        positions = getattr(self.model.config, "max_position_embeddings", None) or DEFAULT_LENGTH
        return min(self.tokenizer.model_max_length, positions)

    def _cut(self, question, length):
        offsets = self.tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return question if len(offsets) <= length else question[: offsets[length - 1][1]]

    def _forward(self, inputs):
        output = self.model(**{name: inputs.pop(name) for name in self.tokenizer.model_input_names})
        if "start_logits" not in output:
            raise ValueError(
                f"{type(self.model).__name__} is no model for question answering: it has no start_logits."
            )
        return {"start": output["start_logits"], "end": output["end_logits"], **inputs}

    def postprocess(self, outputs, top_k=1, handle_impossible_answer=False, max_answer_len=15, align_to_words=True):
        """The best answers in all chunks of a document."""
        places, no_answer = {}, 1.0
        num_spans = 2 * top_k + 10 if align_to_words else top_k  # several spans can be of the same words
        for output in outputs:
            encoding, context = output["encoding"], output["context"]
            in_context = torch.tensor([sequence == 1 for sequence in encoding.sequence_ids])
            first = encoding.attention_mask.index(1)  # this token, [CLS], says that there is no answer
            start, end = (self._probabilities(output[name], in_context, first) for name in ("start", "end"))
            no_answer = min(no_answer, (start[first] * end[first]).item())
            for *tokens, score in best_spans(start, end, in_context, num_spans, max_answer_len):
                place = _place(encoding, context, *tokens, align_to_words)
                same_words = places.setdefault(context[slice(*place)].lower(), [0.0, *place])
                same_words[0] += score
        answers = [
            {"score": score, "start": start, "end": end, "answer": context[start:end]}
            for score, start, end in places.values()
        ]
        if handle_impossible_answer:
            answers.append({"score": no_answer, "start": 0, "end": 0, "answer": ""})
        answers = sorted(answers, key=lambda answer: -answer["score"])[:top_k]
        return answers[0] if len(answers) == 1 else answers

    def _probabilities(self, logits, in_context, first) -> Tensor:
        """`float64`, `[tokens]`: of the tokens of a document and the first of the input; the others have none."""
        padding = logits.shape[-1] - len(in_context)
        logits = logits[0, padding:] if self.tokenizer.padding_side == "left" else logits[0, : len(in_context)]
        possible = in_context.clone()
        possible[first] = True
        return logits.double().masked_fill(~possible, -torch.inf).softmax(-1)


def _given(parameters: dict) -> dict:
    return {name: value for name, value in parameters.items() if value is not None}


def best_spans(start: Tensor, end: Tensor, allowed: Tensor, top_k: int, max_answer_len: int):
    """The most probable spans.

    Args:
        start, end: probability of each token to be the first and the last one of the answer, `[tokens]`.
        allowed: `bool`, `[tokens]`: whether a token can be one or the other.
        top_k: how many spans to return, at most.
        max_answer_len: the longest span, in tokens.

    Returns:
        Triples of the first and the last token of a span and its probability, the best first.
    """
    end, allowed_end = (nn.functional.pad(values, (0, max_answer_len - 1)) for values in (end, allowed))
    scores = start[:, None] * end.unfold(0, max_answer_len, 1)
    possible = allowed[:, None] & allowed_end.unfold(0, max_answer_len, 1)
    scores = scores.masked_fill(~possible, -1.0).flatten()
    best = scores.topk(min(top_k, len(scores)))
    return [
        (index // max_answer_len, index // max_answer_len + index % max_answer_len, score)
        for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        if score >= 0
    ]


def _place(encoding, context: str, first: int, last: int, align_to_words: bool) -> tuple[int, int]:
    """Where in the document a span of tokens begins and ends, in characters."""
    start, end = encoding.offsets[first][0], encoding.offsets[last][1]
    if align_to_words and None not in (encoding.token_to_word(first), encoding.token_to_word(last)):
        start = encoding.word_to_chars(encoding.token_to_word(first), 1)[0]
        end = encoding.word_to_chars(encoding.token_to_word(last), 1)[1]
    text = context[start:end]
    return start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())


def _examples(args, question, context):
    """What a call is about: a list of examples, or whatever yields them."""
    if question is None and context is None:
        if len(args) == 2 and all(isinstance(argument, str) for argument in args):
            return [{"question": args[0], "context": args[1]}]
        if not args:
            raise ValueError("Give question and context.")
        if len(args) > 1:
            return list(args)
        return list(args[0]) if isinstance(args[0], (list, tuple)) else args[0]
    if args or question is None or context is None:
        raise ValueError("Give question and context, or examples that have both.")
    if isinstance(question, str):
        if not isinstance(context, str):
            raise ValueError("One question needs one context, a string. Several questions can have one context each.")
        return [{"question": question, "context": context}]
    contexts = [context] * len(question) if isinstance(context, str) else context
    if len(contexts) != len(question):
        raise ValueError(f"There are {len(question)} questions, but {len(contexts)} contexts.")
    return [{"question": one, "context": other} for one, other in zip(question, contexts, strict=True)]


def _question_and_context(example) -> tuple[str, str]:
    """The two texts of an example."""
    texts: dict[str, Any]
    if isinstance(example, dict):
        texts = {name: example.get(name) for name in ("question", "context")}
    else:
        texts = {name: getattr(example, f"{name}_text", None) for name in ("question", "context")}
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"Each example needs a {name}, a string that is not empty, but one has {text!r}.")
    return texts["question"], texts["context"]


class SummarizationPipeline(_TextPipeline):
    """Writes summaries of documents.

    `pipeline("summarization", model=...)` makes one, where transformers has no such pipeline any more (versions from 5
    on); it has the arguments and results of that which transformers had up to version 4. It works with any model of
    `AutoModelForSeq2SeqLM`. What differs: documents that are longer than the model are cut, which is said.
    """

    def __call__(self, documents, **parameters):
        """Summarizes documents.

        Args:
            documents: a string, or a list or generator of them.
            truncation (`bool`, *optional*): whether to cut documents that are longer than the model reads. By default
                they are cut with a warning, and with True without one. With False the model refuses them.
            clean_up_tokenization_spaces (`bool`, defaults to `False`): as in tokenizers.
            batch_size, num_workers: as in all pipelines.
            **parameters: any argument of `generate`, as `max_new_tokens` or `num_beams`. Where neither the call nor
                the model's generation config says otherwise, summaries have up to 256 tokens, the best of 4 beams.

        Returns:
            A list with a dictionary for each document: `summary_text`. With `num_return_sequences` above 1 a list of
            them for each.

        Raises:
            ValueError: for what is no text, or an empty one.
        """
        results = super().__call__(documents, **parameters)
        if isinstance(documents, list) and all(len(summaries) == 1 for summaries in results):
            return [summaries[0] for summaries in results]
        return results

    def _sanitize_parameters(self, truncation=None, clean_up_tokenization_spaces=None, **generate):
        postprocess = {"clean_up_tokenization_spaces": clean_up_tokenization_spaces}
        return _given({"truncation": truncation}), generate, _given(postprocess)

    def excess(self, document: str) -> int:
        """How many tokens of a document, special ones included, the model does not read."""
        longest = self._longest_input()
        length = len(self.tokenizer(document, verbose=False)["input_ids"])
        return 0 if longest is None else max(0, length - longest)

    def _longest_input(self) -> int | None:
        """The longest input, in tokens; None if there is no limit."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        limits = [self.tokenizer.model_max_length, positions or NO_LIMIT]
        return min(limits) if min(limits) < NO_LIMIT else None

    def preprocess(self, document, truncation=None):
        """The inputs of the model."""
        if not isinstance(document, str) or not document.strip():
            raise ValueError(f"Each document must be a string that is not empty, but one is {document!r}.")
        longest = self._longest_input()
        excess = self.excess(document) if truncation is None else 0
        if longest is not None and excess:
            logger.warning(
                f"A document has {longest + excess:,} tokens, and {type(self.model).__name__} reads {longest:,}: its "
                f"last {excess:,} are not summarized. Give parts of it, or truncation=True if that is meant."
            )
        cut = {} if truncation is False or longest is None else {"truncation": True, "max_length": longest}
        inputs = self.tokenizer(document, return_tensors="pt", verbose=False, **cut)
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def _forward(self, inputs, **generate):
        written = self.model.generate(**inputs, **self._defaults(generate), **generate)
        return {"written": written.unflatten(0, (len(inputs["input_ids"]), -1))}

    def _defaults(self, generate: dict) -> dict:
        """What neither a call nor the model says."""
        said = generate.keys() | self.model.generation_config.to_diff_dict().keys()
        if "generation_config" in said:
            return {}
        defaults = {} if "num_beams" in said else {"num_beams": 4}
        return defaults if said & {"max_length", "max_new_tokens"} else {**defaults, "max_new_tokens": 256}

    def postprocess(self, outputs, clean_up_tokenization_spaces=False):
        """The summaries of a document."""
        kwargs = {"skip_special_tokens": True, "clean_up_tokenization_spaces": clean_up_tokenization_spaces}
        return [{"summary_text": self.tokenizer.decode(tokens, **kwargs)} for tokens in outputs["written"][0]]
