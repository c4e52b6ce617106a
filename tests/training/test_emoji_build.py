"""The emoji data set: built from a small font made here, and from the Debian packages where they are installed."""

from __future__ import annotations

import errno
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagen_fast.errors import CheckpointError, OutputError, UserError
from imagen_fast.training.emoji import EmojiDataset, build_dataset, contact_sheet
from imagen_fast.training.emoji.annotations import DEFAULT_DIRECTORY
from imagen_fast.training.emoji.captions import MAX_BYTES
from imagen_fast.training.emoji.font import DEFAULT_FONT, BitmapFont, square_on_white
from imagen_fast.training.emoji.selection import SELECTIONS, parse_table

pytest.importorskip("fontTools", reason="fonttools is not installed")

RED, BLUE = (255, 0, 0), (0, 0, 255)
PETS = tuple(parse_table("animal", "🐱 | cat | 只 猫\n🐶 | dog | 只 狗"))
ANNOTATIONS = """\
<?xml version="1.0" encoding="UTF-8" ?>
<!-- Copyright © 2000-2001 Somebody
SPDX-License-Identifier: Unicode-Test -->
<ldml><annotations>
<annotation cp="🐱">moggy | pet</annotation><annotation cp="🐱" type="tts">cat face</annotation>
<annotation cp="🐶">hound | pet</annotation><annotation cp="🐶" type="tts">dog face</annotation>
</annotations></ldml>
"""


def png(size: tuple[int, int], color: tuple[int, ...], box: tuple[int, int, int, int]) -> bytes:
    """A picture of one box on a transparent ground."""
    picture = Image.new("RGBA", size)
    picture.paste(color, box)
    stream = io.BytesIO()
    picture.save(stream, "png")
    return stream.getvalue()


def write_font(path: Path, pictures: dict[str, bytes]) -> Path:
    """A font whose glyphs are 136x128 PNG bitmaps in a CBDT table, laid out as Noto Color Emoji is."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.ttLib import newTable
    from fontTools.ttLib.tables.BitmapGlyphMetrics import SmallGlyphMetrics
    from fontTools.ttLib.tables.C_B_D_T_ import cbdt_bitmap_format_17
    from fontTools.ttLib.tables.E_B_L_C_ import SbitLineMetrics, Strike, eblc_index_sub_table_1

    names = {char: f"u{ord(char):X}" for char in pictures}
    builder = FontBuilder(1024, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap({ord(char): name for char, name in names.items()})
    builder.setupNameTable({"familyName": "Test", "copyright": "Copyright 1999 Somebody", "version": "Version 9.9"})
    builder.setupHorizontalMetrics(dict.fromkeys(builder.font.getGlyphOrder(), (1024, 0)))
    builder.setupHorizontalHeader()
    builder.setupOS2()
    builder.setupPost()

    def with_fields(table: Any, **fields: Any) -> Any:
        vars(table).update(fields)
        return table

    line = (
        "ascender", "descender", "widthMax", "caretSlopeNumerator", "caretSlopeDenominator", "caretOffset",
        "minOriginSB", "minAdvanceSB", "maxBeforeBL", "minAfterBL", "pad1", "pad2",
    )  # fmt: skip
    metrics = with_fields(SmallGlyphMetrics(), height=128, width=136, BearingX=0, BearingY=101, Advance=136)
    glyphs = {}
    for char, data in pictures.items():
        glyphs[names[char]] = with_fields(cbdt_bitmap_format_17(b"", builder.font), metrics=metrics, imageData=data)
        del glyphs[names[char]].data  # what fontTools would decode on first use
    span = {"firstGlyphIndex": 1, "lastGlyphIndex": len(pictures)}
    index = eblc_index_sub_table_1(b"", builder.font)
    strike = Strike()
    strike.indexSubTables = [with_fields(index, names=list(glyphs), indexFormat=1, imageFormat=17, **span)]
    with_fields(
        strike.bitmapSizeTable,
        **{direction: with_fields(SbitLineMetrics(), **dict.fromkeys(line, 0)) for direction in ("hori", "vert")},
        **{"colorRef": 0, "flags": 1, "bitDepth": 32, "ppemX": 109, "ppemY": 109},
        **{"startGlyphIndex": 1, "endGlyphIndex": len(pictures)},
    )
    builder.font["CBDT"] = with_fields(newTable("CBDT"), version=3.0, strikeData=[glyphs])
    builder.font["CBLC"] = with_fields(newTable("CBLC"), version=3.0, strikes=[strike])
    builder.save(path)
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A red cat and a blue dog, with annotations, as arguments of `build_dataset`."""
    directory = tmp_path_factory.mktemp("sources")
    pictures = {"🐱": png((136, 128), RED, (4, 0, 68, 128)), "🐶": png((136, 128), BLUE, (4, 64, 132, 128))}
    for language in ("en", "zh"):
        (directory / f"{language}.xml").write_text(ANNOTATIONS, encoding="utf-8")
    font = write_font(directory / "font.ttf", pictures)
    return {"font": font, "annotations_dir": directory, "selection": PETS, "progress": False}


