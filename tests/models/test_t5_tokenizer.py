"""Prompts to token ids: bytes as in ByT5, tokenizer.json and spiece.model as in their libraries."""

from __future__ import annotations

import io
import shutil
import sys
import unicodedata
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imagen_fast.errors import CheckpointError
from imagen_fast.models.t5 import ByteTokenizer, T5Config, T5Encoder
from imagen_fast.models.t5.tokenizer import JsonTokenizer, MissingTokenizer, SentencePieceTokenizer, load_tokenizer

PROMPTS = ["a cute cat", "一只可爱的猫咪", "🐱 and 👨‍👩‍👧", "", "  two  spaces ", "é\n\t\x00", "İstanbul ﷽ 𝔘"]
SENTENCES = [
    "a cute cat sits on a mat",
    "the red apple is on the table",
    "a dog runs in the park near the house",
    "hello world of cats and dogs",
]


@pytest.fixture(scope="module")
def json_directory(tmp_path_factory):
    """A directory with a small tokenizer.json of T5's kind: unigrams, word marks, and an end token added."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        SENTENCES * 20,
        trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(5)  # as a pipeline may have saved it
    tokenizer.enable_padding(length=5)
    directory = tmp_path_factory.mktemp("json")
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def spiece_directory(tmp_path_factory):
    """A directory with a small spiece.model that has T5's special tokens."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        vocab_size=38,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    directory = tmp_path_factory.mktemp("spiece")
    (directory / "spiece.model").write_bytes(model.getvalue())
    return directory


@pytest.fixture(params=["json_directory", "spiece_directory"], ids=["json", "spiece"])
def vocabulary_directory(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return T5Encoder(T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)).eval()


@pytest.mark.parametrize("prompt", PROMPTS, ids=ascii)
def test_bytes_are_those_of_byt5(prompt):
    transformers = pytest.importorskip("transformers", reason="transformers is the truth of this test")
    assert ByteTokenizer()(prompt).input_ids[0].tolist() == transformers.ByT5Tokenizer()(prompt).input_ids


def test_batches_are_those_of_byt5():
    transformers = pytest.importorskip("transformers", reason="transformers is the truth of this test")
    theirs = transformers.ByT5Tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    ours = ByteTokenizer()(PROMPTS)
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert torch.equal(ours.mask, theirs.attention_mask.bool())
    theirs = transformers.ByT5Tokenizer()(PROMPTS, padding="max_length", max_length=64, return_tensors="pt")
    ours = ByteTokenizer()(PROMPTS, max_length=64, padding="max_length")
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert torch.equal(ours.mask, theirs.attention_mask.bool())


@given(prompt=st.text(max_size=20), max_length=st.integers(1, 30))
def test_a_cut_prompt_is_the_longest_beginning_that_fits(prompt, max_length):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        input_ids, mask = ByteTokenizer()(prompt, max_length)
    ids = input_ids[0].tolist()
    assert mask.all()
    assert ids[-1] == 1
    kept = bytes(token - 3 for token in ids[:-1]).decode("utf-8")
    assert prompt.startswith(kept)
    assert bool(caught) == (kept != prompt)
    if kept != prompt:
        assert len(prompt[: len(kept) + 1].encode()) + 1 > max_length, "one more character would have fitted"


@pytest.mark.parametrize(
    ("prompt", "max_length", "kept", "where"),
    [
        ("a cute cat", 7, "a cute", r"after character 6 \('e'\)"),
        ("一只猫", 8, "一只", r"after character 2 \('只'\)"),
        ("a🐱", 5, "a", r"after character 1 \('a'\)"),
        ("🐱", 4, "", r"before its first character"),
        ("cat", 1, "", r"before its first character"),
    ],
    ids=["ascii", "chinese", "emoji", "inside-the-first", "end-token-alone"],
)
def test_a_long_prompt_is_cut_at_a_character_with_a_warning(prompt, max_length, kept, where):
    with pytest.warns(UserWarning, match=f"longer than the text length of {max_length} tokens: it was cut {where}$"):
        input_ids, _ = ByteTokenizer()(prompt, max_length)
    assert input_ids.tolist() == ByteTokenizer()(kept).input_ids.tolist()


