"""Reading and writing directories of T5 encoders: shards, dtypes, and what is said of a directory that does not fit."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from imagen_fast.errors import CheckpointError, OutputError
from imagen_fast.models.t5 import ByteTokenizer, T5Config, T5Encoder

CONFIG = T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return T5Encoder(CONFIG).eval()


@pytest.fixture
def directory(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


def edit_tensors(directory, **changes):
    """Rewrite model.safetensors with the tensors in `changes` ("." as "__") replaced, or dropped where None."""
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory, **changes):
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def assert_same_weights(ours, other):
    assert ours.keys() == other.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, other[name]), name


def test_saved_and_loaded_is_the_same(encoder, directory):
    loaded = T5Encoder.from_pretrained(directory)
    assert loaded.config == CONFIG
    assert isinstance(loaded.tokenizer, ByteTokenizer)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert_same_weights(loaded.state_dict(), encoder.state_dict())
    assert torch.equal(loaded.encode(["a cat", "猫"]).features, encoder.encode(["a cat", "猫"]).features)


def test_shards_are_written_and_read(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "t5", max_shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "t5").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "t5" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(4 * parameter.numel() for parameter in encoder.parameters())
    assert_same_weights(T5Encoder.from_pretrained(tmp_path / "t5").state_dict(), encoder.state_dict())


@pytest.mark.parametrize("bias_per_layer", [False, True], ids=["t5", "umt5"])
@pytest.mark.parametrize("max_shard_bytes", [20_000, 10**9], ids=["shards", "one-file"])
def test_transformers_reads_what_is_saved(tmp_path, bias_per_layer, max_shard_bytes):
    transformers = pytest.importorskip("transformers", reason="transformers is the reader of this test")
    torch.manual_seed(0)
    ours = T5Encoder(T5Config(**{**vars(CONFIG), "bias_per_layer": bias_per_layer})).eval()
    ours.save_pretrained(tmp_path / "t5", max_shard_bytes=max_shard_bytes)
    model_class = transformers.UMT5EncoderModel if bias_per_layer else transformers.T5EncoderModel
    theirs, report = model_class.from_pretrained(tmp_path / "t5", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    input_ids, mask = ours.tokenizer(["a cat", "一只可爱的猫咪"])
    expected = theirs.eval()(input_ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours(input_ids, mask), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    tokenizer = transformers.ByT5Tokenizer.from_pretrained(tmp_path / "t5")
    assert tokenizer("a猫").input_ids == ours.tokenizer("a猫").input_ids[0].tolist()


def test_shards_of_transformers_are_read_without_the_decoder(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is the writer of this test")
    torch.manual_seed(0)
    config = transformers.T5Config(**CONFIG.to_huggingface())
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    used = {file for name, file in weight_map.items() if name.startswith(("encoder.", "shared."))}
    unused = set(weight_map.values()) - used
    assert len(used) > 1
    assert unused
    for file in unused:
        (tmp_path / file).unlink()  # so that reading it would fail
    ours = T5Encoder.from_pretrained(tmp_path)
    input_ids = torch.arange(20)[None]
    expected = theirs.get_encoder()(input_ids).last_hidden_state
    torch.testing.assert_close(ours(input_ids), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_the_embedding_may_be_stored_under_the_encoder(encoder, directory):
    edit_tensors(directory, shared__weight=None, encoder__embed_tokens__weight=encoder.embedding.weight.detach())
    assert_same_weights(T5Encoder.from_pretrained(directory).state_dict(), encoder.state_dict())


def test_dtype_of_what_is_loaded(directory):
    assert T5Encoder.from_pretrained(directory).embedding.weight.dtype == torch.float32
    bf16 = T5Encoder.from_pretrained(directory, torch.bfloat16)
    assert {parameter.dtype for parameter in bf16.parameters()} == {torch.bfloat16}
    edit_config(directory, dtype="bfloat16")
    assert T5Encoder.from_pretrained(directory).embedding.weight.dtype == torch.bfloat16
    edit_config(directory, dtype=None, torch_dtype="float16")
    assert T5Encoder.from_pretrained(directory).embedding.weight.dtype == torch.float16
    edit_config(directory, torch_dtype=None)
    assert T5Encoder.from_pretrained(directory).embedding.weight.dtype == torch.float32


def test_fp16_keeps_the_output_weights_in_fp32(directory):
    fp16 = T5Encoder.from_pretrained(directory, torch.float16)
    for name, parameter in fp16.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith("wo.weight") else torch.float16), name
    assert fp16.encode("a cat").features.dtype == torch.float16


def test_saved_in_half_the_size(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "t5", dtype=torch.bfloat16)
    loaded = T5Encoder.from_pretrained(tmp_path / "t5")
    assert_same_weights(loaded.state_dict(), encoder.bfloat16().state_dict())


def test_variant_reads_the_files_of_that_name(encoder, directory):
    encoder.embedding.weight.data.add_(1)
    encoder.save_pretrained(directory.parent / "other", dtype=torch.float16)
    (directory.parent / "other" / "model.safetensors").rename(directory / "model.fp16.safetensors")
    loaded = T5Encoder.from_pretrained(directory, torch.float32, variant="fp16")
    assert torch.equal(loaded.embedding.weight, encoder.embedding.weight.half().float())
    assert not torch.equal(T5Encoder.from_pretrained(directory).embedding.weight, loaded.embedding.weight)


def test_weights_do_not_follow_the_file(encoder, directory):
    loaded = T5Encoder.from_pretrained(directory)
    with open(directory / "model.safetensors", "r+b") as file:
        file.seek(-CONFIG.d_model * 4, 2)
        file.write(b"\x7f" * CONFIG.d_model * 4)
    assert_same_weights(loaded.state_dict(), encoder.state_dict())


def test_copies_and_pickles(encoder, tmp_path):
    for clone in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(clone.encode("a cat").features, encoder.encode("a cat").features)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, r"config.json: model_type 'bert' is not a T5 encoder; known: 't5', 'mt5', 'umt5'"),
        ({"model_type": None}, "model_type None is not a T5 encoder"),
        ({"d_ff": None}, "config.json: missing key 'd_ff'"),
        ({"d_model": "wide"}, "config.json: 'd_model' must be int, got 'wide'"),
        ({"num_heads": 0}, "config.json: num_heads must be at least 1, got 0"),
        ({"feed_forward_proj": "gated-tanh"}, "feed_forward_proj must be one of"),
        ({"d_ff": 40}, r"'encoder.block.0.layer.1.DenseReluDense.wi_0.weight' has shape \(48, 32\), .* \(40, 32\)"),
        ({"vocab_size": 400}, r"'shared.weight' has shape \(384, 32\), but config.json calls for \(400, 32\)"),
        ({"num_layers": 3}, "no tensor 'encoder.block.2.layer.0.layer_norm.weight' and 8 others"),
        ({"num_layers": 1}, "holds a tensor 'encoder.block.1.* for which its config.json has no place"),
        ({"model_type": "umt5"}, "no tensor 'encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight',"),
        ({"feed_forward_proj": "relu"}, "no tensor 'encoder.block.0.layer.1.DenseReluDense.wi.weight'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_does_not_fit(directory, changes, message):
    edit_config(directory, **changes)
    with pytest.raises(CheckpointError, match=message):
        T5Encoder.from_pretrained(directory)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("shared__weight", None, "no tensor 'shared.weight', which"),
        ("encoder__final_layer_norm__weight", None, "no tensor 'encoder.final_layer_norm.weight'"),
        ("encoder__final_layer_norm__weight", torch.ones(31), r"has shape \(31,\), but config.json calls for \(32,\)"),
        ("encoder__final_layer_norm__weight", torch.ones(32).int(), "is I32, need one of F64, F32, F16, BF16"),
    ],
    ids=["no-embedding", "no-norm", "shape", "dtype"],
)
def test_a_tensor_that_does_not_fit(directory, name, tensor, message):
    edit_tensors(directory, **{name: tensor})
    with pytest.raises(CheckpointError, match=message):
        T5Encoder.from_pretrained(directory)


def test_no_directory(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere is not a checkpoint: it has no config.json"):
        T5Encoder.from_pretrained(tmp_path / "nowhere")


def test_no_weights(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        T5Encoder.from_pretrained(directory)


def test_a_pickle_is_never_opened(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, a pickle, which is never opened here: convert it"):
        T5Encoder.from_pretrained(directory)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, None], ids=["empty", "junk", "half"])
def test_a_broken_weight_file(directory, content):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000] if content is None else content)
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a whole safetensors file"):
        T5Encoder.from_pretrained(directory)


def test_a_broken_config(directory):
    (directory / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is not valid JSON"):
        T5Encoder.from_pretrained(directory)


@pytest.fixture
def sharded(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "t5", max_shard_bytes=20_000)
    return tmp_path / "t5"


def test_a_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"t5 misses the file {shard.name}"):
        T5Encoder.from_pretrained(sharded)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "holds no weight_map"),
        ({"shared.weight": 3}, "holds no weight_map"),
        ({"shared.weight": "../other.safetensors"}, "names the file '../other.safetensors', which is outside"),
        ({}, "has no tensor 'shared.weight' and 20 others"),
    ],
    ids=["none", "no-name", "outside", "empty"],
)
def test_a_broken_index(sharded, weight_map, message):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        T5Encoder.from_pretrained(sharded)


def test_an_index_that_is_wrong(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["shared.weight"] = index["weight_map"]["encoder.final_layer_norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"has no tensor 'shared.weight', though the index says so"):
        T5Encoder.from_pretrained(sharded)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn, "float32"], ids=str)
def test_dtype_must_be_floating(encoder, directory, dtype):
    with pytest.raises(TypeError, match=f"dtype must be a floating-point dtype, got {dtype}"):
        T5Encoder.from_pretrained(directory, dtype)
    with pytest.raises(TypeError, match=f"dtype must be a floating-point dtype, got {dtype}"):
        encoder.save_pretrained(directory, dtype)
    assert_same_weights(T5Encoder.from_pretrained(directory).state_dict(), encoder.state_dict())


def test_nothing_is_loaded_before_all_is_checked(directory, monkeypatch):
    """The last tensor in the file has the wrong shape: no tensor may have been read by then."""
    from safetensors import safe_open

    edit_tensors(directory, shared__weight=torch.zeros(3, 32))
    monkeypatch.setattr("imagen_fast.models.checkpoint.safe_open", HeadersOnly)
    HeadersOnly.backend = safe_open
    with pytest.raises(CheckpointError, match=r"'shared.weight' has shape \(3, 32\)"):
        T5Encoder.from_pretrained(directory)


class HeadersOnly:
    """safe_open that fails when a tensor's data are asked for."""

    backend = None

    def __init__(self, *arguments, **options):
        self.file = self.backend(*arguments, **options)

    def __enter__(self):
        self.opened = self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def keys(self):
        return self.opened.keys()

    def get_slice(self, name):
        return self.opened.get_slice(name)

    def get_tensor(self, name):
        raise AssertionError(f"{name} was read before all headers were checked")


