"""Names and keywords of emoji from the annotations of Unicode CLDR.

Keywords are made for search, so most of them fit many emoji ("face", 水果). A keyword becomes a caption only if it
belongs to one emoji of the selection alone, is not a noun of another one, and is not listed in `NOT_NAMES`.

Source: Unicode CLDR, common/annotations (UTS #35 part 7).
"""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError
from .selection import Concept

DEFAULT_DIRECTORY = Path("/usr/share/unicode/cldr/common/annotations")
VARIATION_SELECTOR = "\ufe0f"  # "show as a picture"; CLDR leaves it out of its keys


@dataclass(frozen=True)
class Annotation:
    """What CLDR says of one emoji in one language."""

    name: str
    keywords: tuple[str, ...]


@dataclass(frozen=True)
class AnnotationFile:
    """The annotations of one language by emoji, and what the file says of its owner and licence."""

    annotations: dict[str, Annotation]
    copyright: str
    licence: str


def _listed(table: str) -> frozenset[str]:
    return frozenset(filter(None, map(str.strip, table.replace("\n", "|").split("|"))))


# Words that only one emoji of a selection happens to have, but that name something else or nothing to be drawn.
# In lower case.
NOT_NAMES: dict[str, frozenset[str]] = {
    "en": _listed(
        """
        love|cool|good night|fear|munch|mask|doctor|innocent|halo|death|young|claus|father|snowman without snow|jack
        lantern|marsupial|leo|wise|pretty|beetle|bearer|ophiuchus|cancer|tropical|flipper|spouting|spots|stripe|hump
        female|food|ear|maze|french|slice|bowl|noodle|cream|ice|soft|breakfast|birthday|pastry|hot|tea|beverage|bar
        mug|deciduous|shedding|plant|4|four|falling|rays|weather|high voltage|danger|voltage|zap|drop|sweat|africa
        europe|saturnine|globe showing europe-africa|eruption|truck|railway|steam|space|resort|european|christian
        cross|religion|tokyo|camping|amusement park|ferris|wheel|king|queen|box|wrapped|hoop|instrument|music|video
        cell|mobile|personal|alarm|idea|lock|password|cutting|top|eyewear|prize|+1|hand|up|steaming bowl|book
        berries|berry|citrus
        """
    ),
    "zh": _listed(
        """
        眼泪|眨眼|酷|泪|恐怖|医生|光环|天真|死亡|外星|星际|童话|节日|灯笼|澳大利亚|狮子座|睿智|勤劳|漂亮|美丽|母|持票人|狡猾的人
        蛇夫座|巨蟹座|热带|鸭脚板|喷水|斑点|条纹|双峰|雌性|红|食物|油炸|热气腾腾|碗|甜点|生日|茶|饮料|杯|酒|落叶|落叶植物|沙漠
        幸运|加拿大|秋|晴|阴|高压|危险|有电|世界|非洲|地球上的欧洲非洲|喷发|爆发|蒸汽|基督|宗教|东京|露营|游乐园|包装|盒子|篮筐
        乐器|弹奏|演奏|音乐|拍照|摄影|照片|移动|主意|想法|白炽灯|密码|密钥|开锁|解锁|叮当|响铃|修剪|剪|剪裁|工具|橡皮|橡皮擦
        画画|画笔|绘画|学习|服饰|眼睛|奖励|奖品|奖赏|雨|手|真棒|赞成|顶一下|同意|胖达|暴龙君主|龙头
        """
    ),
}


def read_annotations(directory: str | os.PathLike[str] | None, language: str) -> AnnotationFile:
    """Read `<language>.xml` of a directory of CLDR annotations, by default Debian's.

    Raises:
        UserError: the file is missing or is not a CLDR annotation file.
    """
    path = Path(directory or DEFAULT_DIRECTORY) / f"{language}.xml"
    try:
        text = path.read_text(encoding="utf-8")
        elements = list(ElementTree.fromstring(text).iter("annotation"))
    except OSError as error:
        raise UserError(
            f"cannot read the CLDR annotations {path} ({error.strerror}); install them with "
            "`apt-get install fonts-noto-color-emoji unicode-cldr-core`, "
            "or give another directory as annotations_dir (--annotations)"
        ) from error
    except (ElementTree.ParseError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a CLDR annotation file: {error}") from error

    names = {e.get("cp", ""): (e.text or "").strip() for e in elements if e.get("type") == "tts"}
    keywords = {e.get("cp", ""): (e.text or "").split("|") for e in elements if e.get("type") is None}
    annotations = {
        char: Annotation(name, tuple(filter(None, map(str.strip, keywords.get(char, ())))))
        for char, name in names.items()
    }
    copyright_line = re.search(r"Copyright © .*", text)
    licence = re.search(r"SPDX-License-Identifier:\s*(\S+)", text)
    return AnnotationFile(
        annotations,
        copyright=copyright_line.group().strip() if copyright_line else "Copyright © Unicode, Inc.",
        licence=licence.group(1) if licence else "Unicode-3.0",
    )


def naming_annotations(
    concepts: Sequence[Concept], annotations: dict[str, Annotation], language: str
) -> list[tuple[str, ...]]:
    """For each concept the CLDR name and keywords that can only mean it, in CLDR's order, its own nouns left out."""
    words = [_words(concept, annotations, language) for concept in concepts]
    owners = Counter(key for own in words for key in own)
    nouns = {noun.text.lower() for concept in concepts for noun in concept.nouns[language]}
    return [
        tuple(w for key, w in own.items() if owners[key] == 1 and key not in nouns and key not in NOT_NAMES[language])
        for own in words
    ]


def _words(concept: Concept, annotations: dict[str, Annotation], language: str) -> dict[str, str]:
    """Name and keywords, by their lower-case form."""
    annotation = annotations.get(concept.char.replace(VARIATION_SELECTOR, ""))
    if annotation is None:
        raise UserError(f"the CLDR annotations ({language}.xml) do not know the emoji {concept.char}")
    return {word.lower(): word for word in (annotation.name, *annotation.keywords)}