@pytest.fixture
def built(sources: dict[str, Any], tmp_path: Path) -> EmojiDataset:
    return build_dataset(tmp_path / "set", **sources)


# -- what is built ---------------------------------------------------------------------------------------------------


def test_pictures_are_composited_on_white_without_the_empty_margins(built: EmojiDataset) -> None:
    assert built.images.shape == (2, 128, 128, 3)
    assert built.images.dtype == np.uint8
    cat, dog = np.full((2, 128, 128, 3), 255, np.uint8)
    cat[:, :64], dog[64:] = RED, BLUE
    np.testing.assert_array_equal(built.images, [cat, dog])


def test_data_set_has_names_and_captions(built: EmojiDataset) -> None:
    assert len(built) == 2
    assert (built.char(0), built.name(0), built.name(0, "zh")) == ("🐱", "cat", "猫")
    assert {"a cute dog", "dog face", "hound"} <= set(built.captions(1, language="en"))
    assert "一只可爱的狗" in built.captions(1, "train", "zh")
    assert "pet" not in built.captions(0)
    assert built.captions(0, "held_out") == built.captions(0, "held_out", "en") + built.captions(0, "held_out", "zh")


def test_licences_credit_both_sources(built: EmojiDataset) -> None:
    text = (built.directory / "LICENSES.md").read_text(encoding="utf-8")
    for credit in ("Version 9.9", "Copyright 1999 Somebody", "SIL Open Font License", "2000-2001", "Unicode-Test"):
        assert credit in text


def test_same_sources_give_the_same_bytes(built: EmojiDataset, sources: dict[str, Any], tmp_path: Path) -> None:
    again = build_dataset(tmp_path / "again", **sources)
    for name in ("images.npy", "captions.json", "LICENSES.md"):
        assert (again.directory / name).read_bytes() == (built.directory / name).read_bytes(), name


def test_older_data_set_is_replaced_and_stays_readable(built: EmojiDataset, sources: dict[str, Any]) -> None:
    before = np.array(built.images)
    again = build_dataset(built.directory, **{**sources, "selection": PETS[1:]})
    assert (len(again), again.name(0)) == (1, "dog")
    np.testing.assert_array_equal(built.images, before)


def test_variation_selector_is_no_hindrance(sources: dict[str, Any], tmp_path: Path) -> None:
    selection = tuple(parse_table("animal", "🐱\ufe0f | cat | 只 猫"))
    assert len(build_dataset(tmp_path / "set", **{**sources, "selection": selection})) == 1


def test_half_transparent_pixels_mix_with_white() -> None:
    picture = Image.open(io.BytesIO(png((136, 128), (0, 0, 0, 128), (4, 0, 132, 128))))
    assert np.all(square_on_white(picture, 128) == 127)


def test_picture_that_fills_its_margins_is_padded_and_resized() -> None:
    full = square_on_white(Image.open(io.BytesIO(png((136, 128), RED, (0, 0, 136, 128)))), 128)
    assert full.shape == (128, 128, 3)
    assert np.all(full[[0, -1]] > 200, where=[False, True, True]), "rows above and below were not padded with white"
    assert np.all(full[8:-8] == RED), "columns at the sides were cut"