def test_saving_over_an_older_one_replaces_it(encoder, sharded):
    encoder.save_pretrained(sharded)
    names = sorted(path.name for path in sharded.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer_config.json"]


def test_saving_does_not_replace_other_files(encoder, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"it holds thesis.txt, which is no part of a T5 checkpoint"):
        encoder.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


OTHERS = {
    "diffusers": ("config.json", "diffusion_pytorch_model.safetensors"),
    "lora": ("pytorch_lora_weights.safetensors",),
    "bert": ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    "no-config": ("model.safetensors",),
    "broken-config": ("model.safetensors", "config.json"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_saving_does_not_replace_another_model(encoder, tmp_path, kind):
    config = "{" if kind == "broken-config" else json.dumps({"model_type": "bert"})
    for name in OTHERS[kind]:
        (tmp_path / name).write_text(config if name == "config.json" else "its weights")
    with pytest.raises(OutputError, match=r"it holds .*, which is no part of a T5 checkpoint"):
        encoder.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(OTHERS[kind])


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "adapter.safetensors", "tokenizer-notes.json"])
def test_saving_does_not_lose_what_lies_beside_an_older_one(encoder, directory, name):
    (directory / name).write_text("mine")
    with pytest.raises(OutputError, match=f"it holds {name}, which is no part of a T5 checkpoint"):
        encoder.save_pretrained(directory)
    assert (directory / name).read_text() == "mine"


def test_saving_to_the_working_directory(encoder, directory, monkeypatch):
    monkeypatch.chdir(directory)
    encoder.save_pretrained(".", dtype=torch.bfloat16)
    assert Path.cwd() == directory
    assert T5Encoder.from_pretrained(".").embedding.weight.dtype == torch.bfloat16


def test_saving_to_a_file(encoder, tmp_path):
    (tmp_path / "t5").write_text("")
    with pytest.raises(OutputError, match=r"it is a file, not a directory"):
        encoder.save_pretrained(tmp_path / "t5")


FULL_DISK = """
import resource, signal, sys
from imagen_fast.errors import OutputError
from imagen_fast.models.t5 import T5Config, T5Encoder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
encoder = T5Encoder(T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))
try:
    encoder.save_pretrained(sys.argv[1])
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files through the resource module")
def test_a_disk_that_fills_up_leaves_the_old_checkpoint(encoder, directory):
    """A file-size limit stands in for the full disk: both fail in the middle of a write."""
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(directory)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert f"cannot write {directory}" in result.stdout
    assert [path.name for path in directory.parent.iterdir()] == ["t5"]
    assert_same_weights(T5Encoder.from_pretrained(directory).state_dict(), encoder.state_dict())
