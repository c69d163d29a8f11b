"""Both tokenizers: their ids against SentencePiece's own, and everything else that they have in common."""

import copy
import functools
import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AddedToken

import bigbird_plus
from bigbird_plus import BigBirdConfig, BigBirdForMaskedLM, BigBirdTokenizer, BigBirdTokenizerFast

VOCAB_FILE = Path(bigbird_plus.__file__).parent / "data" / "spiece.model"
CLASSES = (BigBirdTokenizer, BigBirdTokenizerFast)
SPECIAL = {"pad": 0, "eos": 1, "bos": 2, "cls": 65, "sep": 66, "mask": 67, "unk": 100}
NAMED = ("<pad>", "</s>", "<s>", "[CLS]", "[SEP]", "[MASK]", "<unk>")
REFERENCE = sentencepiece.SentencePieceProcessor(model_file=str(VOCAB_FILE))

SPACES = [" ", "  ", "\t", "\n", "\r\n", "\x0b", "\x1c", "\x85", "\xa0", "\u1680", *map(chr, range(0x2000, 0x2010))]
SPACES += ["\u2028", "\u202f", "\u205f", "\u2060", "\u3000", "\ufeff", "▁", "▁▁", " ▁", "▁ "]
USER_DEFINED = [REFERENCE.id_to_piece(index) for index in (3, 8, 33, 34, 35, 60, 62, 63, 64, 99)]
ACROSS_WORDS = ["Âł", "Â", "ł", "Âł Âł", "▁Âł▁Âł", " Âł Âł Âł", "âĢĶ", "<|endoftext|>"]
BLOCKS = [(0, 0x80), (0x80, 0x250), (0x300, 0x370), (0x370, 0x3000), (0x3000, 0xD800), (0xFE00, 0x10000)]
BLOCKS += [(0x1F300, 0x1F700), (0x10000, 0x110000)]


def fuzz_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of pieces, white space of all kinds, user-defined pieces and characters of all Unicode blocks."""
    draw = random.Random(seed)
    pieces = [REFERENCE.id_to_piece(index).replace("▁", " ") for index in range(101, 50358)]

    def part() -> str:
        kind = draw.choice(["piece", "piece", "piece", "reversed", "spaces", "characters", "user-defined", "across"])
        if kind == "characters":
            return "".join(chr(draw.randrange(*draw.choice(BLOCKS))) for _ in range(draw.randrange(4)))
        if kind == "spaces":
            return draw.choice(SPACES) * draw.randrange(1, 4)
        source = {"user-defined": USER_DEFINED, "across": ACROSS_WORDS}.get(kind, pieces)
        return draw.choice(source)[:: -1 if kind == "reversed" else 1]

    texts = ("".join(part() for _ in range(draw.randrange(12))) for _ in range(count))
    return [text for text in texts if not any(token in text for token in NAMED)]


@pytest.fixture(scope="module", params=CLASSES)
def tokenizer_class(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(tokenizer_class):
    """Not to be changed by a test."""
    return tokenizer_class(str(VOCAB_FILE))


@pytest.fixture
def fresh(tokenizer_class):
    return tokenizer_class(str(VOCAB_FILE))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a vocabulary and nothing else."""
    shutil.copy(VOCAB_FILE, tmp_path / "spiece.model")
    return tmp_path


def save_and_load(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return type(tokenizer).from_pretrained(folder)


# Ids


def test_ids_are_those_of_sentencepiece(tokenizer):
    texts = fuzz_texts(4000)
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    different = [text for text, ids in zip(texts, encoded, strict=True) if ids != REFERENCE.encode(text)]
    assert different == []


@functools.cache
def both_tokenizers() -> list:
    return [cls(str(VOCAB_FILE)) for cls in CLASSES]


@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text("▁ Âłax<>\t", max_size=30))
def test_ids_of_any_text_are_those_of_sentencepiece(text):
    assume(not any(token in text for token in NAMED))
    for tokenizer in both_tokenizers():
        assert tokenizer.encode(text, add_special_tokens=False) == REFERENCE.encode(text)


@pytest.mark.parametrize(
    "text",
    [
        *("a" * 100_000, " " * 100_000 + "a", "▁" * 30_000, "▁" * 30_000 + "a", "▁ " * 30_000 + "a"),
        *("a" + " ▁" * 30_000, "😊" * 20_000, "<ans>" * 20_000, "Âł " * 20_000, "\n" * 50_000, "e\u0301" * 20_000),
    ],
    ids=lambda text: repr(text[:4]),
)
def test_long_runs(tokenizer, text):
    assert tokenizer(text, add_special_tokens=False, verbose=False).input_ids == REFERENCE.encode(text)


