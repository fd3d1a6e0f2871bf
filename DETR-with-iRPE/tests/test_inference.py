"""PyTorch's encoder layers with our attention give the same results in training and inference, where PyTorch tries to
skip the attention's `forward`."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn

from fill import image
from models.rpe_attention import RPEMultiheadAttention
from models.rpe_attention.irpe import get_rpe_config

LENGTH, CHANNELS, HEADS = 9, 16, 4
CONFIG = get_rpe_config(2.0, "product", "ctx", shared_head=False, skip=0, rpe_on="qkv")
PADDING = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [6]])
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
LAYER_MASKS = {
    "no mask": {},
    "padding": {"src_key_padding_mask": PADDING},
    "pairs": {"src_mask": CAUSAL},
    "both": {"src_mask": CAUSAL, "src_key_padding_mask": PADDING},
    "floats": {"src_key_padding_mask": torch.zeros(2, LENGTH).masked_fill(PADDING, -1.5)},
}


def with_attention(layer, rpe_config):
    """Replace the layer's attention by ours, with random weights and tables and without dropout."""
    old = layer.self_attn
    layer.self_attn = RPEMultiheadAttention(
        CHANNELS, HEADS, bias=old.in_proj_bias is not None, batch_first=old.batch_first, rpe_config=rpe_config
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return layer


def make_layer(rpe_config=CONFIG, batch_first=True, **arguments):
    layer = nn.TransformerEncoderLayer(CHANNELS, HEADS, 32, dropout=0.0, batch_first=batch_first, **arguments)
    return with_attention(layer, rpe_config)


def make_stack(**arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch warns that it does not use nested tensors
        return nn.TransformerEncoder(make_layer(**arguments), 2)


def tokens(batch_first=True):
    x = image(1, (2, LENGTH, CHANNELS))
    return x if batch_first else x.transpose(0, 1).contiguous()


def assert_same_at_inference(module, x, **masks):
    """Compare the results in training and evaluation mode, with and without gradients, and return them."""
    expected = module.train()(x, **masks)
    module.eval()
    torch.testing.assert_close(module(x, **masks), expected)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(module(x, **masks), expected.detach())
    return expected.detach()


@pytest.mark.parametrize("masks", LAYER_MASKS.values(), ids=LAYER_MASKS)
@pytest.mark.parametrize("rpe_config", [CONFIG, None], ids=["iRPE", "plain"])
@pytest.mark.parametrize("make", [make_layer, make_stack])
def test_an_encoder_gives_the_same_results_in_training_and_inference(make, rpe_config, masks):
    if make is make_stack:
        masks = {name.replace("src_mask", "mask"): mask for name, mask in masks.items()}
    assert_same_at_inference(make(rpe_config=rpe_config), tokens(), **masks)


@pytest.mark.parametrize("make", [make_layer, make_stack])
@pytest.mark.parametrize("norm_first, bias, batch_first", list(itertools.product([False, True], repeat=3)))
def test_every_kind_of_layer_gives_the_same_results_in_training_and_inference(make, norm_first, bias, batch_first):
    module = make(norm_first=norm_first, bias=bias, batch_first=batch_first)
    assert_same_at_inference(module, tokens(batch_first), src_key_padding_mask=PADDING)


def test_the_lookup_tables_affect_the_results_of_these_tests():
    layer = make_layer()
    expected = assert_same_at_inference(layer, tokens())
    for name, parameter in layer.named_parameters():
        if "lookup_table" in name:
            nn.init.zeros_(parameter)
    assert (layer(tokens()) - expected).abs().max() > 0.1


def test_copies_and_pickled_layers_keep_the_encoding_at_inference():
    layer = make_layer()
    expected = assert_same_at_inference(layer, tokens())
    pickled_before = copy.deepcopy(layer)
    vars(pickled_before.self_attn)["_qkv_same_embed_dim"] = True  # as in modules pickled by older versions
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), pickle.loads(pickle.dumps(pickled_before))):
        torch.testing.assert_close(assert_same_at_inference(copied, tokens()), expected)
    layer.self_attn._reset_parameters()  # PyTorch's initialization must still find the weights
    assert_same_at_inference(layer, tokens())


@pytest.mark.parametrize("make", [make_layer, make_stack])
def test_compiled_encoders_keep_the_encoding_at_inference(make):
    module = make()
    expected = assert_same_at_inference(module, tokens(), src_key_padding_mask=PADDING)
    compiled = torch.compile(module, backend="eager")
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(compiled(tokens(), src_key_padding_mask=PADDING), expected, check_stride=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_encoders_of_other_types_keep_the_encoding_at_inference(dtype):
    assert_same_at_inference(make_stack().to(dtype), tokens().to(dtype), src_key_padding_mask=PADDING)


def test_an_encoder_under_autocast_keeps_the_encoding_at_inference():
    module = make_stack()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_at_inference(module, tokens(), src_key_padding_mask=PADDING)


def test_attention_alone_and_in_a_decoder_layer_gives_the_same_results_in_inference():
    attention = make_layer().self_attn
    memory = image(2, (2, 5, CHANNELS))
    decoder = with_attention(nn.TransformerDecoderLayer(CHANNELS, HEADS, 32, dropout=0.0, batch_first=True), CONFIG)
    for run in (
        lambda x: attention(x, x, x, key_padding_mask=PADDING, need_weights=False)[0],
        lambda x: attention(x, x, x)[0],
        lambda x: decoder(x, memory, tgt_key_padding_mask=PADDING),
    ):
        attention.train(), decoder.train()
        expected = run(tokens())
        attention.eval(), decoder.eval()
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(run(tokens()), expected)


@pytest.mark.parametrize("rpe_config", [CONFIG, None], ids=["iRPE", "plain"])
def test_an_encoder_whose_attention_was_replaced_later_rejects_nested_tensors(rpe_config):
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(CHANNELS, HEADS, 32, dropout=0.0, batch_first=True), 2)
    for layer in stack.layers:
        with_attention(layer, rpe_config)
    assert_same_at_inference(stack, tokens())
    stack.eval()
    with torch.no_grad(), pytest.raises(ValueError, match="nested tensor.*use_nested_tensor=False"):
        stack(tokens(), src_key_padding_mask=PADDING)
    stack.use_nested_tensor = False
    assert_same_at_inference(stack, tokens(), src_key_padding_mask=PADDING)
