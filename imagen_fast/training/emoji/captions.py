"""Captions of a concept: nouns and CLDR names put into templates, with adjectives and without.

Every sentence that the tables allow is formed; of the many, a fixed choice is kept: all plain ones first (each noun
alone and with its determiner, bare and with the commonest adjective; each template without adjective), then others in
an order drawn from the concept's own character, so that the captions of one emoji do not depend on which others are
selected.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

from .selection import Concept, Noun
from .templates import (
    ADJECTIVES,
    ANNOTATION_TEMPLATES,
    FACE_ANNOTATION_TEMPLATES,
    SIZE_ADJECTIVES,
    SIZES_IN_NOUNS,
    TEMPLATES,
)

MAX_BYTES = 63  # of UTF-8; with the end mark a caption fills 64 positions of a byte-level encoder
_A_BEFORE_A_VOWEL_LETTER = ("unicorn", "ufo")


def noun_phrase(language: str, noun: Noun, adjective: str = "", *, determiner: bool = True) -> str:
    """Join determiner, adjective and noun.

    Example:
        >>> noun_phrase("en", Noun("cat", "a"), "adorable")
        'an adorable cat'
        >>> noun_phrase("zh", Noun("猫", "一只"), "可爱的")
        '一只可爱的猫'
    """
    space = " " if language == "en" else ""
    phrase = f"{adjective}{space}{noun.text}" if adjective else noun.text
    if not determiner or not noun.determiner:
        return phrase
    article = noun.determiner
    if article == "a" and phrase[0].lower() in "aeiou" and not phrase.lower().startswith(_A_BEFORE_A_VOWEL_LETTER):
        article = "an"
    return f"{article}{space}{phrase}"


def fill(template: str, language: str, noun: Noun, adjective: str = "") -> str:
    """Put a noun into a template of `templates.TEMPLATES`."""
    np = noun_phrase(language, noun, adjective)
    bare = noun_phrase(language, noun, adjective, determiner=False)
    return template.format(n=bare, np=np, Np=np[0].upper() + np[1:])


def train_captions(concept: Concept, language: str, names: Sequence[str] = (), *, limit: int = 160) -> list[str]:
    """The captions to train with, at most `limit`; `names` are the CLDR names of `naming_annotations`."""
    nouns, templates = concept.nouns[language], TEMPLATES[language].train
    adjectives = ADJECTIVES[concept.category][language].train
    plain = list(_product(language, nouns, ("{n}", "{np}"), ("", adjectives[0])))
    plain += _annotation_captions(concept, language, names)
    plain += [fill(template, language, nouns[0]) for template in templates]
    rest = _product(language, nouns, templates, ("", *adjectives))
    return _choose(plain, rest, limit, seed=f"train {language} {concept.char}")


def held_out_captions(concept: Concept, language: str, *, limit: int = 48) -> list[str]:
    """Captions for testing, at most `limit`: templates never trained on, then adjectives never trained on."""
    nouns, templates = concept.nouns[language], TEMPLATES[language]
    adjectives = ADJECTIVES[concept.category][language]
    plain = [fill(template, language, nouns[0]) for template in templates.held_out]
    new_template = _product(language, nouns, templates.held_out, ("", *adjectives.train))
    new_adjective = _product(language, nouns, templates.train, adjectives.held_out)
    seed = f"held out {language} {concept.char}"
    half = _choose(plain, new_template, limit // 2, seed=seed)
    return _choose(half, new_adjective, limit, seed=seed)


def _annotation_captions(concept: Concept, language: str, names: Iterable[str]) -> Iterator[str]:
    templates = (FACE_ANNOTATION_TEMPLATES if concept.category == "face" else ANNOTATION_TEMPLATES)[language]
    return (template.format(n=name) for name in names for template in templates)


def _product(
    language: str, nouns: Sequence[Noun], templates: Sequence[str], adjectives: Sequence[str]
) -> Iterator[str]:
    return (
        fill(template, language, noun, adjective)
        for noun in nouns
        for adjective in adjectives
        if not _clash(adjective, noun.text)
        for template in templates
    )


def _clash(adjective: str, noun: str) -> bool:
    """Whether both say a size."""
    return adjective in SIZE_ADJECTIVES and any(size in noun for size in SIZES_IN_NOUNS)


def _choose(first: Iterable[str], rest: Iterable[str], limit: int, *, seed: str) -> list[str]:
    """`first`, then a draw from `rest`, without repetition and without captions that are too long."""
    kept = dict.fromkeys(first)
    others = list(dict.fromkeys(caption for caption in rest if caption not in kept))
    random.Random(seed).shuffle(others)
    return [caption for caption in (*kept, *others) if len(caption.encode()) <= MAX_BYTES][:limit]