def test_every_piece_is_found_in_its_own_text(tokenizer):
    texts = [REFERENCE.id_to_piece(index) for index in range(50358) if REFERENCE.id_to_piece(index) not in NAMED]
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    assert encoded == REFERENCE.encode(texts)


def test_pieces_as_text(tokenizer):
    text = "I was born in 92000, and this is falsé 😊."
    assert tokenizer.tokenize(text) == REFERENCE.encode(text, out_type=str)


def test_known_ids(tokenizer):
    assert tokenizer("Hello World!").input_ids == [65, 18536, 2260, 101, 66]
    assert tokenizer("Plants create [MASK] through").input_ids == [65, 39370, 2352, 67, 933, 66]
    assert tokenizer("").input_ids == [65, 66]


def test_vocabulary(tokenizer):
    assert {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL} == SPECIAL
    assert len(tokenizer) == tokenizer.vocab_size == 50358
    assert tokenizer.get_vocab() == {REFERENCE.id_to_piece(index): index for index in range(50358)}
    assert tokenizer.convert_ids_to_tokens([64, 18536]) == ["<ans>", "▁Hello"]
    assert tokenizer.convert_tokens_to_ids(["<ans>", "▁Hello", "no piece"]) == [64, 18536, 100]


def test_settings(tokenizer):
    assert tokenizer.model_max_length == 4096
    assert tokenizer.padding_side == "right"
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises((ValueError, TypeError)):
        tokenizer("a\ud800b")


# Special tokens in the text


@pytest.mark.parametrize("token", [token for token in NAMED if token != "[MASK]"])
def test_the_text_of_a_special_token_is_that_token(tokenizer, token):
    ids = tokenizer.encode(f"  one  {token} two{token}", add_special_tokens=False)
    special = tokenizer.convert_tokens_to_ids(token)
    assert ids == [*REFERENCE.encode("one"), special, *REFERENCE.encode("two"), special]


@pytest.mark.parametrize("space", ["", " ", "  ", "\n", "\t \u2003\xa0"])
def test_the_mask_takes_the_white_space_on_its_left(tokenizer, space):
    ids = tokenizer.encode(f"one{space}[MASK] two", add_special_tokens=False)
    assert ids == [*REFERENCE.encode("one"), 67, *REFERENCE.encode("two")]


def test_special_tokens_as_plain_text(tokenizer_class):
    tokenizer = tokenizer_class(str(VOCAB_FILE), split_special_tokens=True)
    for text in ("one [MASK] two", "<pad></s> <unk>", "[CLS]<s> [SEP]"):
        assert tokenizer.encode(text, add_special_tokens=False) == REFERENCE.encode(text)


def test_other_special_tokens(tokenizer_class, tmp_path):
    tokenizer = tokenizer_class(str(VOCAB_FILE), cls_token="<ans>", sep_token="<row>", mask_token="<mask>")
    for each in (tokenizer, save_and_load(tokenizer, tmp_path)):
        assert each.mask_token_id == 50358
        assert each("one <mask>").input_ids == [64, *REFERENCE.encode("one"), 50358, 61]
        assert each.decode([64, 358, 50358, 61]) == "<ans> a <mask><row>"


# Text from ids


def test_decoding_gives_what_sentencepiece_gives(tokenizer):
    for text in fuzz_texts(1000, seed=1):
        ids = REFERENCE.encode(text)
        if 100 not in ids:
            assert tokenizer.decode(ids) == REFERENCE.decode(ids)
            assert tokenizer.decode([65, *ids, 66, 0], skip_special_tokens=True) == REFERENCE.decode(ids)


@pytest.mark.parametrize("text", ["Hello World!", "A naïve café, Zoë <ans>?", "don't , you . (really) !"])
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_both_classes_decode_any_ids_alike():
    slow, fast = both_tokenizers()
    draw = random.Random(0)
    for _ in range(500):
        ids = [draw.choice([draw.randrange(110), draw.randrange(50358), 321]) for _ in range(draw.randrange(10))]
        for skip in (False, True):
            assert slow.decode(ids, skip_special_tokens=skip) == fast.decode(ids, skip_special_tokens=skip)


def test_the_mask_decodes_with_its_space(tokenizer):
    ids = tokenizer("Plants create [MASK] through").input_ids
    assert tokenizer.decode(ids) == "[CLS] Plants create [MASK] through[SEP]"
    assert tokenizer.decode([67]) == "[MASK]"


