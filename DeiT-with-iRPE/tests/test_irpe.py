"""irpe.py against the golden numbers, brute force and the ways in which a module is used."""

import copy
import hashlib
import io
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import irpe
from fill import fill_state_dict, image
from irpe import METHOD, build_rpe, get_bucket_ids_2d, get_rpe_config, iRPE, piecewise_index, rpe_attention

GOLDEN = Path(__file__).parent / "golden"
METHODS = ("euc", "quant", "cross", "product")


def only_module(modules):
    (module,) = (module for module in modules if module is not None)
    return module


def fill(module, prefix=""):
    module.load_state_dict(fill_state_dict(module.state_dict(), prefix))
    return module


# --- buckets ---------------------------------------------------------------------------------------------------------


def test_bucket_ids_equal_the_golden_ones():
    for case in json.loads((GOLDEN / "buckets.json").read_text()):
        ratio = case["ratio"]
        ids, num_buckets = get_bucket_ids_2d(
            case["method"], case["height"], case["width"], case["skip"], ratio, 2 * ratio, 8 * ratio
        )
        assert num_buckets == case["num_buckets"], case
        assert (ids.min(), ids.max()) == (case["min"], case["max"]), case
        assert hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest() == case["sha256"], case


@pytest.mark.parametrize("ratio", [0.5, 1.9, 2.0, 20])
def test_piecewise_index_is_its_formula_for_scalars(ratio):
    alpha, beta, gamma = ratio, 2 * ratio, 8 * ratio
    x = torch.arange(-60, 61)
    for value, index in zip(x.tolist(), piecewise_index(x, alpha, beta, gamma, torch.long).tolist(), strict=True):
        expected = abs(value)
        if expected > alpha:
            expected = min(round(alpha + math.log(expected / alpha) / math.log(gamma / alpha) * (beta - alpha)), beta)
        assert index == int(math.copysign(expected, value))


def test_transposed_pair_has_the_mirrored_product_bucket():
    ids, num_buckets = get_bucket_ids_2d("product", 5, 7, 0, 1.9, 3.8, 15.2)
    assert torch.equal(ids + ids.T, torch.full_like(ids, num_buckets - 1))


def test_method_members_and_short_names_mean_the_same():
    for member in METHOD:
        if member is not METHOD.CROSS:
            by_name = get_bucket_ids_2d(member.value, 4, 3, 1, 1.9, 3.8, 15.2)
            by_member = get_bucket_ids_2d(member, 4, 3, 1, 1.9, 3.8, 15.2)
            assert torch.equal(by_name[0], by_member[0]) and by_name[1] == by_member[1]
    with pytest.raises(ValueError, match="cross_rows"):
        get_bucket_ids_2d("cross", 4, 3, 1, 1.9, 3.8, 15.2)


# --- single modules --------------------------------------------------------------------------------------------------


def unit_id(case):
    return "-".join(str(case[key]) for key in ("method", "mode", "shared_head", "rpe_on", "ratio", "height", "skip"))


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("case", json.loads((GOLDEN / "irpe_unit.json").read_text()), ids=unit_id)
def test_module_output_and_gradients_equal_the_golden_ones(case):
    config = get_rpe_config(*(case[key] for key in ("ratio", "method", "mode", "shared_head", "skip", "rpe_on")))
    module = fill(only_module(build_rpe(config, case["D"], case["H"])), "unit.")
    assert {name: list(p.shape) for name, p in module.named_parameters()} == case["parameters"]
    on_values, length = case["rpe_on"] == "v", case["height"] * case["width"] + case["skip"]
    x = image(case["seed"], (case["B"], case["H"], length, length if on_values else case["D"]))
    x = (x.softmax(-1) if on_values else x).requires_grad_()
    y = module(x, case["height"], case["width"])
    (y * image(case["seed"] + 1, tuple(y.shape))).sum().backward()

    def check(tensor, norm, head, tail):
        flat = tensor.detach().flatten()
        assert flat.double().norm().item() == pytest.approx(norm, rel=1e-5)
        ends = torch.cat([flat[:6], flat[-6:]])
        assert (ends - torch.tensor(head[:6] + tail[-6:])).abs().max() <= 1e-5 * flat.abs().max()

    assert list(y.shape) == case["shape"]
    check(y, case["out_norm"], case["out_head"], case["out_tail"])
    for name, parameter in module.named_parameters():
        check(parameter.grad, *(case["grad"][name][key] for key in ("norm", "head", "tail")))
    if case["grad_x_norm"] is not None:
        assert x.grad.double().norm().item() == pytest.approx(case["grad_x_norm"], rel=1e-5)


