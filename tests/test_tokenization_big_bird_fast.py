"""What only the fast tokenizer has: offsets, word ids, windows, training, and its own files."""

import io
import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import bigbird_plus
from bigbird_plus import BigBirdTokenizer, BigBirdTokenizerFast

VOCAB_FILE = Path(bigbird_plus.__file__).parent / "data" / "spiece.model"
REFERENCE = sentencepiece.SentencePieceProcessor(model_file=str(VOCAB_FILE))
TEXT = "Hello World! A naïve café sells don'ts; 😊 ends."


@pytest.fixture(scope="module")
def tokenizer():
    """Not to be changed by a test."""
    return BigBirdTokenizerFast(str(VOCAB_FILE))


# Places in the text


def test_offsets(tokenizer):
    encoded = tokenizer(TEXT, return_offsets_mapping=True, add_special_tokens=False)
    slices = [TEXT[start:end] for start, end in encoded.offset_mapping]
    assert "".join(slices) == TEXT
    assert slices == [piece.surface for piece in REFERENCE.encode_as_proto(TEXT).pieces]


def test_offsets_with_white_space_and_special_tokens(tokenizer):
    text = "  one  two [MASK] three"
    encoded = tokenizer(text, return_offsets_mapping=True)
    slices = [text[start:end].strip() for start, end in encoded.offset_mapping]
    assert slices == ["", "one", "two", "[MASK]", "three", ""]


def test_words(tokenizer):
    encoded = tokenizer("Hello naïve World", "Another one")
    assert encoded.tokens()[1:6] == ["▁Hello", "▁na", "ï", "ve", "▁World"]
    assert encoded.word_ids() == [None, 0, 1, 1, 1, 2, None, 0, 1, None]
    assert encoded.sequence_ids() == [None, 0, 0, 0, 0, 0, None, 1, 1, None]
    assert encoded.char_to_token(6) == 2
    assert encoded.token_to_chars(5) == (11, 17)


def test_words_given_one_by_one(tokenizer):
    words = ["Hello", "naïve", " World "]
    encoded = tokenizer(words, is_split_into_words=True)
    assert encoded.input_ids == [65, *(index for word in words for index in REFERENCE.encode(word)), 66]
    assert encoded.word_ids() == [None, 0, 1, 1, 1, 2, None]


def test_windows(tokenizer):
    question, context = "Who?", " ".join(f"word{number}" for number in range(60))
    encoded = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=32,
        stride=8,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding="max_length",
    )
    ids = REFERENCE.encode(context)
    size = 32 - 3 - len(REFERENCE.encode(question))
    starts = range(0, len(ids) - 8, size - 8)
    assert len(encoded.input_ids) == len(starts)
    for number, (window, start) in enumerate(zip(encoded.input_ids, starts, strict=True)):
        in_context = [place for place, sequence in enumerate(encoded.sequence_ids(number)) if sequence == 1]
        assert [window[place] for place in in_context] == ids[start : start + size]
        first, last = encoded.offset_mapping[number][in_context[0]], encoded.offset_mapping[number][in_context[-1]]
        assert tokenizer.decode([window[place] for place in in_context]) == context[first[0] : last[1]].strip()
    assert encoded.overflow_to_sample_mapping == [0] * len(starts)


# Files


def test_a_folder_with_tokenizer_json_alone(tokenizer, tmp_path):
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = BigBirdTokenizerFast.from_pretrained(tmp_path)
    assert loaded(TEXT).input_ids == [65, *REFERENCE.encode(TEXT), 66]
    assert loaded("create [MASK]").input_ids == [65, *REFERENCE.encode("create"), 67, 66]
    assert BigBirdTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))("a").input_ids == [65, 358, 66]
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert not (again / "spiece.model").exists()
    assert BigBirdTokenizerFast.from_pretrained(again)(TEXT).input_ids == [65, *REFERENCE.encode(TEXT), 66]
    with pytest.raises(ValueError, match=r"spiece\.model"):
        loaded.save_vocabulary(str(again))
    with pytest.raises(ValueError, match=r"spiece\.model"):
        BigBirdTokenizer.from_pretrained(again)


def test_tokenizer_json_goes_before_spiece_model(tokenizer, tmp_path):
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["model"]["vocab"][18536][0] = "▁Zzyzxes"
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    shutil.copy(VOCAB_FILE, tmp_path)
    assert BigBirdTokenizerFast.from_pretrained(tmp_path)("Zzyzxes").input_ids == [65, 18536, 66]
    assert BigBirdTokenizerFast.from_pretrained(tmp_path, from_slow=True)("Hello").input_ids == [65, 18536, 66]