def test_a_prompt_that_just_fits_is_not_cut(recwarn):
    assert ByteTokenizer()("猫", 4).input_ids.tolist() == [[234, 143, 174, 1]]
    assert not recwarn.list


def test_vocabularies_give_what_their_library_gives(json_directory, spiece_directory):
    import sentencepiece
    import tokenizers

    prompts = ["a cute cat", "the red dog", ""]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(spiece_directory / "spiece.model"))
    backend = tokenizers.Tokenizer.from_file(str(json_directory / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    for prompt in prompts:
        ours = load_tokenizer(spiece_directory)(prompt).input_ids[0].tolist()
        assert ours == [*processor.encode(prompt), 1]
        ours = load_tokenizer(json_directory)(prompt).input_ids[0].tolist()
        assert ours == backend.encode(prompt).ids, "with the end token that its own template adds"


def test_vocabularies_give_what_transformers_gives(vocabulary_directory):
    transformers = pytest.importorskip("transformers", reason="transformers is the truth of this test")
    if (vocabulary_directory / "tokenizer.json").exists():
        path = str(vocabulary_directory / "tokenizer.json")
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=path, pad_token="<pad>", eos_token="</s>")
    else:
        sentencepiece = pytest.importorskip("sentencepiece")
        model = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary_directory / "spiece.model"))
        pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(len(model))]
        theirs = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    prompts = ["a cute cat", "the red dog sits on the table", ""]
    expected = theirs(prompts, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    with pytest.warns(UserWarning, match="the prompt 'the red dog sits on the table' is longer"):
        ours = load_tokenizer(vocabulary_directory)(prompts, max_length=12, padding="max_length")
    assert torch.equal(ours.input_ids, expected.input_ids)
    assert torch.equal(ours.mask, expected.attention_mask.bool())


def test_vocabularies_name_the_last_character_kept(vocabulary_directory):
    tokenizer = load_tokenizer(vocabulary_directory)
    prompt = "hello world of cats and dogs"
    whole = tokenizer(prompt).input_ids[0].tolist()
    with pytest.warns(UserWarning, match="it was cut after character") as caught:
        cut = tokenizer(prompt, 6).input_ids[0].tolist()
    assert cut == [*whole[:5], 1]
    kept = int(str(caught[0].message).split("after character ")[1].split(" ")[0])
    assert tokenizer(prompt[:kept]).input_ids[0].tolist() == cut
    assert f"({prompt[kept - 1]!r})" in str(caught[0].message)


def test_sentencepiece_cuts_no_character_of_several_pieces(tmp_path):
    """Bytes of a character that is not in the vocabulary, letters of a ligature that the normalization takes apart."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*SENTENCES, "fish fit five"] * 20),
        model_writer=model,
        vocab_size=290,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(tmp_path)
    for prompt in ("a 猫 cat", "一只猫", "🐱 cat", "caﬁ"):
        beginnings = [unicodedata.normalize("NFKC", prompt[:n]).strip() for n in range(len(prompt) + 1)]
        for length in range(1, tokenizer(prompt).input_ids.shape[1]):
            with pytest.warns(UserWarning, match="it was cut"):
                *kept, _ = tokenizer(prompt, length).input_ids[0].tolist()
            assert tokenizer._backend.decode(kept).strip() in beginnings


def test_characters_outside_the_vocabulary_are_named(vocabulary_directory):
    tokenizer = load_tokenizer(vocabulary_directory)
    with pytest.warns(
        UserWarning, match=r"vocabulary has no 一, 只, 猫: in the prompt 'a cat 一只猫 猫' the model cannot"
    ):
        input_ids, _ = tokenizer("a cat 一只猫 猫")
    assert tokenizer.unk_id in input_ids


def test_bytes_know_every_character(recwarn):
    ByteTokenizer()("a cat 一只猫 🐱")
    assert not recwarn.list


def test_tokenizers_are_saved_with_the_encoder(vocabulary_directory, tmp_path):
    tokenizer = load_tokenizer(vocabulary_directory)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    T5Encoder(config, tokenizer).save_pretrained(tmp_path / "t5")
    loaded = T5Encoder.from_pretrained(tmp_path / "t5")
    assert type(loaded.tokenizer) is type(tokenizer)
    assert torch.equal(loaded.tokenizer("a cute cat").input_ids, tokenizer("a cute cat").input_ids)


@pytest.mark.parametrize("place", ["inside", "beside", "given"])
def test_where_an_encoder_finds_its_tokenizer(vocabulary_directory, tmp_path, place):
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    T5Encoder(config).save_pretrained(tmp_path / "text_encoder")
    folder = {"inside": "text_encoder", "beside": "tokenizer", "given": "elsewhere"}[place]
    (tmp_path / folder).mkdir(exist_ok=True)
    for file in vocabulary_directory.iterdir():
        (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    given = tmp_path / folder if place == "given" else None
    encoder = T5Encoder.from_pretrained(tmp_path / "text_encoder", tokenizer=given)
    assert encoder.encode("a cute cat").mask.all()


def test_an_encoder_takes_the_tokenizer_of_its_number(vocabulary_directory, tmp_path, recwarn):
    """As in pipelines with several encoders, whose "tokenizer" is CLIP's."""
    tokenizers = pytest.importorskip("tokenizers")
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    T5Encoder(config).save_pretrained(tmp_path / "text_encoder_2")
    (tmp_path / "tokenizer").mkdir()
    tokenizers.Tokenizer(tokenizers.models.BPE({"<|endoftext|>": 0}, [])).save(
        str(tmp_path / "tokenizer" / "tokenizer.json")
    )
    assert T5Encoder.from_pretrained(tmp_path / "text_encoder_2").tokenizer is None
    shutil.copytree(vocabulary_directory, tmp_path / "tokenizer_2")
    assert T5Encoder.from_pretrained(tmp_path / "text_encoder_2").encode("a cute cat").mask.all()
    assert not recwarn.list


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>"], ids=["other-tokens", "too-many"])
def test_a_neighbour_that_does_not_fit_leaves_the_encoder_without(encoder, tmp_path, name):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {name: 0, "<pad>": 1} | {f"word{i}": i + 2 for i in range(400)}
    (tmp_path / "tokenizer").mkdir()
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<pad>"))
    backend.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    encoder.save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "text_encoder" / "tokenizer_config.json").unlink()
    with pytest.warns(UserWarning, match="the tokenizer beside .*text_encoder is not the encoder's: .*tokenizer"):
        loaded = T5Encoder.from_pretrained(tmp_path / "text_encoder")
    assert isinstance(loaded.tokenizer, ByteTokenizer), "which needs no file"