def brute_force_attention(q, k, v, modules, height, width, skip, rotated=None):
    """Float64 loops over the formulas of the paper, with ids computed pair by pair from the positions.

    `rotated`: the queries and keys that make the content's logits, if they are not those of the terms.
    """
    q, k, v = q.double(), k.double(), v.double()
    B, H, L, D = q.shape
    content_q, content_k = rotated or (q, k)
    logits = content_q.double() @ content_k.double().transpose(-2, -1) * D**-0.5
    q, k_scaled = q * D**-0.5, k * D**-0.5
    terms = []  # (place, module, ids)
    for place, module in zip("qkv", modules, strict=True):
        parts = [] if module is None else [module] if isinstance(module, iRPE) else [module.rp_rows, module.rp_cols]
        for part in parts:
            ids, _ = get_bucket_ids_2d(part.method, height, width, skip, *part.config.piecewise)
            terms.append((place, part, ids))
    for h, i, j in itertools.product(range(H), range(L), range(L)):
        for place, part, ids in terms:
            if place == "v":
                continue
            bucket = ids[i, j] if place == "k" else ids[j, i]
            table = next(part.parameters()).double()
            table = table[h if len(table) > 1 else 0]
            x = q[:, h, i] if place == "k" else k_scaled[:, h, j]
            logits[:, h, i, j] += table[bucket] if table.ndim == 1 else x @ table[:, bucket]
    attn = logits.softmax(-1)
    out = attn @ v
    for h, i, j in itertools.product(range(H), range(L), range(L)):
        for place, part, ids in terms:
            if place == "v":
                table = part.lookup_table_weight.double()
                out[:, h, i] += attn[:, h, i, j, None] * table[h if len(table) > 1 else 0][ids[i, j]]
    return out


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode, rpe_on", [("bias", "q"), ("bias", "qk"), *(("ctx", on) for on in irpe._RPE_ON)])
@pytest.mark.parametrize("shared_head, skip", [(True, 1), (False, 0)])
def test_attention_equals_brute_force_on_an_oblong_map(method, mode, rpe_on, shared_head, skip):
    height, width, H, D = 2, 4, 2, 4
    config = get_rpe_config(1.9, method, mode, shared_head, skip, rpe_on)
    modules = [module and fill(module, f"{i}.") for i, module in enumerate(build_rpe(config, D, H))]
    q, k, v = image(5, (3, 2, H, height * width + skip, D))
    out = rpe_attention(q, k, v, *modules, height, width)
    expected = brute_force_attention(q, k, v, modules, height, width, skip)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("rpe_on", ["k", "qkv"])
def test_bool_and_additive_masks_hide_the_same_keys(rpe_on):
    modules = [module and fill(module) for module in build_rpe(get_rpe_config(rpe_on=rpe_on), 4, 2)]
    q, k, v = image(6, (3, 2, 2, 9, 4))
    seen = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    seen[0, ..., 6:] = False
    with_bool = rpe_attention(q, k, v, *modules, attn_mask=seen)
    with_float = rpe_attention(q, k, v, *modules, attn_mask=torch.zeros(2, 1, 1, 9).masked_fill(~seen, -math.inf))
    torch.testing.assert_close(with_bool, with_float)
    changed = v.clone()
    changed[0, :, 6:] += 100  # what is hidden does not matter
    torch.testing.assert_close(rpe_attention(q, k, changed, *modules, attn_mask=seen), with_bool)


