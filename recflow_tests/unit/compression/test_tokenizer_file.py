import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from recflow.compression.tokenizer_file import TrimmableTokenizer
from recflow.core.errors import ArtifactError, ConfigError

LETTERS = "abcdeo "
CORPUS = [
    "a bad code", "added decade", "a cab a bed", "decode a code", "bead bead dead", "ada coda",
    "abode of ebb", "ace cede cocoa", "doc dab babe", "a ace cab add odd", "bob coco aa aaa aaaa",
]  # fmt: skip


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=60,
        special_tokens=["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(9)
    return tokenizer


def _byte_level_bpe(*, beyond: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if beyond:  # as in Qwen: special tokens behind the vocabulary of the model
        tokenizer.add_special_tokens([AddedToken("<|end|>"), AddedToken("<|pad|>")])
        end, start = (tokenizer.token_to_id(token) for token in ("<|end|>", "<s>"))
        tokenizer.post_processor = processors.Sequence(
            [processors.ByteLevel(), processors.RobertaProcessing(("<|end|>", end), ("<s>", start))]
        )
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60,
        special_tokens=["<s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "WordPiece": _word_piece,
    "BPE": _byte_level_bpe,
    "Unigram": _unigram,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind, build in KINDS.items():
        build().save(str(folder / f"{kind}.json"))
    return {kind: folder / f"{kind}.json" for kind in KINDS}


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _seen(source: TrimmableTokenizer, texts: list[str]) -> set[int]:
    return {token for tokens in source.words(texts, 1_000) for token in tokens}


@pytest.mark.parametrize("kind", KINDS)
@given(
    chosen_from=st.lists(st.text(LETTERS, max_size=12), max_size=4),
    text=st.one_of(st.text(LETTERS, max_size=20), st.text(max_size=10), st.sampled_from(CORPUS)),
)
@settings(max_examples=150, deadline=None)
def test_texts_of_kept_tokens_stay_and_others_are_still_spelled(
    files: dict[str, Path], kind: str, chosen_from: list[str], text: str
) -> None:
    source = TrimmableTokenizer(files[kind])
    kept = source.select(_seen(source, chosen_from))
    whole = _plain(Tokenizer.from_file(str(files[kind])))
    trimmed = _plain(Tokenizer.from_str(source.cut(kept)))
    for one in (*chosen_from, text):
        old, new = whole.encode(one).ids, trimmed.encode(one).ids
        if set(old) <= set(kept.tolist()):
            assert kept[new].tolist() == old
        else:
            unknown = source.unknown
            assert kept[new].tolist().count(unknown) == old.count(unknown)
        if kind == "BPE":
            assert trimmed.decode(new) == whole.decode(old)


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_becomes_smaller_and_keeps_every_character(
    files: dict[str, Path], kind: str
) -> None:
    source = TrimmableTokenizer(files[kind])
    kept = source.select(_seen(source, ["a cab"]))
    assert len(kept) < source.size
    trimmed = Tokenizer.from_str(source.cut(kept))
    assert trimmed.get_vocab_size() == len(kept)
    whole = Tokenizer.from_file(str(files[kind])).get_vocab()
    characters = {t for t in whole if len(t.removeprefix("##")) == 1}
    assert len(characters) > 5
    assert characters <= trimmed.get_vocab().keys()
    assert all(whole[t] == kept[new] for t, new in trimmed.get_vocab().items())


def test_every_reference_to_a_token_is_renumbered(files: dict[str, Path]) -> None:
    source = TrimmableTokenizer(files["WordPiece"])
    described = json.loads(source.cut(source.select(set())))
    trimmed = Tokenizer.from_str(json.dumps(described))
    special = described["post_processor"]["special_tokens"]
    assert special["[CLS]"]["ids"] == [trimmed.token_to_id("[CLS]")]
    assert special["[SEP]"]["ids"] == [trimmed.token_to_id("[SEP]")]
    assert described["truncation"]["max_length"] == 9

    source = TrimmableTokenizer(files["BPE"])
    kept = source.select(set())
    described = json.loads(source.cut(kept))
    trimmed = Tokenizer.from_str(json.dumps(described))
    ids = trimmed.encode("a").ids
    assert [trimmed.id_to_token(token) for token in ids] == ["<s>", "a", "<|end|>"]
    assert trimmed.token_to_id("<|pad|>") == len(kept) - 1
    assert described["model"]["merges"] == []


def test_a_kept_token_of_bpe_keeps_the_tokens_it_is_merged_from(files: dict[str, Path]) -> None:
    source = TrimmableTokenizer(files["BPE"])
    whole = Tokenizer.from_file(str(files["BPE"])).get_vocab()
    longest = max(whole, key=lambda token: (len(token) * (whole[token] < 290), token))
    assert len(longest) > 3
    trimmed = Tokenizer.from_str(source.cut(source.select({whole[longest]})))
    word = longest.replace("Ġ", " ")
    assert trimmed.encode(word).tokens == ["<s>", longest, "<|end|>"]


def test_the_penalty_of_unknown_characters_stays(tmp_path: Path) -> None:
    # A word piece, not a character, is the least likely; unknown ones cost 10 more than it does.
    scores = [("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("xb", -15.5), ("rare", -8.0)]
    Tokenizer(models.Unigram(scores, 0)).save(str(tmp_path / "tokenizer.json"))
    source = TrimmableTokenizer(tmp_path / "tokenizer.json")
    assert source.select(set()).tolist() == [0, 1, 2, 3]


def test_the_padding_is_renumbered(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "word": 1, "[PAD]": 2}, unk_token="[UNK]"))
    tokenizer.enable_padding(pad_id=2, pad_token="[PAD]")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = TrimmableTokenizer(tmp_path / "tokenizer.json")
    assert json.loads(source.cut(source.select(set())))["padding"]["pad_id"] == 1


def test_common_tokens_are_those_of_the_lowest_numbers_that_can_occur(tmp_path: Path) -> None:
    tokens = ["[PAD]", "[unused1]", "[unused2]", "[UNK]", "a", "##a", "the", "##ing", "of", "and"]
    tokenizer = Tokenizer(models.WordPiece({t: n for n, t in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = TrimmableTokenizer(tmp_path / "tokenizer.json")
    assert source.always_kept == {0, 3, 4, 5}
    assert source.most_common(3) == {6, 7, 8}
    assert source.most_common(100) == {6, 7, 8, 9}


def test_the_word_at_the_limit_counts_as_a_whole(tmp_path: Path) -> None:
    tokens = {"[UNK]": 0, "ab": 1, "##c": 2, "##d": 3, "e": 4}
    tokenizer = Tokenizer(models.WordPiece(tokens, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = TrimmableTokenizer(tmp_path / "tokenizer.json")
    assert list(source.words(["ab abcd e", "e"], 3)) == [[1, 1, 2, 3], [4]]
    assert list(source.words(["ab abcd e"], 5)) == [[1, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"), "tokenizer to trim"),
        (models.BPE({"a": 0}, [], dropout=0.1), "dropout of the tokenizer"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path: Path, model: models.Model, message: str) -> None:
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=message):
        TrimmableTokenizer(tmp_path / "tokenizer.json")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is not a tokenizer"):
        TrimmableTokenizer(tmp_path / "tokenizer.json")