def test_contact_sheet_shows_every_picture(built: EmojiDataset, tmp_path: Path) -> None:
    path = contact_sheet(built, tmp_path / "sheet.png", columns=2, cell=32, labels=False)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (32, 64, 3)
    assert tuple(sheet[16, 4]) == RED
    assert tuple(sheet[28, 48]) == BLUE


def test_contact_sheet_without_columns_is_an_error(built: EmojiDataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="columns, cell: expected at least 1, got 0"):
        contact_sheet(built, tmp_path / "sheet.png", columns=0)


# -- bad sources -----------------------------------------------------------------------------------------------------

DEBIAN = r"apt-get install fonts-noto-color-emoji unicode-cldr-core"


def without_bitmaps(path: Path) -> None:
    from fontTools.ttLib import TTFont

    font = TTFont(path)
    del font["CBDT"], font["CBLC"]
    font.save(path)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-600])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(Path.unlink, rf"there is no font .*font\.ttf; .*{DEBIAN}.*\(--font\)", id="missing"),
        pytest.param(lambda path: path.write_text("no font"), r"font\.ttf is not a font that can be read", id="text"),
        pytest.param(cut_short, r"font\.ttf is not a font that can be read", id="cut short"),
        pytest.param(without_bitmaps, r"font\.ttf holds no bitmaps \(no CBDT table\)", id="without bitmaps"),
    ],
)
def test_bad_font_is_an_error(
    damage: Callable[[Path], object], message: str, sources: dict[str, Any], tmp_path: Path
) -> None:
    font = tmp_path / "font.ttf"
    font.write_bytes(sources["font"].read_bytes())
    damage(font)
    with pytest.raises(UserError, match=message):
        build_dataset(tmp_path / "set", **{**sources, "font": font})
    assert not (tmp_path / "set").exists()


def test_missing_annotations_name_the_package(sources: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"cannot read the CLDR annotations .*en\.xml .*{DEBIAN}.*annotations_dir \(--annotations\)"
    ):
        build_dataset(tmp_path / "set", **{**sources, "annotations_dir": tmp_path})


def test_damaged_annotations_are_an_error(sources: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "en.xml").write_text(ANNOTATIONS[:-30], encoding="utf-8")
    with pytest.raises(UserError, match=r"en\.xml is not a CLDR annotation file"):
        build_dataset(tmp_path / "set", **{**sources, "annotations_dir": tmp_path})