def test_a_query_that_may_see_nothing_gets_zeros():
    seen = torch.ones(9, 9, dtype=torch.bool)
    seen[4] = False
    for rpe_on in ("k", "qkv"):
        q, k, v = image(6, (3, 1, 2, 9, 4)).requires_grad_()
        out = rpe_attention(q, k, v, *build_rpe(get_rpe_config(rpe_on=rpe_on), 4, 2), attn_mask=seen)
        assert out[:, :, 4].abs().max() == 0 and out[:, :, 3].abs().min() > 0
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.square().sum(), (q, v)))


@pytest.mark.usefixtures("operators")
def test_attention_passes_gradcheck():
    modules = [fill(module).double() for module in build_rpe(get_rpe_config(rpe_on="qkv", skip=1), 3, 2)]
    tables = [p for module in modules for p in module.parameters()]
    q, k, v = (x.double().requires_grad_() for x in image(7, (3, 1, 2, 5, 3)))
    assert torch.autograd.gradcheck(lambda q, k, v, *_: rpe_attention(q, k, v, *modules), (q, k, v, *tables))


def test_dropout_hides_attention_from_the_value_term_too():
    modules = build_rpe(get_rpe_config(rpe_on="v"), 4, 2)
    fill(modules[2])
    q, k, v = image(8, (3, 2, 2, 9, 4))
    assert rpe_attention(q, k, v, *modules, dropout_p=1.0).abs().max() == 0


def calls_of(hook):
    """How often a hook that `hook` registers on a module is called in training."""
    calls = []
    modules = build_rpe(get_rpe_config(rpe_on="qk", method="cross"), 4, 2)
    handle = hook(modules[0].rp_rows, lambda *_: calls.append(1))
    rpe_attention(*image(6, (3, 1, 2, 9, 4)).requires_grad_(), *modules).sum().backward()
    if handle:
        handle.remove()
    return len(calls)


@pytest.mark.parametrize(
    "hook",
    [
        lambda module, call: module.register_forward_hook(call),
        lambda module, call: module.register_forward_pre_hook(call),
        lambda module, call: module.register_full_backward_hook(call),
        lambda module, call: module.register_full_backward_pre_hook(call),
        lambda module, call: setattr(module, "forward", lambda *args: call() or type(module).forward(module, *args)),
    ],
)
def test_whoever_hooks_a_module_is_called(hook):
    assert calls_of(hook) == 1


def test_global_hooks_and_terms_of_ones_own_are_called():
    assert calls_of(lambda _, call: torch.nn.modules.module.register_module_forward_hook(call)) == 6

    class Own(torch.nn.Module):
        def forward(self, x, height, width):
            return 100 * torch.eye(x.shape[-2]).expand(*x.shape[:2], -1, -1).contiguous()

    q, k, v = image(6, (3, 1, 2, 9, 4))
    torch.testing.assert_close(rpe_attention(q, k, v, rpe_k=Own()), v)


