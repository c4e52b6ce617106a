"""The sentences that captions are made of: templates and adjectives for each language.

Fields of a template: `{n}` is the noun with an adjective or without ("cute cat", 可爱的猫), `{np}` has its determiner
too ("a cute cat", 一只可爱的猫), and `{Np}` begins with a capital letter. Adjectives praise; none of them says anything
that would change the picture, so no colours and no moods.

What is held out never occurs in training: whole templates, and adjectives in any template.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """Entries for training, and entries kept for testing."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


TEMPLATES: dict[str, Words] = {
    "en": Words(
        train=(
            "{n}",
            "{np}",
            "{Np}",
            "{Np}.",
            "{n} emoji",
            "{n} icon",
            "picture of {np}",
            "a picture of {np}",
            "A picture of {np}.",
            "an emoji of {np}",
            "an image of {np}",
            "a drawing of {np}",
            "a cartoon of {np}",
            "an icon of {np}",
            "draw {np}",
            "Draw {np}.",
            "draw me {np}",
            "show me {np}",
            "please show me {np}",
            "I want {np}",
            "I want to see {np}",
            "{np} on a white background",
        ),
        held_out=(
            "an illustration of {np}",
            "a small picture of {np}",
            "{n} picture",
            "please draw {np}",
            "Can you draw {np}?",
            "I would like {np}",
            "paint {np} for me",
        ),
    ),
    "zh": Words(
        train=(
            "{n}",
            "{np}",
            "{np}。",
            "{n}图片",
            "{n}的图片",
            "{n}的图标",
            "{n}的卡通画",
            "一张{n}的图片",
            "一幅{n}的画",
            "一个{n}的图标",
            "一个{n}的表情符号",
            "{n}的表情符号",
            "画{np}",
            "画{np}。",
            "请画{np}",
            "给我画{np}",
            "我要{np}",
            "我想要{np}",
            "我想看{np}",
            "给我看{np}",
            "这是{np}",
            "白色背景上的{np}",
        ),
        held_out=(
            "一张{n}的插图",
            "{n}的小图",
            "帮我画{np}",
            "请给我画{np}。",
            "你能画{np}吗？",
            "图中有{np}",
            "我想画{np}",
        ),
    ),
}

# How a name or keyword of CLDR is used: it may be a noun or a verb and has no determiner.
ANNOTATION_TEMPLATES: dict[str, tuple[str, ...]] = {"en": ("{n}", "{n} emoji"), "zh": ("{n}", "{n}表情符号")}
FACE_ANNOTATION_TEMPLATES: dict[str, tuple[str, ...]] = {
    "en": ("{n}", "{n} emoji"),
    "zh": ("{n}", "{n}表情", "{n}的表情"),
}

# Adjectives of size are left out where the noun says a size itself: no "little giant panda", no 小小的大树.
SIZE_ADJECTIVES = ("little", "small", "tiny", "cute little", "小小的", "小巧的")
SIZES_IN_NOUNS = ("little", "small", "giant", "great", "big", "大", "小")

ADJECTIVES: dict[str, dict[str, Words]] = {
    "face": {
        "en": Words(("cute", "little", "funny", "lovely", "simple", "round", "very cute"), ("charming", "tiny")),
        "zh": Words(("可爱的", "有趣的", "好玩的", "搞笑的", "小小的", "圆圆的", "很可爱的"), ("滑稽的", "呆萌的")),
    },
    "character": {
        "en": Words(
            ("cute", "little", "funny", "lovely", "friendly", "cute little", "very cute"), ("charming", "tiny")
        ),
        "zh": Words(("可爱的", "有趣的", "好玩的", "小小的", "好看的", "很可爱的"), ("呆萌的", "迷人的")),
    },
    "animal": {
        "en": Words(
            (
                "cute",
                "little",
                "sweet",
                "lovely",
                "adorable",
                "funny",
                "small",
                "cute little",
                "very cute",
                "beautiful",
            ),
            ("charming", "tiny"),
        ),
        "zh": Words(
            ("可爱的", "萌萌的", "漂亮的", "有趣的", "小小的", "好看的", "很可爱的", "聪明的", "可爱又漂亮的"),
            ("呆萌的", "乖巧的", "迷人的"),
        ),
    },
    "food": {
        "en": Words(
            ("delicious", "tasty", "yummy", "nice", "fresh", "lovely", "very tasty"), ("appetizing", "wonderful")
        ),
        "zh": Words(("好吃的", "美味的", "新鲜的", "诱人的", "可口的", "很好吃的"), ("香喷喷的", "令人垂涎的")),
    },
    "drink": {
        "en": Words(("delicious", "tasty", "nice", "fresh", "lovely", "very tasty"), ("wonderful", "refreshing")),
        "zh": Words(("好喝的", "美味的", "香醇的", "诱人的", "可口的", "很好喝的"), ("醇厚的", "香喷喷的")),
    },
    "plant": {
        "en": Words(("beautiful", "pretty", "lovely", "nice", "little", "very beautiful"), ("gorgeous", "charming")),
        "zh": Words(("美丽的", "漂亮的", "好看的", "小小的", "可爱的", "很漂亮的"), ("迷人的", "精致的")),
    },
    "nature": {
        "en": Words(("beautiful", "pretty", "lovely", "nice", "amazing", "very beautiful"), ("wonderful", "gorgeous")),
        "zh": Words(("美丽的", "漂亮的", "好看的", "神奇的", "可爱的", "很漂亮的"), ("迷人的", "梦幻的")),
    },
    "vehicle": {
        "en": Words(("little", "nice", "cool", "small", "shiny", "new", "cute", "very cool"), ("tiny", "fancy")),
        "zh": Words(("漂亮的", "好看的", "小小的", "崭新的", "可爱的", "很酷的"), ("帅气的", "小巧的")),
    },
    "building": {
        "en": Words(("beautiful", "nice", "lovely", "little", "pretty", "very beautiful"), ("charming", "magnificent")),
        "zh": Words(("美丽的", "漂亮的", "好看的", "小小的", "可爱的", "很漂亮的"), ("迷人的", "精致的")),
    },
    "object": {
        "en": Words(("nice", "little", "beautiful", "small", "cool", "cute", "pretty", "very nice"), ("fancy", "tiny")),
        "zh": Words(("漂亮的", "好看的", "小小的", "精美的", "可爱的", "很好看的"), ("精致的", "小巧的")),
    },
}