@pytest.mark.parametrize("package", ["tokenizers", "sentencepiece"])
def test_a_package_that_is_not_installed_is_named(
    package, json_directory, spiece_directory, tmp_path, monkeypatch, encoder
):
    directory = json_directory if package == "tokenizers" else spiece_directory
    monkeypatch.setitem(sys.modules, package, None)  # makes its import fail
    encoder.save_pretrained(tmp_path / "t5")
    loaded = T5Encoder.from_pretrained(tmp_path / "t5", tokenizer=directory)
    assert isinstance(loaded.tokenizer, MissingTokenizer)
    assert loaded(torch.tensor([[5, 1]])).isfinite().all(), "token ids need no tokenizer"
    message = rf"needs the package {package}: pip install 'imagen-fast\[text\]'"
    with pytest.raises(ModuleNotFoundError, match=message) as raised:
        loaded.encode("a cat")
    assert raised.value.name == package


@pytest.mark.parametrize("package", ["tokenizers", "sentencepiece"])
def test_a_tokenizer_that_cannot_be_read_is_saved_all_the_same(
    package, json_directory, spiece_directory, tmp_path, monkeypatch, encoder
):
    directory = json_directory if package == "tokenizers" else spiece_directory
    encoder.save_pretrained(tmp_path)
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if "safetensors" not in path.name}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, package, None)
        T5Encoder.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if "safetensors" not in path.name} == before
    assert T5Encoder.from_pretrained(tmp_path).tokenizer("a cat").mask.all()