@pytest.mark.usefixtures("operators")
def test_autocast_and_half_types_give_their_type():
    modules = [fill(module) for module in build_rpe(get_rpe_config(rpe_on="qkv"), 4, 2)]
    q, k, v = image(6, (3, 1, 2, 9, 4))
    expected = rpe_attention(q, k, v, *modules)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = rpe_attention(q, k, v, *modules)
    half = rpe_attention(*(x.bfloat16() for x in (q, k, v)), *(module.bfloat16() for module in modules))
    for out in (autocast, half):
        assert out.dtype == torch.bfloat16
        assert (out - expected).abs().max() <= 2**-5 * expected.abs().max()


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize(("rpe_on", "mode"), [("k", "contextual"), ("k", "bias"), ("qkv", "contextual")])
def test_torch_func_gives_the_gradients_of_autograd(rpe_on, mode):
    modules = [module and fill(module) for module in build_rpe(get_rpe_config(mode=mode, rpe_on=rpe_on), 4, 2)]
    holder = torch.nn.ModuleList(module for module in modules if module is not None)
    tables = dict(holder.named_parameters())
    q, k, v = image(6, (3, 5, 2, 9, 4))

    def loss(tables, q, k, v):
        with torch.nn.utils.stateless._reparametrize_module(holder, tables):
            return rpe_attention(q[None], k[None], v[None], *modules).square().sum()

    def assert_equal_to_autograd(found, its_tables, i):
        expected = torch.autograd.grad(loss(its_tables, q[i], k[i], v[i]), its_tables.values())
        torch.testing.assert_close(found, expected)

    of_images = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(tables, q, k, v)
    stacked = {name: torch.stack([table * (i + 1) for i in range(5)]).detach() for name, table in tables.items()}
    for table in stacked.values():
        table.requires_grad_()
    of_models = torch.autograd.grad(torch.vmap(loss)(stacked, q, k, v).sum(), stacked.values())
    for i in range(5):
        assert_equal_to_autograd(tuple(gradient[i] for gradient in of_images.values()), tables, i)
        its_tables = {name: table[i].detach().requires_grad_() for name, table in stacked.items()}
        assert_equal_to_autograd(tuple(gradient[i] for gradient in of_models), its_tables, i)
    torch.testing.assert_close(torch.func.grad(loss)(tables, q[0], k[0], v[0]), {n: g[0] for n, g in of_images.items()})


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize(
    "rpe_on, method, shared_head", [("k", "product", True), ("qkv", "cross", False), ("qv", "euc", True)]
)
def test_masks_are_those_of_the_composed_attention_and_dropout_acts(rpe_on, method, shared_head, monkeypatch):
    config = get_rpe_config(1.9, method, "ctx", shared_head, 1, rpe_on)
    modules = [module and fill(module, f"{i}.").double() for i, module in enumerate(build_rpe(config, 4, 2))]
    tables = [p for module in modules if module for p in module.parameters()]
    q, k, v = image(3, (3, 3, 2, 11, 4)).double().requires_grad_()
    masks = (None, torch.arange(11) < torch.tensor([8, 11, 3])[:, None, None, None], image(4, (11, 11)).double())
    for mask in masks:
        found = []
        for takes in (None, lambda *_: False):
            if takes and irpe.HAS_RPE_OPS:
                monkeypatch.setattr(irpe.rpe_ops, "attention_takes", takes)
            out = rpe_attention(q, k, v, *modules, 2, 5, mask)
            found.append([out, *torch.autograd.grad((out * v.detach()).sum(), (q, k, v, *tables))])
        monkeypatch.undo()
        torch.testing.assert_close(*found)
    ones = rpe_attention(q, k, torch.ones_like(v), *modules, 2, 5, dropout_p=0.3)
    assert ones.std() > 0.01


@pytest.mark.usefixtures("operators")
def test_the_public_tutorials_own_way_is_rpe_attention():
    """build_rpe's modules called one by one inside somebody's attention, as users of the public code do."""
    rpe_q, rpe_k, rpe_v = modules = [fill(m) for m in build_rpe(get_rpe_config(skip=1, rpe_on="qkv"), 8, 2)]
    q, k, v = image(6, (3, 2, 2, 10, 8))
    scale = 8**-0.5
    scaled = q * scale
    attn = scaled @ k.transpose(-2, -1)
    attn += rpe_k(scaled)
    attn += rpe_q(k * scale).transpose(2, 3)
    attn = attn.softmax(dim=-1)
    out = attn @ v
    out += rpe_v(attn)
    torch.testing.assert_close(out, rpe_attention(q, k, v, *modules))


# --- use of a module -------------------------------------------------------------------------------------------------


@pytest.fixture
def module():
    return fill(only_module(build_rpe(get_rpe_config(skip=1), 8, 2)))