def test_a_damaged_model_in_tokenizer_json_is_named(tokenizer, tmp_path):
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["model"]["vocab"] = spec["model"]["vocab"][:50]  # the unknown piece is number 100
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=r"tokenizer\.json' cannot be loaded"):
        BigBirdTokenizerFast.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere\.json"):
        BigBirdTokenizerFast(tokenizer_file=str(tmp_path / "nowhere.json"))


@pytest.mark.parametrize("typed", [True, False])
def test_tokenizer_json_of_an_early_version(tmp_path, typed):
    """Made by transformers of 2021: all reserved pieces are added tokens, and the model may have no type."""
    flags = {"single_word": False, "rstrip": False, "normalized": False}
    special = {0, 1, 2, 65, 66, 67, 100}
    added = [
        {"id": i, "content": REFERENCE.id_to_piece(i), "special": i in special, "lstrip": i == 67, **flags}
        for i in range(101)
    ]
    added.append({"id": 50358, "content": "newword", "special": False, "lstrip": False, **flags, "normalized": True})
    model = {"type": "Unigram", "unk_id": 100, "vocab": [[REFERENCE.id_to_piece(i), 0.0] for i in range(50358)]}
    if not typed:
        del model["type"]
    spec = {
        "version": "1.0",
        "truncation": {"max_length": 9, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True},
        "post_processor": None,
        "decoder": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True},
        "model": model,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = BigBirdTokenizerFast.from_pretrained(tmp_path)
    for text in ("x <ans> y ", "Âł Âł", "a\n ", "▁b", "\u2003"):
        assert tokenizer(text).input_ids == [65, *REFERENCE.encode(text), 66]
    assert tokenizer("one newword [MASK]").input_ids == [65, *REFERENCE.encode("one"), 50358, 67, 66]
    assert len(tokenizer) == 50359
    assert tokenizer.convert_ids_to_tokens(64) == "<ans>"


def test_the_format_without_spiece_model(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path, legacy_format=False)
    assert not (tmp_path / "spiece.model").exists()
    assert BigBirdTokenizerFast.from_pretrained(tmp_path)("Hello").input_ids == [65, 18536, 66]


# Other vocabularies


def train(**settings) -> bytes:
    """A small SentencePiece model of our own sources."""
    sources = sorted(Path(bigbird_plus.__file__).parent.glob("*.py"))
    lines = [line for path in sources for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    model = io.BytesIO()
    settings = {"vocab_size": 400, "pad_id": 3, "minloglevel": 2, **settings}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    return model.getvalue()


@pytest.fixture(scope="module")
def own_vocabulary(tmp_path_factory) -> Path:
    """Scores that differ, character normalization (NFKC), user-defined and control pieces."""
    path = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    path.write_bytes(train(user_defined_symbols=["[CLS]", "[SEP]", "[MASK]", "<x>"], control_symbols=["<ctrl>"]))
    return path


def test_another_vocabulary(own_vocabulary, tmp_path):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(own_vocabulary))
    fast, slow = BigBirdTokenizerFast(str(own_vocabulary)), BigBirdTokenizer(str(own_vocabulary))
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    lines += ["ｆｕｌｌ　ｗｉｄｔｈ", "a\tb \n c", "½ ﬁ", "<x>y <x>", "<ctrl> <ctrl>", "zażółć 生活"]
    draw = random.Random(0)
    texts = ["  ".join(draw.sample(lines, 3)) for _ in range(300)]
    texts = [text for text in texts if not any(token in text for token in fast.all_special_tokens)]
    fast.save_pretrained(tmp_path)
    for tokenizer in (fast, slow, BigBirdTokenizerFast.from_pretrained(tmp_path)):
        assert tokenizer(texts, add_special_tokens=False).input_ids == [reference.encode(text) for text in texts]
        cls, mask, sep = reference.piece_to_id(["[CLS]", "[MASK]", "[SEP]"])
        assert tokenizer("one [MASK]").input_ids == [cls, *reference.encode("one"), mask, sep]