def test_decoding_one_id_a_batch_and_tokens(tokenizer):
    assert tokenizer.decode(18536) == "Hello"
    assert tokenizer.decode(torch.tensor([65, 18536, 66]), skip_special_tokens=True) == "Hello"
    batch = tokenizer(["Hello World!", "a"]).input_ids
    assert tokenizer.batch_decode(batch, skip_special_tokens=True) == ["Hello World!", "a"]
    assert tokenizer.convert_tokens_to_string(["▁Hello", "▁World", "!"]) == "Hello World!"


def test_spaces_can_be_cleaned_up(tokenizer):
    ids = tokenizer("well , yes").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True) == "well, yes"


# Layout


def test_pairs(tokenizer):
    first, second = REFERENCE.encode("A question?"), REFERENCE.encode("An answer.")
    pair = tokenizer("A question?", "An answer.", return_token_type_ids=True, return_special_tokens_mask=True)
    assert pair.input_ids == [65, *first, 66, *second, 66]
    assert pair.token_type_ids == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert pair.special_tokens_mask == [1, *[0] * len(first), 1, *[0] * len(second), 1]
    assert tokenizer.num_special_tokens_to_add() == 2
    assert tokenizer.num_special_tokens_to_add(pair=True) == 3


def test_layout_of_ids(tokenizer):
    assert tokenizer.build_inputs_with_special_tokens([7, 8]) == [65, 7, 8, 66]
    assert tokenizer.build_inputs_with_special_tokens([7, 8], [9]) == [65, 7, 8, 66, 9, 66]
    assert tokenizer.create_token_type_ids_from_sequences([7, 8]) == [0, 0, 0, 0]
    assert tokenizer.create_token_type_ids_from_sequences([7, 8], [9]) == [0, 0, 0, 0, 1, 1]
    assert tokenizer.get_special_tokens_mask([7, 8]) == [1, 0, 0, 1]
    assert tokenizer.get_special_tokens_mask([7, 8], [9]) == [1, 0, 0, 1, 0, 1]
    assert tokenizer.get_special_tokens_mask([65, 7, 67, 66, 0], already_has_special_tokens=True) == [1, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="token_ids_1"):
        tokenizer.get_special_tokens_mask([65, 7, 66], [9], already_has_special_tokens=True)


def test_truncation(tokenizer):
    ids = REFERENCE.encode("one two three four five six")
    assert tokenizer("one two three four five six", truncation=True, max_length=5).input_ids == [65, *ids[:3], 66]
    pair = tokenizer("one two", "three four five", truncation="only_second", max_length=7).input_ids
    assert pair == [65, *ids[:2], 66, *ids[2:4], 66]
    long = tokenizer("one " * 5000, truncation=True).input_ids
    assert len(long) == 4096


def test_truncation_on_the_left(tokenizer_class):
    tokenizer = tokenizer_class(str(VOCAB_FILE), truncation_side="left")
    ids = REFERENCE.encode("one two three four")
    assert tokenizer("one two three four", truncation=True, max_length=4).input_ids == [65, *ids[-2:], 66]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(tokenizer_class, side):
    tokenizer = tokenizer_class(str(VOCAB_FILE), padding_side=side)
    batch = tokenizer(["Hello", "Hello World!"], padding=True, pad_to_multiple_of=8, return_tensors="pt")
    short = [65, 18536, 66]
    padding = [0] * 5
    assert batch.input_ids.shape == (2, 8)
    assert batch.input_ids[0].tolist() == (short + padding if side == "right" else padding + short)
    assert batch.attention_mask.sum(1).tolist() == [3, 5]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_of_a_global_attention_mask(tokenizer, side):
    features = [
        {"input_ids": [65, 358, 66], "global_attention_mask": [1, 0, 0]},
        {"input_ids": [65, 358, 376, 358, 66], "global_attention_mask": [1, 0, 0, 0, 1]},
    ]
    batch = tokenizer.pad(features, padding_side=side, return_tensors="pt")
    expected = [1, 0, 0, 0, 0] if side == "right" else [0, 0, 1, 0, 0]
    assert batch["global_attention_mask"].tolist() == [expected, [1, 0, 0, 0, 1]]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 5)


# Added tokens