def test_one_module_sees_several_maps_in_turn(module):
    for height, width in ((3, 3), (2, 5), (5, 2), (3, 3)):
        x = image(1, (1, 2, height * width + 1, 8))
        ids, _ = get_bucket_ids_2d("product", height, width, 1, 1.9, 3.8, 15.2)
        expected = (x @ module.lookup_table_weight).gather(-1, ids.expand(1, 2, -1, -1))
        torch.testing.assert_close(module(x, height, width), expected)


def test_bucket_ids_are_shared_by_layers_and_not_in_the_state_dict(module):
    other = only_module(build_rpe(get_rpe_config(skip=1, rpe_on="v"), 8, 2))
    device = torch.device("cpu")
    assert module.bucket_ids(10, device).data_ptr() == other.bucket_ids(10, device).data_ptr()
    assert list(module.state_dict()) == ["lookup_table_weight"]


def test_a_copy_and_a_saved_module_compute_the_same(module):
    x = image(2, (1, 2, 10, 8))
    expected = module(x)
    torch.testing.assert_close(copy.deepcopy(module)(x), expected)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(x), expected)


def test_ids_follow_the_module_to_another_device(module):
    assert module.to("meta")(torch.empty(1, 2, 10, 8, device="meta")).device.type == "meta"


@pytest.mark.usefixtures("operators")
def test_ids_first_made_in_inference_mode_serve_training():
    module = only_module(build_rpe(get_rpe_config(ratio=1.7), 4, 1))
    x = image(3, (1, 1, 9, 4))
    with torch.inference_mode():
        module(x)
    module(x).sum().backward()
    assert module.lookup_table_weight.grad.abs().sum() > 0


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("method", ["product", "cross"])
@pytest.mark.parametrize("rpe_on", ["k", "qkv"])
def test_torch_compile_takes_the_whole_graph(method, rpe_on):
    config = get_rpe_config(method=method, skip=1, rpe_on=rpe_on)
    modules = [module and fill(module) for module in build_rpe(config, 8, 2)]
    q, k, v = image(4, (3, 2, 2, 10, 8))
    compiled = torch.compile(lambda q, k, v: rpe_attention(q, k, v, *modules), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), rpe_attention(q, k, v, *modules))


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize(("dynamic", "oblong"), [(None, True), (True, True), (True, False)])
def test_torch_compile_follows_the_map_size(dynamic, oblong):
    modules = [fill(module) for module in build_rpe(get_rpe_config(skip=1, rpe_on="qkv"), 8, 2)]

    def attend(q, k, v, *size):
        return rpe_attention(q, k, v, *modules, *size)

    torch._dynamo.reset()  # other tests' graphs count towards its limit
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for height, width in ((3, 3), (2, 5), (5, 2), (4, 6)) if oblong else ((3, 3), (4, 4), (5, 5), (2, 2)):
        q, k, v = image(4, (3, 2, 2, height * width + 1, 8))
        size = (height, width) if oblong else ()
        torch.testing.assert_close(compiled(q, k, v, *size), attend(q, k, v, *size))


@pytest.mark.usefixtures("operators")
def test_torch_export_makes_the_ids_constants_and_leaves_later_calls_alone():
    module = fill(only_module(build_rpe(get_rpe_config(ratio=1.6), 4, 1)))
    x = image(9, (2, 1, 9, 4))
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x))
    assert not any(node.target is torch.ops.aten.log.default for node in program.graph.nodes)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("rpe_on", ["qk", "v"])
def test_half_precision_sums_in_float32(rpe_on):
    module = fill([m for m in build_rpe(get_rpe_config(rpe_on=rpe_on), 4, 1) if m][0]).bfloat16()
    x = image(1, (1, 1, 49, 49 if rpe_on == "v" else 4)).abs().softmax(-1).bfloat16()
    expected = copy.deepcopy(module).double()(x.double())
    assert module(x).dtype == torch.bfloat16
    assert (module(x) - expected).abs().max() <= 2**-7 * expected.abs().max()