@pytest.mark.parametrize("alone", [True, False])
def test_a_character_map_in_a_tokenizer_json_of_transformers(own_vocabulary, tmp_path, alone):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(own_vocabulary))
    spec = json.loads(BigBirdTokenizerFast(str(own_vocabulary)).backend_tokenizer.to_str())
    charsmap, *_ = spec["normalizer"]["normalizers"]
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    spec["normalizer"] = charsmap if alone else {"type": "Sequence", "normalizers": [charsmap, strip]}
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = BigBirdTokenizerFast.from_pretrained(tmp_path)
    for text in ("ｆｕｌｌ　ｗｉｄｔｈ", "a\tb \n c ", "½ ﬁ", "<x>y <x>"):
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "bpe"}, "not unigram"),
        ({"byte_fallback": True, "vocab_size": 700}, "bytes"),
        ({"treat_whitespace_as_suffix": True}, "end of words"),
        ({"remove_extra_whitespaces": False}, "repeated spaces"),
        ({"add_dummy_prefix": False}, "no space before"),
    ],
)
def test_a_vocabulary_without_an_exact_equivalent_is_refused(tmp_path, settings, reason):
    path = tmp_path / "spiece.model"
    path.write_bytes(train(**settings))
    with pytest.raises(ValueError, match=reason) as error:
        BigBirdTokenizerFast(str(path))
    assert str(path) in str(error.value)
    assert "use BigBirdTokenizer" in str(error.value)
    ids = BigBirdTokenizer(str(path)).encode("one  two", add_special_tokens=False)
    assert ids == sentencepiece.SentencePieceProcessor(model_file=str(path)).encode("one  two")


def test_training_a_new_vocabulary(tokenizer, tmp_path):
    corpus = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog"] * 20
    trained = tokenizer.train_new_from_iterator([corpus], 150)
    trained.save_pretrained(tmp_path)
    assert not (tmp_path / "spiece.model").exists()  # it is the old vocabulary
    for each in (trained, BigBirdTokenizerFast.from_pretrained(tmp_path)):
        encoded = each("the cat  on [MASK]")
        assert each.decode(encoded.input_ids) == "[CLS] the cat on [MASK][SEP]"
        assert encoded.input_ids[-2:] == [each.mask_token_id, each.sep_token_id]


CORPUS = ["the quick brown fox", "jumps over <ans> the lazy dog"] * 20


def test_a_new_vocabulary_has_the_pieces_that_the_built_in_tokenizer_keeps(tokenizer, checkpoint):
    """All 101 that come first, with their ids: a model's configuration names some of those."""
    theirs = transformers.BigBirdTokenizerFast.from_pretrained(checkpoint)
    trained, expected = (each.train_new_from_iterator(CORPUS, vocab_size=200) for each in (tokenizer, theirs))
    first = {piece: index for piece, index in tokenizer.get_vocab().items() if index <= 100}
    assert len(trained) == len(expected)
    for each in (trained, expected):
        assert {piece: index for piece, index in each.get_vocab().items() if index <= 100} == first
    assert trained.all_special_tokens == tokenizer.all_special_tokens
    assert (trained.unk_token_id, trained.sep_token_id, trained.mask_token_id) == (100, 66, 67)


def test_a_new_vocabulary_finds_user_defined_pieces(tokenizer, tmp_path):
    trained = tokenizer.train_new_from_iterator(CORPUS, vocab_size=200)
    trained.save_pretrained(tmp_path)
    again = BigBirdTokenizerFast.from_pretrained(tmp_path)
    for each in (trained, again):
        ids = each("over <ans> dog").input_ids
        assert each.convert_tokens_to_ids("<ans>") == 64
        assert 64 in ids
        assert each.decode(ids, skip_special_tokens=True) == "over <ans> dog"
        assert each.decode(each("\xff").input_ids) == "[CLS] <unk>[SEP]"
    renamed = again.train_new_from_iterator(
        CORPUS, 200, new_special_tokens=["<new>"], special_tokens_map={"[MASK]": "<m>", "<ans>": "<answer>"}
    )
    assert (renamed.mask_token, renamed.mask_token_id) == ("<m>", 67)
    assert renamed.convert_tokens_to_ids("<answer>") == 64 in renamed("the <answer><m>").input_ids
    assert renamed.convert_tokens_to_ids("<new>") == 101


def test_a_backend_of_ones_own():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "hello": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = BigBirdTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert tokenizer("hello there").input_ids == [1, 3, 0, 2]
    assert "[MASK]" not in backend.get_vocab(with_added_tokens=True)  # the given object stays as it was