def test_missing_fonttools_is_an_error(sources: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fontTools.ttLib", None)
    with pytest.raises(UserError, match=r"pip install 'imagen-fast\[train\]'"):
        BitmapFont(sources["font"])


@pytest.mark.parametrize("char", ["🦊", "👨‍👩‍👧", ""])
def test_emoji_without_a_picture_is_an_error(char: str, sources: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"holds no picture of {char}"):
        BitmapFont(sources["font"]).picture(char)


def test_failure_leaves_nothing_behind(sources: dict[str, Any], tmp_path: Path) -> None:
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    for language in ("en", "zh"):
        text = ANNOTATIONS.replace(
            "</annotations>", '<annotation cp="🦊" type="tts">fox face</annotation></annotations>'
        )
        (annotations / f"{language}.xml").write_text(text, encoding="utf-8")
    selection = (*PETS, *parse_table("animal", "🦊 | fox | 只 狐狸"))
    with pytest.raises(UserError, match="holds no picture of 🦊"):
        build_dataset(tmp_path / "set", **{**sources, "annotations_dir": annotations, "selection": selection})
    assert [path.name for path in tmp_path.iterdir()] == ["annotations"]


def test_empty_selection_is_an_error(sources: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="selection: needs at least one emoji"):
        build_dataset(tmp_path / "set", **{**sources, "selection": ()})


def test_two_pictures_of_one_name_are_an_error(sources: dict[str, Any], tmp_path: Path) -> None:
    selection = tuple(parse_table("animal", "🐱 | pet | 只 猫\n🐶 | pet | 只 狗"))
    with pytest.raises(UserError, match=r"selection: '.*pet.*' names both 🐱 and 🐶"):
        build_dataset(tmp_path / "set", **{**sources, "selection": selection})


def test_directory_of_something_else_is_not_replaced(sources: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(OutputError, match="holds something other than an emoji data set"):
        build_dataset(tmp_path, **sources)
    assert (tmp_path / "thesis.txt").read_text() == "all of it"


def test_full_disk_keeps_the_older_data_set(
    built: EmojiDataset, sources: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(OutputError, match="No space left on device"):
        build_dataset(built.directory, **{**sources, "selection": PETS[1:]})
    assert len(EmojiDataset(built.directory)) == 2


# -- bad data sets ---------------------------------------------------------------------------------------------------


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "captions.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    return edit


def images(array: np.ndarray) -> Callable[[Path], None]:
    return lambda directory: np.save(directory / "images.npy", array)


BLANK = np.zeros((2, 128, 128, 3), np.uint8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda d: (d / "images.npy").unlink(), r"cannot read .*images\.npy: No such file", id="no images"),
        pytest.param(lambda d: (d / "captions.json").unlink(), r"cannot read .*captions\.json", id="no captions"),
        pytest.param(lambda d: (d / "images.npy").write_bytes(b""), r"images\.npy is damaged", id="empty images"),
        pytest.param(
            lambda d: (d / "images.npy").write_bytes((d / "images.npy").read_bytes()[:-1]),
            r"images\.npy is damaged",
            id="images cut short",
        ),
        pytest.param(
            images(BLANK[:, :64]), r"expected uint8 of shape \(N, 128, 128, 3\), got uint8 \(2, 64,", id="shape"
        ),
        pytest.param(images(BLANK.astype(np.float32)), r"expected uint8 .*, got float32", id="dtype"),
        pytest.param(images(BLANK[:1]), r"holds 1 pictures, but captions\.json captions for 2", id="number"),
        pytest.param(lambda d: (d / "captions.json").write_text("{"), r"captions\.json is damaged", id="not JSON"),
        pytest.param(edited(lambda c: c.update(version=2)), r"expected version 1, got 2", id="version"),
        pytest.param(edited(lambda c: c.pop("items")), r"damaged: it lists no items", id="no items"),
        pytest.param(edited(lambda c: c["items"][1].pop("name_zh")), r"item 1 has no 'name_zh'", id="no name"),
        pytest.param(
            edited(lambda c: c["items"][0]["train"].update(en=[])),
            r"item 0 has no list of captions 'train' in 'en'",
            id="no caption",
        ),
    ],
)
def test_damaged_data_set_is_an_error(damage: Callable[[Path], object], message: str, built: EmojiDataset) -> None:
    directory = built.directory
    damage(directory)
    with pytest.raises(CheckpointError, match=message):
        EmojiDataset(directory)


def test_missing_data_set_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"imagen-fast data emoji --out .*none"):
        EmojiDataset(tmp_path / "none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split: expected one of train, held_out, got 'test'"),
        ({"language": "fr"}, "language: expected one of en, zh or None, got 'fr'"),
    ],
    ids=["split", "language"],
)
def test_unknown_split_or_language_is_an_error(arguments: dict[str, str], message: str, built: EmojiDataset) -> None:
    with pytest.raises(ValueError, match=message):
        built.captions(0, **arguments)


# -- the real sources ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not (DEFAULT_FONT.is_file() and (DEFAULT_DIRECTORY / "zh.xml").is_file()),
    reason="Debian's fonts-noto-color-emoji and unicode-cldr-core are not installed",
)
def test_common_selection_builds_from_the_debian_packages(tmp_path: Path) -> None:
    dataset = build_dataset(tmp_path / "set", progress=False)
    assert len(dataset) == len(SELECTIONS["common"])
    for index in range(len(dataset)):
        picture, captions = dataset.images[index], dataset.captions(index) + dataset.captions(index, "held_out")
        assert picture.min() < 230, f"{dataset.char(index)} is blank"
        assert picture[[0, -1]].mean() > 128, f"{dataset.char(index)} has no white ground"
        assert max(len(caption.encode()) for caption in captions) <= MAX_BYTES
    assert len({picture.tobytes() for picture in dataset.images}) == len(dataset), "two emoji look the same"
    cat = next(i for i in range(len(dataset)) if dataset.name(i) == "cat")
    assert {"cat face", "猫脸"} <= set(dataset.captions(cat))