def test_tables_start_at_zero_and_attention_without_tables_is_plain():
    q, k, v = image(4, (3, 2, 2, 9, 8))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for rpe_on in ("k", "qkv"):
        torch.testing.assert_close(rpe_attention(q, k, v, *build_rpe(get_rpe_config(rpe_on=rpe_on), 8, 2)), plain)
    torch.testing.assert_close(rpe_attention(q, k, v, *build_rpe(None, 8, 2)), plain)


@pytest.mark.parametrize(
    "wrong, named",
    [
        (dict(method="products"), "product"),
        (dict(mode="context"), "ctx"),
        (dict(rpe_on="vk"), "kv"),
        (dict(shared_head="yes"), "True"),
        (dict(ratio=0), "above 0"),
        (dict(ratio="1.9"), "above 0"),
        (dict(skip=-1), "prefix tokens"),
        (dict(mode="bias", rpe_on="qkv"), "bias on values"),
        (dict(mode="bias", rpe_on="v"), "bias on values"),
    ],
)
def test_wrong_configuration_names_what_is_allowed(wrong, named):
    with pytest.raises(ValueError, match=named):
        get_rpe_config(**wrong)


def test_length_that_disagrees_with_skip_names_the_skip_to_set():
    module = only_module(build_rpe(get_rpe_config(skip=0), 4, 1))
    with pytest.raises(ValueError, match=r"197 tokens on a map of 14×14.*set skip=1"):
        module(torch.zeros(1, 1, 197, 4))
    with pytest.raises(ValueError, match=r"12 tokens on a map of 2×5.*set skip=2"):
        module(torch.zeros(1, 1, 12, 4), 2, 5)
    class_token = only_module(build_rpe(get_rpe_config(skip=1), 4, 1))
    with pytest.raises(ValueError, match=r"196 tokens on a map of 14×14.*set skip=0"):
        class_token(torch.zeros(1, 1, 196, 4))


@pytest.mark.parametrize(
    ("length", "skip", "map_size", "words"),
    [
        (8 * 14 * 14, 0, (), "1568 tokens do not form a square map.*fold a video's frames"),
        (1 + 8 * 14 * 14, 1, (), r"1569 tokens do not form a square map.*skip=1.*give the height and width"),
        (8 * 14 * 14, 0, (14, 14), "1568 tokens do not form a map of 14×14.*fold a video's frames"),
        (10 * 15, 0, (), "150 tokens do not form a square map.*give the height and width"),
        (49, 1, (7, 7), "49 tokens on a map of 7×7 leave 0 prefix tokens.*set skip=0"),
        (3, 0, (2, 2), "3 tokens do not form a map of 2×2"),
        (0, 0, (), "0 tokens do not form a square map"),
        (1, 1, (), "1 tokens on a map of 1×1 leave 0 prefix tokens.*set skip=0"),
        (4, 5, (), "4 tokens on a map of 2×2 leave 0 prefix tokens.*set skip=0"),
    ],
)
def test_tokens_that_form_no_map_get_no_advice_that_cannot_be_right(length, skip, map_size, words):
    module = only_module(build_rpe(get_rpe_config(skip=skip), 4, 1))
    with pytest.raises(ValueError, match=words) as error:
        module.bucket_ids(length, "cpu", *map_size)
    assert ("set skip=" in str(error.value)) == ("set skip=" in words)


@pytest.mark.parametrize(
    ("height", "width", "words"),
    [
        (7.0, 7, "height is 7.0; it must be a whole number"),
        (7, "7", "width is '7'; it must be a whole number"),
        (-7, -7, "height is -7"),
        (7, 0, "width is 0"),
        (7, None, "give both"),
        (None, 7, "give both"),
    ],
)
def test_sizes_that_are_no_sizes_are_refused(height, width, words):
    rpe_k = only_module(build_rpe(get_rpe_config(), 4, 1))
    for run in (
        lambda: rpe_k(torch.zeros(1, 1, 49, 4), height, width),
        lambda: rpe_attention(*torch.zeros(3, 1, 1, 49, 4), None, rpe_k, None, height, width),
    ):
        with pytest.raises(ValueError, match=words):
            run()