def test_added_tokens(fresh, tmp_path):
    assert fresh.add_tokens(["newword", "otherword"]) == 2
    assert fresh.add_special_tokens({"additional_special_tokens": ["[DOC]"]}) == 1
    for tokenizer in (fresh, save_and_load(fresh, tmp_path)):
        assert len(tokenizer) == 50361
        assert tokenizer.vocab_size == 50358
        ids = tokenizer("one  newword  two [DOC]otherword").input_ids
        assert ids == [65, *REFERENCE.encode("one"), 50358, *REFERENCE.encode("two"), 50360, 50359, 66]
        assert tokenizer("onenewword").input_ids == [65, *REFERENCE.encode("one"), 50358, 66]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "onenewword twootherword"
        assert "[DOC]" in tokenizer.all_special_tokens


def test_white_space_around_added_tokens(fresh):
    fresh.add_tokens([AddedToken("<l>", lstrip=True), AddedToken("<r>", rstrip=True)])
    one, two = REFERENCE.encode("one"), REFERENCE.encode("two\n")
    assert fresh.encode("one \n<l> two\n", add_special_tokens=False) == [*one, 50358, *two]
    assert fresh.encode("one <r> \n two\n", add_special_tokens=False) == [*one, 50359, *two]


def test_embeddings_grow_with_the_vocabulary(fresh):
    fresh.add_tokens(["newword"])
    model = BigBirdForMaskedLM(
        BigBirdConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    model.resize_token_embeddings(len(fresh))
    inputs = fresh("one newword", return_tensors="pt")
    assert model(**inputs).logits.shape == (1, 4, 50359)


# Copies and files


def test_copies(tokenizer):
    for copied in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert copied("Plants create [MASK]").input_ids == tokenizer("Plants create [MASK]").input_ids
        assert copied.get_vocab() == tokenizer.get_vocab()


def test_a_copy_needs_no_file(tokenizer_class, folder):
    pickled = pickle.dumps(tokenizer_class(str(folder / "spiece.model")))
    (folder / "spiece.model").unlink()
    assert pickle.loads(pickled)("Hello World!").input_ids == [65, 18536, 2260, 101, 66]


def test_a_saved_folder_serves_both_classes(tokenizer, tmp_path):
    saved = tokenizer.save_pretrained(tmp_path)
    assert str(tmp_path / "spiece.model") in saved
    assert (tmp_path / "spiece.model").read_bytes() == VOCAB_FILE.read_bytes()
    texts = fuzz_texts(200, seed=2)
    for cls in CLASSES:
        loaded = cls.from_pretrained(tmp_path)
        assert loaded(texts, add_special_tokens=False).input_ids == [REFERENCE.encode(text) for text in texts]
        assert loaded("create [MASK]").input_ids == [65, *REFERENCE.encode("create"), 67, 66]
        assert loaded.model_max_length == 4096
        assert loaded.save_pretrained(tmp_path)  # over its own files


def test_a_path_and_a_prefix(tokenizer_class, tmp_path):
    tokenizer = tokenizer_class(VOCAB_FILE, model_max_length=77)
    assert tokenizer.save_vocabulary(str(tmp_path), "some") == (str(tmp_path / "some-spiece.model"),)
    assert tokenizer_class(tmp_path / "some-spiece.model")("Hello").input_ids == [65, 18536, 66]
    assert save_and_load(tokenizer, tmp_path).model_max_length == 77
    with pytest.raises(ValueError, match="nowhere"):
        tokenizer.save_vocabulary(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com\n", VOCAB_FILE.read_bytes()[:9999]])
def test_a_corrupt_vocabulary_is_named(tokenizer_class, tmp_path, content):
    path = tmp_path / "spiece.model"
    path.write_bytes(content)
    for load in (lambda: tokenizer_class(str(path)), lambda: tokenizer_class.from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="is not a SentencePiece model") as error:
            load()
        assert str(path) in str(error.value)


def test_a_missing_vocabulary_is_named(tokenizer_class, tmp_path):
    path = tmp_path / "spiece.model"
    with pytest.raises(ValueError, match="does not exist") as error:
        tokenizer_class(str(path))
    assert str(path) in str(error.value)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not exist") as error:
        tokenizer_class.from_pretrained(tmp_path)
    assert str(path) in str(error.value)


def test_a_corrupt_tokenizer_json_is_named(tokenizer_class, folder):
    for content in ("", "[1, 2]", "{}"):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="tokenizer_file") as error:
            tokenizer_class.from_pretrained(folder)
        assert str(folder / "tokenizer.json") in str(error.value)


# Files of transformers' own classes


def peer_classes() -> list[type]:
    """transformers' own tokenizers: slow and fast in version 4, one in version 5."""
    names = ("BigBirdTokenizer", "BigBirdTokenizerFast")
    classes = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    return [cls for cls in classes if "big_bird" in cls.__module__]


def as_version_4_saves(folder: Path, pieces: list[dict]) -> None:
    settings = {
        "added_tokens_decoder": {piece.pop("id"): piece for piece in copy.deepcopy(pieces)},
        "extra_special_tokens": {},
        "mask_token": "[MASK]",
        "tokenizer_class": "BigBirdTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def as_version_5_saves(folder: Path, pieces: list[dict]) -> None:
    settings = {
        "add_prefix_space": True,
        "backend": "tokenizers",
        "extra_special_tokens": [piece["content"] for piece in pieces if piece["id"] != 100],
        "is_local": True,
        "local_files_only": True,
        "mask_token": "[MASK]",
        "tokenizer_class": "BigBirdTokenizer",
        "unk_id": 100,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def assert_right_ids(tokenizer):
    texts = ["Hello World!", "x <ans> y<cn>", "  a \n b\t ", "Âł Âł", "▁a ▁", "\u2003x\u2003 😊", *fuzz_texts(100, 3)]
    assert tokenizer(texts, add_special_tokens=False).input_ids == [REFERENCE.encode(text) for text in texts]
    assert tokenizer("Plants create [MASK] through").input_ids == [65, 39370, 2352, 67, 933, 66]
    assert set(tokenizer.all_special_tokens) == set(NAMED)
    assert tokenizer.decode([65, 64, 358, 66], skip_special_tokens=True) == "<ans> a"
    assert len(tokenizer) == 50358


@pytest.mark.parametrize("peer_class", peer_classes(), ids=lambda cls: cls.__name__)
def test_files_of_transformers_give_the_right_ids(tokenizer_class, peer_class, folder, tmp_path_factory):
    saved = tmp_path_factory.mktemp("saved")
    peer_class.from_pretrained(folder).save_pretrained(saved)
    shutil.copy(VOCAB_FILE, saved)  # version 5 leaves it out
    loaded = tokenizer_class.from_pretrained(saved)
    assert_right_ids(loaded)
    assert_right_ids(save_and_load(loaded, tmp_path_factory.mktemp("again")))


@pytest.mark.parametrize("save", [as_version_4_saves, as_version_5_saves])
def test_settings_of_either_version_give_the_right_ids(tokenizer_class, folder, save):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    pieces = [{"id": i, "content": REFERENCE.id_to_piece(i), "special": i in SPECIAL.values()} for i in range(101)]
    save(folder, [{**piece, **flags} for piece in pieces])
    assert_right_ids(tokenizer_class.from_pretrained(folder))


def test_special_tokens_that_are_pieces_can_be_chosen(tokenizer_class, tmp_path):
    tokenizer = tokenizer_class(str(VOCAB_FILE), additional_special_tokens=["<ans>", "<cn>"])
    for each in (tokenizer, save_and_load(tokenizer, tmp_path)):
        assert each("x <ans> y").input_ids == [65, *REFERENCE.encode("x"), 64, *REFERENCE.encode("y"), 66]
        assert each.decode([65, 64, 358, 66], skip_special_tokens=True) == "a"


@pytest.mark.parametrize("peer_class", peer_classes(), ids=lambda cls: cls.__name__)
def test_transformers_reads_our_files(tokenizer, peer_class, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = peer_class.from_pretrained(tmp_path)
    assert loaded("Hello World!").input_ids == [65, 18536, 2260, 101, 66]
    assert {name: getattr(loaded, f"{name}_token_id") for name in SPECIAL} == SPECIAL


# Subword sampling (the slow class only)

SAMPLING = {"enable_sampling": True, "nbest_size": -1, "alpha": 0.1}


def test_sampling_of_subwords(tmp_path):
    tokenizer = BigBirdTokenizer(str(VOCAB_FILE), sp_model_kwargs=SAMPLING)
    text = "An unmistakable sentence."
    for each in (tokenizer, save_and_load(tokenizer, tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        drawn = [each.encode(text, add_special_tokens=False) for _ in range(20)]
        assert len({tuple(ids) for ids in drawn}) > 1
        assert {each.decode(ids) for ids in drawn} == {text}
    fast = BigBirdTokenizerFast.from_pretrained(tmp_path)
    assert fast.encode(text, add_special_tokens=False) == REFERENCE.encode(text)


def test_no_sampling_by_default():
    tokenizer = BigBirdTokenizer(str(VOCAB_FILE))
    assert len({tuple(tokenizer.encode("An unmistakable sentence.")) for _ in range(20)}) == 1
