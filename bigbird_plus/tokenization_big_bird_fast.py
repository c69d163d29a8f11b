"""`BigBirdTokenizerFast`: the same ids from the `tokenizers` package, with offsets and word ids."""

from __future__ import annotations

import base64
import copy
import json
import os
import re
import shutil
from collections.abc import Iterable
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AddedToken, PreTrainedTokenizerFast

from .tokenization_big_bird import (
    MODEL_MAX_LENGTH,
    SPACE,
    TOKENIZER_FILE_NAME,
    VOCAB_FILE_NAME,
    BigBirdTokenizer,
    BigBirdTokenizerMixin,
    Piece,
    load_sentencepiece,
    named_tokens,
    read_model_proto,
    read_tokenizer_json,
    reserved_pieces,
    settings_without,
)

TypedPiece = tuple[str, float, int]  # text, score, one of Piece's types


def whitespace_normalizer(charsmap: bytes) -> normalizers.Normalizer:
    """SentencePiece's normalizer, without its last step, from spaces to `▁`, which is the pre-tokenizer's.

    A model's character map comes first (BigBird's has none). Then of several spaces one stays, and spaces at the start
    and spaces and `▁` at the end go. Only U+0020 is a space here.
    """
    steps = [
        normalizers.Replace(Regex(" {2,}"), " "),
        normalizers.Replace(Regex(rf"(?<!{SPACE})(?<!{SPACE} ){SPACE}[ {SPACE}]*+\z"), ""),  # tried once a run: linear
        normalizers.Replace(Regex(r"\A "), ""),
        normalizers.Replace(Regex(r" \z"), ""),
        normalizers.Replace(Regex(rf"\A{SPACE}"), SPACE * 2),  # or the pre-tokenizer would add none in front
    ]
    return normalizers.Sequence([normalizers.Precompiled(charsmap), *steps] if charsmap else steps)


def word_splitter(pieces: Iterable[str]) -> pre_tokenizers.PreTokenizer:
    """Writes spaces as `▁`, puts one in front, and splits before every `▁` but where one of `pieces` may go across.

    So the best segmentation of a text is that of its words, one by one. (Three of BigBird's pieces go across, such as
    `▁Âł▁Âł`.)
    """
    inside = {piece[at - 1 : at + 2] for piece in pieces for at in range(1, len(piece)) if piece[at] == SPACE}
    around = ((re.escape(context[0]), re.escape(context[2:])) for context in sorted(inside))
    exceptions = "".join(rf"(?!(?<={before}{SPACE}){after})" for before, after in around)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=False),
            pre_tokenizers.Split(Regex(SPACE + exceptions), "merged_with_next"),
        ]
    )


def piece_scores(pieces: list[TypedPiece]) -> list[tuple[str, float]]:
    """Scores with which a Unigram model treats `pieces` as SentencePiece does.

    SentencePiece always finds a user-defined piece (by a bonus that grows with its length), and of the others normal
    ones only: the score of control, unknown and unused pieces is worse than that of any other way to read their text.
    """
    lowest = min(score for _, score, kind in pieces if kind == Piece.NORMAL)

    def score_of(text: str, score: float, kind: int) -> float:
        if kind == Piece.USER_DEFINED:
            return user_defined_score(text)
        return score if kind == Piece.NORMAL else (lowest - 10.0) * len(text)

    return [(text, score_of(text, score, kind)) for text, score, kind in pieces]


def user_defined_score(text: str) -> float:
    """The score of a piece that is always found. Those of normal pieces, logarithms of probabilities, are up to 0."""
    return 0.1 * (len(text.encode()) - 1)


def user_defined_pieces(backend: Tokenizer) -> list[str]:
    """The user-defined pieces of a Unigram model, of two bytes or more, that are no added tokens of the backend."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    vocab = json.loads(backend.to_str())["model"]["vocab"]
    return [text for text, score in vocab if score > 0 and text not in added]


def as_user_defined(backend: Tokenizer, pieces: set[str]) -> Tokenizer:
    """The backend with `pieces` as user-defined pieces of its Unigram model, instead of added tokens."""
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in pieces]
    spec["model"]["vocab"] = [
        (text, user_defined_score(text) if text in pieces else score) for text, score in spec["model"]["vocab"]
    ]
    return Tokenizer.from_str(json.dumps(spec))


def text_decoder(mask_token: str | None) -> decoders.Decoder:
    """The counterpart of `BigBirdTokenizer.convert_tokens_to_string`."""
    mask = [decoders.Replace(Regex(rf"\A{re.escape(mask_token)}\z"), SPACE + mask_token)] if mask_token else []
    leading = decoders.Strip(" ", 2**31, 0)
    return decoders.Sequence([*mask, decoders.Replace(SPACE, " "), decoders.Fuse(), leading])


def install_pipeline(backend: Tokenizer, pieces: list[TypedPiece], charsmap: bytes, mask: str | None) -> None:
    """Give a Unigram `backend` of `pieces` SentencePiece's normalization, our words and our way back to text."""
    backend.normalizer = whitespace_normalizer(charsmap)
    backend.pre_tokenizer = word_splitter(text for text, _, _ in pieces)
    backend.decoder = text_decoder(mask)