def test_the_square_map_is_what_the_prefix_tokens_leave():
    module = only_module(build_rpe(get_rpe_config(skip=5), 4, 1))
    torch.testing.assert_close(module.bucket_ids(9, "cpu"), module.bucket_ids(9, "cpu", 2, 2))


@pytest.mark.parametrize("with_rpe_ops", [True, False])
@pytest.mark.parametrize("rpe_on", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 4, 9, 8), (2, 4, 16, 8), (2, 4, 16, 8)],  # cross-attention
        [(2, 4, 9, 8), (2, 4, 9, 8), (2, 4, 16, 8)],
        [(2, 4, 9, 8), (3, 4, 9, 8), (3, 4, 9, 8)],
        [(2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8)],  # grouped queries
        [(2, 4, 9, 8), (2, 4, 9, 4), (2, 4, 9, 8)],
        [(2, 9, 8)] * 3,
    ],
)
def test_attention_between_tokens_of_two_maps_is_refused(shapes, rpe_on, with_rpe_ops, monkeypatch):
    monkeypatch.setattr(irpe, "HAS_RPE_OPS", irpe.HAS_RPE_OPS and with_rpe_ops)
    modules = build_rpe(get_rpe_config(rpe_on=rpe_on), 8, 4)
    with pytest.raises(ValueError, match="self-attention on one map") as error:
        rpe_attention(*map(torch.zeros, shapes), *modules)
    assert ", ".join(map(str, shapes)) in str(error.value)


def test_keys_and_values_that_all_heads_share_are_those_of_every_head():
    modules = [fill(module) for module in build_rpe(get_rpe_config(shared_head=False, rpe_on="qkv"), 8, 4)]
    q, k, v = image(1, (2, 4, 9, 8)), image(2, (2, 1, 9, 8)), image(3, (2, 1, 9, 8))
    torch.testing.assert_close(
        rpe_attention(q, k, v, *modules), rpe_attention(q, k.expand_as(q), v.expand_as(q), *modules)
    )


def test_without_modules_cross_attention_is_pytorchs():
    q, k, v = image(1, (2, 4, 9, 8)), image(2, (2, 4, 16, 8)), image(3, (2, 4, 16, 8))
    torch.testing.assert_close(rpe_attention(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v))


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("method", ["product", "cross"])
def test_scripting_says_which_ways_there_are_instead(method):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), only_module(build_rpe(get_rpe_config(method=method), 4, 1)))
    with pytest.raises(RuntimeError, match="torch.jit.trace, torch.export or torch.compile"):
        torch.jit.script(model)


# --- Masks with aligned rows, as a GPU gets them ---------------------------------------------------------------------


def is_aligned(mask):
    return mask.stride(-1) == 1 and all(stride % 16 == 0 for stride in mask.stride()[:-1])


