"""Captions: what the tables of nouns, templates and adjectives may say, checked on every sentence they make."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from imagen_fast.errors import UserError
from imagen_fast.training.emoji.annotations import NOT_NAMES, Annotation, naming_annotations
from imagen_fast.training.emoji.captions import MAX_BYTES, fill, held_out_captions, noun_phrase, train_captions
from imagen_fast.training.emoji.selection import LANGUAGES, SELECTIONS, Concept, Noun, parse_table, resolve_selection
from imagen_fast.training.emoji.templates import ADJECTIVES, TEMPLATES

COMMON = SELECTIONS["common"]
MEASURE_WORDS = set("只条头匹峰个位台坨张副双颗块片根串份包碗支桶杯扎朵枝株棵道轮弯滴团把座辆架枚艘栋间顶部盏摞叠列")
HELD_OUT_ADJECTIVES = {
    language: {a for words in ADJECTIVES.values() for a in words[language].held_out} for language in LANGUAGES
}

each_language = pytest.mark.parametrize("language", LANGUAGES)


def table(category: str, lines: str) -> tuple[Concept, ...]:
    return tuple(parse_table(category, lines))


def matches(template: str, caption: str) -> bool:
    """Whether a template could have made a caption, whatever the noun."""
    pattern = re.escape(template)
    for field in ("n", "np", "Np"):
        pattern = pattern.replace(re.escape(f"{{{field}}}"), ".+")
    return re.fullmatch(pattern, caption) is not None


# -- the selection ---------------------------------------------------------------------------------------------------


def test_selection_holds_about_150_different_emoji() -> None:
    assert 140 <= len(COMMON) <= 170
    assert len({concept.char for concept in COMMON}) == len(COMMON)
    assert all(len(concept.char) == 1 for concept in COMMON)


def test_selection_has_every_category_of_adjectives() -> None:
    assert {concept.category for concept in COMMON} == set(ADJECTIVES)


@each_language
def test_noun_names_one_picture(language: str) -> None:
    owners: dict[str, set[str]] = {}
    for concept in COMMON:
        for noun in concept.nouns[language]:
            owners.setdefault(noun.text.lower(), set()).add(concept.char)
    shared = {noun: chars for noun, chars in owners.items() if len(chars) > 1}
    assert not shared, f"these nouns name several pictures: {shared}"


def test_english_nouns_are_ascii_and_hold_no_article() -> None:
    for concept in COMMON:
        for noun in concept.nouns["en"]:
            assert re.fullmatch(r"[A-Za-z][A-Za-z' -]*", noun.text), f"{concept.char}: {noun.text!r}"
            assert noun.text.split()[0].lower() not in ("a", "an", "the", "some"), f"{concept.char}: {noun.text!r}"
            assert noun.determiner in ("a", "the", "some", "")


def test_chinese_nouns_are_chinese_and_have_a_measure_word() -> None:
    for concept in COMMON:
        for noun in concept.nouns["zh"]:
            assert re.fullmatch(r"[\u4e00-\u9fff]+", noun.text), f"{concept.char}: {noun.text!r}"
            assert noun.determiner[0] == "一"
            assert noun.determiner[1:] in MEASURE_WORDS, f"{concept.char}: {noun.determiner!r}"


@pytest.mark.parametrize(
    ("char", "phrase"),
    [
        ("🐱", "一只猫"), ("🐶", "一条狗"), ("🐴", "一匹马"), ("🐘", "一头大象"), ("🚗", "一辆汽车"),
        ("✈", "一架飞机"), ("🌹", "一朵玫瑰"), ("🌳", "一棵树"), ("⭐", "一颗星星"), ("🏠", "一座房子"),
        ("☂", "一把雨伞"), ("🍜", "一碗面条"),
    ],
)  # fmt: skip
def test_measure_word_is_the_usual_one(char: str, phrase: str) -> None:
    (concept,) = (c for c in COMMON if c.char == char)
    assert phrase in train_captions(concept, "zh")


# -- phrases and templates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noun", "adjective", "phrase"),
    [
        (Noun("cat", "a"), "", "a cat"),
        (Noun("cat", "a"), "adorable", "an adorable cat"),
        (Noun("apple", "a"), "", "an apple"),
        (Noun("apple", "a"), "fresh", "a fresh apple"),
        (Noun("unicorn", "a"), "", "a unicorn"),
        (Noun("UFO", "a"), "", "a UFO"),
        (Noun("sun", "the"), "amazing", "the amazing sun"),
        (Noun("Santa Claus", ""), "", "Santa Claus"),
    ],
)
def test_english_noun_phrase(noun: Noun, adjective: str, phrase: str) -> None:
    assert noun_phrase("en", noun, adjective) == phrase


def test_chinese_noun_phrase_puts_the_measure_word_first() -> None:
    assert noun_phrase("zh", Noun("猫咪", "一只"), "可爱的") == "一只可爱的猫咪"
    assert noun_phrase("zh", Noun("猫咪", "一只"), "可爱的", determiner=False) == "可爱的猫咪"


def test_sentence_begins_with_a_capital() -> None:
    assert fill("{Np}.", "en", Noun("cat", "a"), "cute") == "A cute cat."


@each_language
def test_templates_have_one_field_and_are_not_in_both_splits(language: str) -> None:
    words = TEMPLATES[language]
    assert not set(words.train) & set(words.held_out)
    for template in words.train + words.held_out:
        assert len(re.findall(r"\{(n|np|Np)\}", template)) == 1, template


@each_language
def test_adjective_held_out_anywhere_is_trained_nowhere(language: str) -> None:
    trained = {a for words in ADJECTIVES.values() for a in words[language].train}
    assert not trained & HELD_OUT_ADJECTIVES[language]


def test_chinese_adjectives_join_the_noun_with_de() -> None:
    assert all(a.endswith("的") for words in ADJECTIVES.values() for a in words["zh"].train + words["zh"].held_out)


# -- the captions ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captions() -> dict[tuple[str, str, str], list[str]]:
    """Captions by emoji, split and language."""
    made = {"train": train_captions, "held_out": held_out_captions}
    return {(c.char, s, lang): made[s](c, lang) for c in COMMON for s in made for lang in LANGUAGES}


def test_caption_fits_the_text_length(captions: dict[tuple[str, str, str], list[str]]) -> None:
    longest = max((caption for own in captions.values() for caption in own), key=lambda c: len(c.encode()))
    assert len(longest.encode()) <= MAX_BYTES, longest


def test_number_of_captions(captions: dict[tuple[str, str, str], list[str]]) -> None:
    for (char, split, language), own in captions.items():
        low, high = (100, 160) if split == "train" else (40, 48)
        assert low <= len(own) <= high, f"{char} {split} {language}: {len(own)}"
        assert len(set(own)) == len(own), f"{char} {split} {language} repeats itself"


def test_caption_asks_for_one_picture(captions: dict[tuple[str, str, str], list[str]]) -> None:
    owners: dict[str, set[str]] = {}
    for (char, _, _), own in captions.items():
        for caption in own:
            owners.setdefault(caption.lower(), set()).add(char)
    shared = {caption: chars for caption, chars in owners.items() if len(chars) > 1}
    assert not shared, f"these captions name several pictures: {shared}"


@each_language
def test_caption_holds_a_noun_of_its_picture(language: str, captions: dict[tuple[str, str, str], list[str]]) -> None:
    for concept in COMMON:
        nouns = [noun.text.lower() for noun in concept.nouns[language]]
        for split in ("train", "held_out"):
            for caption in captions[concept.char, split, language]:
                assert any(noun in caption.lower() for noun in nouns), f"{concept.char}: {caption}"


@each_language
def test_training_shows_nothing_that_is_held_out(
    language: str, captions: dict[tuple[str, str, str], list[str]]
) -> None:
    adjectives = HELD_OUT_ADJECTIVES[language]
    for concept in COMMON:
        train = captions[concept.char, "train", language]
        assert not set(train) & set(captions[concept.char, "held_out", language])
        for caption in train:
            words = caption.lower().rstrip(".").split() if language == "en" else [a for a in adjectives if a in caption]
            assert not adjectives & set(words), f"{concept.char}: {caption}"
            for template in TEMPLATES[language].held_out:
                assert not matches(template, caption), f"{concept.char}: {caption!r} is of {template!r}"


@each_language
def test_held_out_has_new_templates_and_new_adjectives(
    language: str, captions: dict[tuple[str, str, str], list[str]]
) -> None:
    for concept in COMMON:
        own = captions[concept.char, "held_out", language]
        of_template = [c for c in own if any(matches(t, c) for t in TEMPLATES[language].held_out)]
        of_adjective = [c for c in own if any(a in c.lower() for a in HELD_OUT_ADJECTIVES[language])]
        assert len(of_template) >= 15, concept.char
        assert len(of_adjective) >= 15, concept.char
        assert set(own) == {*of_template, *of_adjective}


def test_chinese_captions_hold_chinese_alone(captions: dict[tuple[str, str, str], list[str]]) -> None:
    for (char, _, language), own in captions.items():
        if language == "zh":
            for caption in own:
                assert re.fullmatch(r"[\u4e00-\u9fff，。？]+", caption), f"{char}: {caption}"
                assert not re.search("的的(?!士)", caption), f"{char}: {caption}"


def test_no_word_is_said_twice_in_a_row(captions: dict[tuple[str, str, str], list[str]]) -> None:
    for (char, _, language), own in captions.items():
        if language == "en":
            repeated = [caption for caption in own if re.search(r"\b(\w+) \1\b", caption.lower())]
            assert not repeated, f"{char}: {repeated}"


@pytest.mark.parametrize("prompt", ["a cute cat", "一只可爱的猫咪", "cat", "猫", "kitten", "小猫", "一只猫"])
def test_cat_is_known_by_many_names(prompt: str, captions: dict[tuple[str, str, str], list[str]]) -> None:
    owners = [char for (char, split, _), own in captions.items() if split == "train" and prompt in own]
    assert owners == ["🐱"]


@each_language
@pytest.mark.parametrize("make", [train_captions, held_out_captions])
def test_captions_are_the_same_in_every_process(make: Callable[[Concept, str], list[str]], language: str) -> None:
    code = (
        f"from {make.__module__} import {make.__name__} as make; from {parse_table.__module__} import SELECTIONS; "
        f"print(*make(SELECTIONS['common'][20], {language!r}), sep='|')"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONIOENCODING": "utf-8"}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
    assert output.decode().strip().split("|") == make(COMMON[20], language)


def test_plain_captions_come_first_and_survive_a_small_limit() -> None:
    (cat,) = table("animal", "🐱 | cat, kitten | 只 猫")
    assert train_captions(cat, "en", limit=8) == [
        "cat", "a cat", "cute cat", "a cute cat", "kitten", "a kitten", "cute kitten", "a cute kitten",
    ]  # fmt: skip


@pytest.mark.parametrize(("language", "clash"), [("en", "(little|small|tiny) giant"), ("zh", "小小的大熊猫")])
def test_adjective_of_size_is_left_out_where_the_noun_says_one(language: str, clash: str) -> None:
    (panda,) = table("animal", "🐼 | giant panda, panda | 只 大熊猫 熊猫")
    own = train_captions(panda, language, limit=1000) + held_out_captions(panda, language, limit=1000)
    assert not [caption for caption in own if re.search(clash, caption)]
    assert {"en": "a little panda", "zh": "一只小小的熊猫"}[language] in own


# -- names from CLDR -------------------------------------------------------------------------------------------------

CAT_AND_DOG = table("animal", "🐱 | cat | 只 猫\n🐶 | dog | 只 狗")


def naming(**words: str) -> list[tuple[str, ...]]:
    annotations = {
        c: Annotation(t.split("|")[0], tuple(t.split("|"))) for c, t in zip("🐱🐶", words.values(), strict=True)
    }
    return naming_annotations(CAT_AND_DOG, annotations, "en")


def test_cldr_name_and_own_keywords_name_the_picture() -> None:
    assert naming(cat="cat face|moggy", dog="dog face|hound") == [("cat face", "moggy"), ("dog face", "hound")]


def test_keyword_of_several_emoji_is_dropped() -> None:
    assert naming(cat="cat face|pet", dog="dog face|Pet") == [("cat face",), ("dog face",)]


def test_keyword_that_is_a_noun_is_left_to_its_owner() -> None:
    assert naming(cat="cat face|cat|dog", dog="dog face") == [("cat face",), ("dog face",)]


def test_keyword_that_names_nothing_is_dropped() -> None:
    assert "love" in NOT_NAMES["en"]
    assert naming(cat="cat face|love", dog="dog face") == [("cat face",), ("dog face",)]


def test_emoji_that_cldr_does_not_know_is_an_error() -> None:
    with pytest.raises(UserError, match=r"\(en\.xml\) do not know the emoji 🐶"):
        naming_annotations(CAT_AND_DOG, {"🐱": Annotation("cat face", ())}, "en")


def test_cldr_names_become_captions() -> None:
    assert {"moggy", "moggy emoji"} <= set(train_captions(CAT_AND_DOG[0], "en", ("moggy",)))
    (angry,) = table("face", "😡 | angry face | 张 生气的脸")
    assert {"怒", "怒的表情"} <= set(train_captions(angry, "zh", ("怒",)))


# -- errors ----------------------------------------------------------------------------------------------------------


def test_unknown_selection_lists_those_there_are() -> None:
    with pytest.raises(UserError, match=r"selection: no set is called 'all'; there are: common"):
        resolve_selection("all")


@pytest.mark.parametrize("line", ["🐱 | cat", "🐱 | | 只 猫", "🐱 | cat | 只"])
def test_incomplete_line_of_a_table_is_an_error(line: str) -> None:
    with pytest.raises(ValueError, match="table: expected"):
        table("animal", line)


def test_concept_of_unknown_category_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"category: expected one of .*animal.*, got 'pet'"):
        table("pet", "🐱 | cat | 只 猫")


def test_concept_without_nouns_in_a_language_is_an_error() -> None:
    with pytest.raises(ValueError, match="nouns: 🐱 needs at least one noun in 'zh'"):
        Concept("🐱", "animal", {"en": (Noun("cat", "a"),)})