def check_supported(proto: sentencepiece_model_pb2.ModelProto, vocab_file: str | os.PathLike | None) -> None:
    """Raise a `ValueError` for a SentencePiece model that the `tokenizers` package cannot follow to the letter."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    problems = {
        "its type is not unigram": trainer.model_type != trainer.UNIGRAM,
        "it falls back to bytes": trainer.byte_fallback,
        "it puts spaces at the end of words": trainer.treat_whitespace_as_suffix,
        "it keeps repeated spaces": not normalizer.remove_extra_whitespaces,
        "it puts no space before a text": not normalizer.add_dummy_prefix,
        "it does not escape spaces": not normalizer.escape_whitespaces,
    }
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise ValueError(
            f"vocab_file {str(vocab_file)!r} has no exact equivalent in the `tokenizers` package, as "
            f"{' and '.join(found)}: use BigBirdTokenizer."
        )


def backend_from_vocab_file(
    vocab_file: str | os.PathLike | None, folder: str | None, mask: str | None
) -> tuple[Tokenizer, set[str]]:
    """A backend for a SentencePiece model, and the model's reserved pieces."""
    processor = load_sentencepiece(vocab_file, folder)
    proto = read_model_proto(processor)
    check_supported(proto, vocab_file)
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    backend = Tokenizer(models.Unigram(piece_scores(pieces), unk_id=processor.unk_id()))
    install_pipeline(backend, pieces, proto.normalizer_spec.precompiled_charsmap, mask)
    return backend, reserved_pieces(proto)


def is_converted_sentencepiece(spec: dict[str, Any]) -> bool:
    """Whether transformers' own classes made this `tokenizer.json` from a SentencePiece model."""
    is_unigram = isinstance(spec["model"].get("vocab"), list) and spec["model"].get("unk_id") is not None
    return is_unigram and (spec.get("pre_tokenizer") or {}).get("type") == "Metaspace"


def backend_from_tokenizer_file(tokenizer_file: str | os.PathLike, mask: str | None) -> tuple[Tokenizer, set[str]]:
    """The backend saved in a `tokenizer.json`; one that transformers made from a SentencePiece model is made anew.

    Of a piece's type such a file says only whether it is an added token: a special one counts as a control piece here,
    another one as user-defined.

    Returns:
        The backend, and the reserved pieces if it was made anew.
    """
    spec = read_tokenizer_json(tokenizer_file)
    pieces, charsmap = [], b""
    if is_converted_sentencepiece(spec):
        vocab, added = spec["model"]["vocab"], spec["added_tokens"]
        kinds = {
            token["content"]: Piece.CONTROL if token["special"] else Piece.USER_DEFINED
            for token in added
            if token["id"] < len(vocab)
        }
        kinds[vocab[spec["model"]["unk_id"]][0]] = Piece.UNKNOWN
        pieces = [(text, score, kinds.get(text, Piece.NORMAL)) for text, score in vocab]
        charsmap = find_charsmap(spec.get("normalizer"))
        spec["model"]["vocab"] = piece_scores(pieces)
        spec["added_tokens"] = [{**token, "normalized": False} for token in added if token["id"] >= len(vocab)]
        spec |= dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    try:
        backend = Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the package raises nothing more specific
        raise ValueError(f"tokenizer_file {os.fspath(tokenizer_file)!r} cannot be loaded: {error}") from error
    if pieces:
        install_pipeline(backend, pieces, charsmap, mask)
    return backend, {text for text, _, kind in pieces if kind in (Piece.USER_DEFINED, Piece.CONTROL)}


def find_charsmap(normalizer: dict[str, Any] | None) -> bytes:
    """SentencePiece's character map in a normalizer of a `tokenizer.json`; empty if there is none."""
    for step in (normalizer or {}).get("normalizers", [normalizer or {}]):
        if step.get("type") == "Precompiled":
            return base64.b64decode(step["precompiled_charsmap"])
    return b""