def test_the_other_file_serves_where_a_package_is_missing(json_directory, spiece_directory, tmp_path, monkeypatch):
    for file in [*json_directory.iterdir(), *spiece_directory.iterdir()]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert isinstance(load_tokenizer(tmp_path), JsonTokenizer)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
def test_a_broken_tokenizer_file(tmp_path, name):
    pytest.importorskip("tokenizers" if name == "tokenizer.json" else "sentencepiece")
    (tmp_path / name).write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=f"{name} is not a"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_token(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram([("<pad>", 0.0), ("a", -1.0)], 0))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"tokenizer.json has no token </s>, which T5 needs"):
        load_tokenizer(tmp_path)


def test_a_directory_without_a_tokenizer(encoder, tmp_path):
    assert load_tokenizer(tmp_path) is None
    encoder.save_pretrained(tmp_path / "t5")
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        T5Encoder.from_pretrained(tmp_path / "t5", tokenizer=tmp_path)


def test_encode_gives_features_and_mask(encoder):
    prompts = ["a cat", "一只可爱的猫咪", ""]
    features, mask = encoder.encode(prompts)
    assert features.shape == (3, 22, 32)
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [6, 22, 1]
    for i, prompt in enumerate(prompts):
        alone = encoder.encode(prompt).features[0]
        torch.testing.assert_close(features[i][mask[i]], alone, rtol=0, atol=1e-5 * alone.abs().max().item())


def test_encode_pads_to_the_text_length(encoder):
    result = encoder.encode("a cat", max_length=77, padding="max_length")
    assert result.features.shape == (1, 77, 32)
    assert result.mask.sum() == 6
    assert encoder.encode("a cat", max_length=77).features.shape == (1, 6, 32)


def test_encode_cuts_to_the_text_length(encoder):
    with pytest.warns(UserWarning, match="cut after character 4"):
        result = encoder.encode("a cat", max_length=5)
    assert result.features.shape == (1, 5, 32)


def test_encode_of_no_prompts(encoder):
    assert encoder.encode([]).features.shape == (0, 0, 32)
    assert encoder.encode([], max_length=7, padding="max_length").features.shape == (0, 7, 32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None,), TypeError, "prompts must be a string or a list of strings, got NoneType"),
        ((b"a cat",), TypeError, "got bytes"),
        ((["a cat", 3],), TypeError, "prompts must be strings, got int at position 1"),
        (("a \udce4",), ValueError, r"prompt 'a \\udce4' is no valid Unicode at character 3"),
        (("a", 0), ValueError, r"max_length must be at least 1 \(the end token\), got 0"),
        (("a", None, "max_length"), ValueError, "padding='max_length' needs max_length"),
        (("a", 7, "left"), ValueError, "padding must be 'longest' or 'max_length', got 'left'"),
    ],
    ids=["none", "bytes", "number", "surrogate", "length", "no-length", "padding"],
)
def test_wrong_prompts_are_named(encoder, arguments, error, message):
    with pytest.raises(error, match=message):
        encoder.encode(*arguments)


def test_an_encoder_without_a_tokenizer():
    encoder = T5Encoder(T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))
    with pytest.raises(ValueError, match="this encoder has no tokenizer"):
        encoder.encode("a cat")


def test_a_tokenizer_of_another_model():
    config = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match=r"gave token 119, but the model's vocabulary has 100"):
        T5Encoder(config, ByteTokenizer()).encode("a cat")
