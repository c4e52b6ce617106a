"""The T5 encoder against Hugging Face transformers, whose checkpoints it must reproduce."""

from __future__ import annotations

import pytest
import torch

from imagen_fast.errors import ConfigError
from imagen_fast.models.t5 import T5Config, T5Encoder
from imagen_fast.models.t5.layers import T5RMSNorm, clamp_fp16
from imagen_fast.reference.attention import relative_position_bucket
from imagen_fast.testing import assert_as_accurate, assert_model_as_accurate

transformers = pytest.importorskip("transformers", reason="transformers is the truth of these tests")

SIZES = {"d_model": 48, "d_kv": 16, "d_ff": 80, "num_layers": 3, "num_heads": 4, "vocab_size": 200}

# Name of the kind -> (config, model). The full models have a decoder that must not be read.
KINDS = {
    "t5-relu": (transformers.T5Config, transformers.T5EncoderModel, {}),
    "t5-v1.1": (transformers.T5Config, transformers.T5EncoderModel, {"feed_forward_proj": "gated-gelu"}),
    "t5-v1.1-full": (
        transformers.T5Config,
        transformers.T5ForConditionalGeneration,
        {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 1, "tie_word_embeddings": False},
    ),
    "t5-gated-silu": (transformers.T5Config, transformers.T5EncoderModel, {"feed_forward_proj": "gated-silu"}),
    "t5-gelu": (transformers.T5Config, transformers.T5EncoderModel, {"feed_forward_proj": "gelu"}),
    "mt5": (transformers.MT5Config, transformers.MT5EncoderModel, {}),
    "mt5-full": (transformers.MT5Config, transformers.MT5ForConditionalGeneration, {"num_decoder_layers": 1}),
    "umt5": (transformers.UMT5Config, transformers.UMT5EncoderModel, {}),
    "umt5-full": (transformers.UMT5Config, transformers.UMT5ForConditionalGeneration, {"num_decoder_layers": 1}),
    "byt5-full": (
        transformers.T5Config,
        transformers.T5ForConditionalGeneration,
        {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 1, "vocab_size": 384},
    ),
    "umt5-relu": (transformers.UMT5Config, transformers.UMT5EncoderModel, {"feed_forward_proj": "relu"}),
    "other-buckets": (
        transformers.T5Config,
        transformers.T5EncoderModel,
        {"relative_attention_num_buckets": 12, "relative_attention_max_distance": 20, "layer_norm_epsilon": 1e-3},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are so small that a second thread only waits, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Kind -> (transformers class, directory with a random model of that kind)."""
    torch.manual_seed(0)
    directories = {}
    for kind, (config, model_class, options) in KINDS.items():
        model = model_class(config(**{**SIZES, **options}))
        for parameter in model.parameters():  # so that no norm weight is 1 and no bias tiny
            parameter.data += 0.1 * torch.randn_like(parameter)
        directories[kind] = (model_class, tmp_path_factory.mktemp(kind))
        model.save_pretrained(directories[kind][1])
    return directories


def load_theirs(saved, kind, dtype=torch.float32, attention="eager"):
    model_class, directory = saved[kind]
    return model_class.from_pretrained(directory, dtype=dtype, attn_implementation=attention).eval().get_encoder()


def padded_batch():
    """Sentences of 150 (every bucket), 70 and 1 tokens."""
    input_ids = torch.randint(3, 200, (3, 150), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(150) < torch.tensor([150, 70, 1])[:, None]
    return input_ids.where(mask, 0), mask


def assert_equal_to_round_off(ours, theirs):
    """Within 1e-5 of the largest value, in fp32: sums taken in another order differ by as much."""
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_equals_transformers_in_fp32(saved, kind, attention):
    input_ids, mask = padded_batch()
    theirs = load_theirs(saved, kind, attention=attention)(input_ids, attention_mask=mask.long()).last_hidden_state
    assert_equal_to_round_off(T5Encoder.from_pretrained(saved[kind][1])(input_ids, mask), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["t5-relu", "t5-v1.1", "umt5"])
@torch.no_grad()
def test_as_accurate_as_transformers_in_16_bits(saved, kind, dtype):
    input_ids, mask = padded_batch()
    model = load_theirs(saved, kind, dtype)
    theirs = model(input_ids, attention_mask=mask.long()).last_hidden_state
    truth = model.double()(input_ids, attention_mask=mask.long()).last_hidden_state
    ours = T5Encoder.from_pretrained(saved[kind][1], dtype)(input_ids, mask)
    assert ours.dtype == theirs.dtype == dtype
    assert_model_as_accurate(ours, theirs, truth)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_without_a_mask_every_token_is_attended(saved, attention):
    input_ids, _ = padded_batch()
    theirs = load_theirs(saved, "t5-v1.1", attention=attention)(input_ids).last_hidden_state
    encoder = T5Encoder.from_pretrained(saved["t5-v1.1"][1])
    assert_equal_to_round_off(encoder(input_ids), theirs)
    assert torch.equal(encoder(input_ids), encoder(input_ids, torch.ones_like(input_ids)))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_a_wholly_masked_sentence_is_that_of_transformers(saved, attention):
    input_ids, mask = padded_batch()
    mask[1] = False
    theirs = load_theirs(saved, "t5-v1.1", attention=attention)(input_ids, attention_mask=mask.long())
    ours = T5Encoder.from_pretrained(saved["t5-v1.1"][1])(input_ids, mask)
    assert_equal_to_round_off(ours, theirs.last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.no_grad()
def test_a_wholly_masked_sentence_is_finite_in_16_bits(saved, dtype):
    input_ids, mask = padded_batch()
    assert T5Encoder.from_pretrained(saved["t5-v1.1"][1], dtype)(input_ids, mask & False).isfinite().all()


@torch.no_grad()
def test_padding_does_not_change_a_sentence(saved):
    encoder = T5Encoder.from_pretrained(saved["t5-v1.1"][1])
    input_ids, mask = padded_batch()
    assert_equal_to_round_off(encoder(input_ids, mask)[1, :70], encoder(input_ids[1:2, :70])[0])


@pytest.mark.parametrize("all_fp16", [False, True], ids=["wo-in-fp32", "all-fp16"])
@pytest.mark.parametrize("kind", ["t5-relu", "umt5-relu"])
@torch.no_grad()
def test_fp16_overflow_is_clamped_as_in_transformers(saved, kind, all_fp16):
    """On sentences of one token, whose softmax is 1, and with ReLU, both compute the same bits until something differs
    in what happens to infinities."""
    input_ids = torch.arange(3, 103)[:, None]
    theirs = load_theirs(saved, kind, torch.float16)
    ours = T5Encoder.from_pretrained(saved[kind][1], torch.float16)
    # Attention overflows in the first block, the feed-forward part in the second.
    for weight in (
        theirs.block[0].layer[0].SelfAttention.o.weight,
        theirs.block[1].layer[1].DenseReluDense.wo.weight,
        ours.blocks[0].attention.o.weight,
        ours.blocks[1].ffn.wo.weight,
    ):
        weight *= 3e4
    if all_fp16:
        theirs, ours = theirs.half(), ours.half()
    overflows = count_overflows(ours)
    result = ours(input_ids)
    assert overflows["attention"] > 0, "the test must overflow in attention"
    assert (overflows["ffn"] > 0) == all_fp16, "the feed-forward part overflows unless its wo is in fp32"
    assert torch.equal(result, theirs(input_ids).last_hidden_state)
    assert result.isfinite().all()


def count_overflows(encoder):
    """A dictionary that counts the infinities in the outputs of attention and feed-forward parts."""
    counts = {"attention": 0, "ffn": 0}

    def count(part):
        def hook(module, arguments, output):
            counts[part] += int(output.isinf().sum())

        return hook

    for block in encoder.blocks:
        block.attention.register_forward_hook(count("attention"))
        block.ffn.register_forward_hook(count("ffn"))
    return counts


def test_clamp_leaves_finite_values_and_other_dtypes_alone():
    x = torch.tensor([1.0, 65504.0, -3.0], dtype=torch.float16)
    assert torch.equal(clamp_fp16(x), x)
    assert clamp_fp16(torch.tensor([float("inf")])).isinf()
    clamped = clamp_fp16(torch.tensor([float("-inf"), 65504.0, 2.0], dtype=torch.float16))
    assert clamped.tolist() == [-64512.0, 64512.0, 2.0]  # 65504 - 1000, rounded


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (64, 256)])
def test_buckets_are_those_of_transformers(buckets, distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-600, 601)
    theirs = T5Attention._relative_position_bucket(distances, True, buckets, distance)
    assert torch.equal(relative_position_bucket(distances, buckets, True, distance), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_rms_norm_with_large_mean(dtype):
    torch.manual_seed(0)
    norm = T5RMSNorm(512)
    norm.weight.data.normal_()
    x = (torch.randn(4, 7, 512) * 3 + 100).to(dtype)
    weight = norm.weight.data.to(dtype).double()
    truth = weight * x.double() / (x.double().square().mean(-1, keepdim=True) + norm.eps).sqrt()
    eager = torch.nn.functional.rms_norm(x, (512,), weight.to(dtype), norm.eps)
    assert_as_accurate(norm.to(dtype)(x), eager, truth)


@torch.no_grad()
def test_float64_is_computed_in_float64(saved):
    input_ids, mask = padded_batch()
    encoder = T5Encoder.from_pretrained(saved["t5-v1.1"][1])
    single, double = encoder(input_ids, mask), encoder.double()(input_ids, mask)
    assert double.dtype == torch.float64
    nudged = encoder.embedding.weight.data.mul_(1 + 1e-11)  # far below what fp32 would see
    assert nudged.dtype == torch.float64
    change = (encoder(input_ids, mask) - double).abs().max()
    assert 0 < change < 1e-8
    assert (single - double).abs().max() < 1e-4


def test_gradients_are_those_of_transformers(saved):
    input_ids, mask = padded_batch()
    theirs, ours = load_theirs(saved, "t5-v1.1"), T5Encoder.from_pretrained(saved["t5-v1.1"][1])
    weight = torch.randn(3, 150, SIZES["d_model"], generator=torch.Generator().manual_seed(2))
    (theirs(input_ids, attention_mask=mask.long()).last_hidden_state * weight).sum().backward()
    (ours(input_ids, mask) * weight).sum().backward()
    pairs = {
        "embedding": (ours.embedding, theirs.embed_tokens),
        "q": (ours.blocks[1].attention.q, theirs.block[1].layer[0].SelfAttention.q),
        "table": (
            ours.blocks[0].attention.relative_bias,
            theirs.block[0].layer[0].SelfAttention.relative_attention_bias,
        ),
        "wo": (ours.blocks[2].ffn.wo, theirs.block[2].layer[1].DenseReluDense.wo),
        "norm": (ours.final_norm, theirs.final_layer_norm),
    }
    for name, (our_module, their_module) in pairs.items():
        expected = their_module.weight.grad
        torch.testing.assert_close(
            our_module.weight.grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()), msg=name
        )


def test_initial_deviations_are_those_of_transformers():
    config = T5Config(vocab_size=384, d_model=256, d_kv=32, d_ff=512, num_layers=1, num_heads=4)
    torch.manual_seed(0)
    ours = T5Encoder(config)
    theirs = transformers.T5EncoderModel(transformers.T5Config(**config.to_huggingface())).encoder
    layers = theirs.block[0].layer
    block = ours.blocks[0]
    pairs = {
        "embedding": (ours.embedding, theirs.embed_tokens),
        **{name: (getattr(block.attention, name), getattr(layers[0].SelfAttention, name)) for name in "qkvo"},
        **{
            name: (getattr(block.ffn, name), getattr(layers[1].DenseReluDense, name)) for name in ("wi_0", "wi_1", "wo")
        },
        "table": (block.attention.relative_bias, layers[0].SelfAttention.relative_attention_bias),
    }
    for name, (our_module, their_module) in pairs.items():
        ratio = our_module.weight.std().item() / their_module.weight.std().item()
        assert 0.8 < ratio < 1.25, f"{name}: deviation {ratio:.2f} times that of transformers"


def test_dropout_acts_in_training_mode_alone():
    torch.manual_seed(0)
    encoder = T5Encoder(T5Config(**SIZES, dropout_rate=0.5))
    input_ids, mask = padded_batch()
    assert not torch.equal(encoder(input_ids, mask), encoder(input_ids, mask))
    encoder.eval()
    assert torch.equal(encoder(input_ids, mask), encoder(input_ids, mask))


def test_trains_under_autocast():
    torch.manual_seed(0)
    encoder = T5Encoder(T5Config(**SIZES, dropout_rate=0.0))
    input_ids, mask = padded_batch()
    plain = encoder(input_ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = encoder(input_ids, mask)
    mixed.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())
    assert (mixed - plain).norm() < 0.03 * plain.norm()


def test_compiles_to_one_graph_for_every_length():
    torch.manual_seed(0)
    encoder = T5Encoder(T5Config(**{**SIZES, "num_layers": 1})).eval()
    compiled = torch.compile(encoder, fullgraph=True, dynamic=True, backend="eager")
    input_ids, mask = padded_batch()
    for length in (9, 40):
        torch.testing.assert_close(
            compiled(input_ids[:, :length], mask[:, :length]), encoder(input_ids[:, :length], mask[:, :length])
        )


def test_xxl_has_its_published_size():
    with torch.device("meta"):
        encoder = T5Encoder(T5Config.preset("xxl"))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 4_762_310_656


@pytest.mark.parametrize("shape", [(0, 7), (2, 0)], ids=["no-sentence", "no-token"])
def test_empty_batches(shape):
    encoder = T5Encoder(T5Config(**SIZES)).eval()
    assert encoder(torch.zeros(shape, dtype=torch.int64), torch.ones(shape)).shape == (*shape, SIZES["d_model"])


@pytest.mark.parametrize(
    ("input_ids", "mask", "error", "message"),
    [
        (torch.zeros(2, 3), None, TypeError, "input_ids must be int64 or int32, got torch.float32"),
        (torch.zeros(3, dtype=torch.int64), None, ValueError, r"input_ids must be \(batch, length\), got shape \(3,\)"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            torch.ones(2, 4),
            ValueError,
            r"shape of input_ids, \(2, 3\), got \(2, 4",
        ),
    ],
    ids=["dtype", "rank", "mask-shape"],
)
def test_wrong_input_is_named(input_ids, mask, error, message):
    with pytest.raises(error, match=message):
        T5Encoder(T5Config(**SIZES))(input_ids, mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0}, "d_model must be at least 1"),
        ({"feed_forward_proj": "gated-swish"}, "feed_forward_proj must be one of relu, .*'gated-swish'"),
        ({"relative_attention_num_buckets": 7}, "relative_attention_num_buckets must be even"),
        ({"relative_attention_max_distance": 8}, "relative_attention_max_distance must be above 8"),
        ({"dropout_rate": 1.0}, "dropout_rate must lie in"),
        ({"eos_token_id": 32128}, "eos_token_id must lie in"),
    ],
    ids=["size", "activation", "buckets", "distance", "dropout", "eos"],
)
def test_wrong_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        T5Config(**options)


def test_unknown_preset_is_named():
    with pytest.raises(ConfigError, match=r"unknown T5 preset 'huge'; known: tiny_bytes, small, base"):
        T5Config.preset("huge")