class BigBirdTokenizerFast(BigBirdTokenizerMixin, PreTrainedTokenizerFast):
    """BigBird's tokenizer on the `tokenizers` package: the ids of `BigBirdTokenizer`, with offsets and word ids.

    Args:
        vocab_file: path of a SentencePiece model (`spiece.model`), from which the tokenizer can be built.
        tokenizer_file: path of a `tokenizer.json`, which is preferred. One of transformers' own classes will do.
        unk_token, bos_token, eos_token, pad_token, sep_token, cls_token: the named special tokens.
        mask_token: the same for masking. It takes the white space on its left, as a masked word brings its own.
        kwargs: those of `PreTrainedTokenizerFast`, such as `padding_side` or `model_max_length` (4096).

    Raises:
        ValueError: there is no file, or it cannot be read, or its SentencePiece model has no exact equivalent.
    """

    vocab_files_names = {
        "vocab_file": VOCAB_FILE_NAME,
        "tokenizer_file": TOKENIZER_FILE_NAME,
    }
    slow_tokenizer_class = BigBirdTokenizer  # type: ignore[assignment]  # declared as None, meant as a class

    @classmethod
    def convert_to_native_format(cls, **kwargs):
        """Hook of transformers 5, which would replace the files by a bare list of pieces: keep the files."""
        kwargs.pop("trust_remote_code", None)
        return kwargs

    def __init__(
        self,
        vocab_file=None,
        tokenizer_file=None,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        sep_token="[SEP]",
        mask_token="[MASK]",
        cls_token="[CLS]",
        **kwargs,
    ):
        tokens = named_tokens(
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            sep_token=sep_token,
            mask_token=mask_token,
            cls_token=cls_token,
        )
        backend, reserved = kwargs.pop("tokenizer_object", None), set()
        from_slow = kwargs.pop("from_slow", False)
        kwargs.pop("__slow_tokenizer", None)  # 4.x makes one when there is no tokenizer_file; the file is all we need
        mask = None if mask_token is None else str(mask_token)
        if backend is not None:
            vocab_file = None  # it was trained anew: the old file is not its vocabulary
        elif tokenizer_file is not None and not from_slow:
            backend, reserved = backend_from_tokenizer_file(tokenizer_file, mask)
        else:
            backend, reserved = backend_from_vocab_file(vocab_file, kwargs.get("name_or_path"), mask)

        kwargs = settings_without(reserved, kwargs)
        kwargs.setdefault("model_max_length", MODEL_MAX_LENGTH)
        super().__init__(tokenizer_object=backend, vocab_file=vocab_file, **tokens, **kwargs)
        self.vocab_file = vocab_file
        self._add_tokens(list(tokens.values()), special_tokens=True)  # saved flags may differ
        if self.backend_tokenizer.post_processor is None:
            self.update_post_processor()

    def update_post_processor(self) -> None:
        """Make the backend add `[CLS]` and `[SEP]`. (transformers 5 calls this; its own version adds bos and eos.)"""
        self._add_bos_token = self._add_eos_token = False
        cls, sep = self.cls_token, self.sep_token
        single = [f"{cls}:0", "$A:0", f"{sep}:0"]
        self.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=[*single, "$B:1", f"{sep}:1"],
            special_tokens=[(cls, self.cls_token_id), (sep, self.sep_token_id)],
        )

    def train_new_from_iterator(
        self, text_iterator, vocab_size, length=None, new_special_tokens=None, special_tokens_map=None, **kwargs
    ):
        """A tokenizer of this kind with a vocabulary for other texts. It begins with the special tokens and the
        user-defined pieces, such as `<ans>`. (In BigBird's vocabulary they come first, too, and so keep their ids.)

        Args:
            text_iterator: the texts, as an iterator of strings or of lists of them.
            vocab_size: how many pieces the vocabulary has at most, those that are kept among them.
            length: number of texts, for the progress bar.
            new_special_tokens: further special tokens.
            special_tokens_map: new names of special tokens, by the old ones.
            kwargs: arguments of `tokenizers.trainers.UnigramTrainer`.
        """
        template, kept = copy.deepcopy(self), user_defined_pieces(self._tokenizer)
        template._tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in kept])
        new = super(BigBirdTokenizerFast, template).train_new_from_iterator(
            text_iterator, vocab_size, length, new_special_tokens, special_tokens_map, **kwargs
        )
        renamed = special_tokens_map or {}
        new._tokenizer = as_user_defined(new._tokenizer, {renamed.get(piece, piece) for piece in kept})
        return new

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy `spiece.model` into an existing folder and return its path in a tuple.

        Raises:
            ValueError: the tokenizer was not loaded from a folder with `spiece.model`, or that file has gone.
        """
        path = self._vocab_path(save_directory, filename_prefix)
        if not self.can_save_slow_tokenizer:
            raise ValueError(f"There is no {VOCAB_FILE_NAME} to save: vocab_file is {self.vocab_file!r}.")
        if not (os.path.exists(path) and os.path.samefile(path, self.vocab_file)):
            shutil.copyfile(self.vocab_file, path)
        return (path,)

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        # transformers 5 saves tokenizer.json only; with spiece.model the folder serves the slow class as well.
        saved = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        if legacy_format is not False and self.can_save_slow_tokenizer:
            path = self._vocab_path(save_directory, filename_prefix)
            if path not in saved:
                saved = (*saved, *self.save_vocabulary(save_directory, filename_prefix))
        return saved


__all__ = ["BigBirdTokenizerFast"]