@pytest.mark.parametrize("mask", [None, "padding", "causal"])
@pytest.mark.parametrize("mode", ["ctx", "bias"])
@pytest.mark.parametrize("method", ["product", "cross"])
@pytest.mark.parametrize("rpe_on", ["q", "k", "qk"])
def test_aligned_rows_change_no_number(rpe_on, method, mode, mask, monkeypatch):
    config = get_rpe_config(method=method, mode=mode, skip=1, rpe_on=rpe_on)
    modules = [module and fill(module) for module in build_rpe(config, 8, 2)]
    tables = [parameter for module in modules if module is not None for parameter in module.parameters()]
    q, k, v = image(4, (3, 2, 2, 10, 8)).requires_grad_()
    if mask == "padding":
        mask = torch.zeros(2, 1, 1, 10)
        mask[1, ..., 7:] = -math.inf
    elif mask == "causal":
        mask = torch.ones(10, 10, dtype=torch.bool).tril()
    attend, masks = F.scaled_dot_product_attention, []

    def keep_mask(q, k, v, attn_mask, *args, **kwargs):
        masks.append(attn_mask)
        return attend(q, k, v, attn_mask, *args, **kwargs)

    monkeypatch.setattr(irpe, "HAS_RPE_OPS", False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", keep_mask)
    results = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(irpe, "_ALIGNED_DEVICES", devices)
        out = rpe_attention(q, k, v, *modules, attn_mask=mask)
        results.append([out, *torch.autograd.grad(out.square().sum(), [q, k, v, *tables])])
    torch.testing.assert_close(*results)
    assert [is_aligned(mask) for mask in masks] == [False, True]
    assert masks[0].dtype == masks[1].dtype and masks[0].shape[-2:] == masks[1].shape[-2:]


class Operators(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_aligned_sums_are_written_once_and_their_gradients_not_at_all(monkeypatch):
    monkeypatch.setattr(irpe, "_ALIGNED_DEVICES", ("cpu",))
    aligned = torch.randn(2, 3, 10, 16)[..., :10].requires_grad_()
    dense = torch.randn(2, 3, 10, 10, requires_grad=True)
    assert irpe.add_terms([aligned]) is aligned
    free = {
        "aten.new_empty.default",
        "aten.slice.Tensor",
        "aten.detach.default",
        "aten.expand.default",
        "aten.promote_types.default",
    }
    for terms, launches in (
        ([dense], ["aten.copy_.default"]),
        ([aligned, dense], ["aten.add.out"]),
        ([dense, aligned, dense], ["aten.add.out", "aten.add_.Tensor"]),
    ):
        with Operators() as operators:
            total = irpe.add_terms(terms)
        assert [name for name in operators.names if name not in free] == launches
        torch.testing.assert_close(total, sum(terms))
    total, grad = irpe.add_terms([aligned, dense]), torch.randn(2, 3, 10, 16)[..., :10]
    with Operators() as operators:
        grads = torch.autograd.grad(total, [aligned, dense], grad)
    assert set(operators.names) <= free and all(g.data_ptr() == grad.data_ptr() for g in grads)


def test_aligned_sums_have_the_type_that_autocast_computes_in(monkeypatch):
    monkeypatch.setattr(irpe, "_ALIGNED_DEVICES", ("cpu",))
    term, mask = torch.randn(2, 3, 10, 10, dtype=torch.bfloat16, requires_grad=True), torch.randn(2, 1, 1, 10)
    assert irpe.add_terms([term, mask]).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        total = irpe.add_terms([term, mask])
    assert total.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(total.sum(), term)
    assert grad.dtype == torch.bfloat16


def test_on_a_gpu_the_gathered_term_is_the_mask(monkeypatch):
    if not irpe.HAS_RPE_OPS:
        pytest.skip("the extension rpe_ops is not installed; make builds it")
    masks, config = [], get_rpe_config(skip=1, rpe_on="k")
    monkeypatch.setattr(irpe.rpe_ops, "has_cuda", True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, mask, *_, **__: masks.append(mask) or v)
    with FakeTensorMode():
        with torch.device("cuda"):
            module = build_rpe(config, 8, 2)[1]
        monkeypatch.setattr(module, "bucket_ids", lambda *_: torch.zeros(197, 197, dtype=torch.int32, device="cuda"))
        q, k, v = torch.randn(3, 2, 2, 197, 8, device="cuda")
        with Operators() as operators:
            rpe_attention(q, k, v, rpe_k=module)
    (mask,) = masks
    assert mask.shape == (2, 2, 197, 197) and mask.stride() == (2 * 197 * 208, 197 * 208, 208, 1)
    computed = [name for name in operators.names if not name.startswith("prim.")]
    assert computed[-1] == "rpe_ops.rpe_index.default"
