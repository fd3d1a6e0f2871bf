"""The operators equal their definitions on the CPU and, if there is one, on the GPU."""

import itertools
import os
import subprocess
import sys

import pytest
import rpe_ops
import torch
from rpe_ops import reference
from rpe_ops.rpe_index import (
    RPEIndexFunction,
    rpe_bucket_sum,
    rpe_bucket_sum_add_,
    rpe_index,
    rpe_index_add_,
    validate_index,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# (batch, heads, Lq, Lk, buckets): sizes of 1, one plane (an image and head), planes that fill and that overflow groups
# of eight, different Lq and Lk, more keys than a tile on the GPU, more buckets than a chunk on the GPU.
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 1, 6, 5, 4),
    (2, 3, 5, 9, 7),
    (2, 4, 3, 8, 5),
    (3, 3, 9, 4, 6),
    (1, 6, 17, 197, 50),
    (2, 1, 3, 300, 280),
]


def make(shape, dtype=torch.float64, device="cpu", ids=torch.int32):
    """(x, p, index): inputs of the gather and of the bucket sum, and ids for both."""
    batch, heads, queries, keys, buckets = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(batch, heads, queries, buckets, generator=generator, dtype=torch.float64)
    p = torch.randn(batch, heads, queries, keys, generator=generator, dtype=torch.float64)
    index = torch.randint(buckets, (queries, keys), generator=generator)
    return x.to(device, dtype), p.to(device, dtype), index.to(device, ids)


def gather_by_loops(x, index):
    y = torch.empty(*x.shape[:3], index.shape[1], dtype=x.dtype)
    for b, h, i, j in itertools.product(*map(range, y.shape)):
        y[b, h, i, j] = x[b, h, i, index[i, j]]
    return y


def sum_by_loops(p, index, buckets):
    s = torch.zeros(*p.shape[:3], buckets, dtype=torch.float64)
    for b, h, i, j in itertools.product(*map(range, p.shape)):
        s[b, h, i, index[i, j]] += p[b, h, i, j].item()
    return s


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_operators_equal_their_definition(shape, dtype, ids, device):
    x, p, index = make(shape, dtype, device, ids)
    gathered = gather_by_loops(x.cpu(), index.cpu())
    summed = sum_by_loops(p.cpu(), index.cpu(), shape[4])
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    rounding = torch.finfo(dtype).eps / 2 + shape[3] * torch.finfo(accumulator).eps
    rounding = rounding * sum_by_loops(p.cpu().abs(), index.cpu(), shape[4])
    for gather, bucket_sum in ((rpe_index, rpe_bucket_sum), (reference.rpe_index, reference.rpe_bucket_sum)):
        assert torch.equal(gather(x, index).cpu(), gathered)
        s = bucket_sum(p, index, shape[4])
        assert s.dtype == dtype and s.shape == summed.shape
        assert ((s.cpu().double() - summed).abs() <= rounding).all()


def test_gather_and_bucket_sum_are_adjoint(device):
    x, p, index = make((2, 3, 5, 9, 7), device=device)
    torch.testing.assert_close((rpe_index(x, index) * p).sum(), (x * rpe_bucket_sum(p, index, 7)).sum())


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_derivatives_equal_finite_differences(check, device):
    x, p, index = make((2, 2, 3, 5, 4), device=device)
    assert check(lambda x: rpe_index(x, index), x.requires_grad_())
    assert check(lambda p: rpe_bucket_sum(p, index, 4), p.requires_grad_())


def test_rpe_index_function_gathers_and_differentiates(device):
    x, p, index = make((2, 3, 5, 9, 7), torch.float32, device)
    y = rpe_ops.rpe_index.RPEIndexFunction.apply(x.requires_grad_(), index)
    assert torch.equal(y, reference.rpe_index(x, index)) and RPEIndexFunction is rpe_ops.RPEIndexFunction
    (grad,) = torch.autograd.grad(y, x, p)
    torch.testing.assert_close(grad, reference.rpe_bucket_sum(p, index, 7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(dtype, grad, device):
    x, p, index = make((2, 2, 3, 5, 4), dtype, device)
    torch.library.opcheck(torch.ops.rpe_ops.rpe_index.default, (x.requires_grad_(grad), index))
    torch.library.opcheck(torch.ops.rpe_ops.rpe_bucket_sum.default, (p.requires_grad_(grad), index, 4))


def model(x, p, index):
    return rpe_index(x * 2, index) + p, rpe_bucket_sum(p * 2, index, x.shape[3]) + x


def test_compile_gives_one_graph_with_the_same_results_and_gradients(device):
    x, p, index = make((2, 3, 5, 9, 7), torch.float32, device)
    results = []
    for function in (model, torch.compile(model, fullgraph=True)):
        inputs = x.clone().requires_grad_(), p.clone().requires_grad_()
        outputs = function(*inputs, index)
        results.append([*outputs, *torch.autograd.grad(outputs, inputs, [p, x])])
    torch.testing.assert_close(*results)


def test_export_for_any_batch_size_and_map(device):
    class Module(torch.nn.Module):
        forward = staticmethod(model)

    dims = {name: torch.export.Dim(name, min=2) for name in ("batch", "queries", "keys")}
    keys = 11
    if device == "cuda":  # Whether the aligned rows of the result are contiguous depends on the number of keys.
        dims["keys"], keys = None, 9
    x_dims, p_dims = ({0: dims["batch"], 2: dims["queries"]}, {0: dims["batch"], 2: dims["queries"], 3: dims["keys"]})
    program = torch.export.export(
        Module(),
        make((3, 3, 5, 9, 7), torch.float32, device),
        dynamic_shapes=(x_dims, p_dims, {0: dims["queries"], 1: dims["keys"]}),
    )
    inputs = make((2, 3, 6, keys, 7), torch.float32, device)
    torch.testing.assert_close(program.module()(*inputs), model(*inputs))


@pytest.mark.parametrize("dim", [0, 2])
def test_vmap_equals_a_loop_also_in_gradients(dim, device):
    inputs = [make((2, 3, 5, 9, 7), torch.float64, device) for _ in range(3)]
    index = inputs[0][2]
    functions = (
        (0, lambda x: rpe_index(x, index)),
        (1, lambda p: rpe_bucket_sum(p, index, 7)),
    )
    for position, function in functions:
        stacked = torch.stack([arguments[position] + i for i, arguments in enumerate(inputs)], dim).requires_grad_()
        together = torch.vmap(function, in_dims=dim)(stacked)
        alone = torch.stack([function(x) for x in stacked.unbind(dim)])
        grad = torch.randn_like(alone)
        assert torch.equal(together, alone)
        assert torch.equal(*(torch.autograd.grad(out, stacked, grad)[0] for out in (together, alone)))


def test_vmap_over_the_ids_is_refused(device):
    x, p, index = make((2, 3, 5, 9, 7), torch.float64, device)
    with pytest.raises(ValueError, match="rpe_index: torch.vmap cannot map over index, which all images share"):
        torch.vmap(rpe_index, in_dims=(None, 0))(x, index.expand(2, -1, -1))
    with pytest.raises(ValueError, match="rpe_bucket_sum: torch.vmap cannot map over index"):
        torch.vmap(rpe_bucket_sum, in_dims=(0, 0, None))(p.expand(2, -1, -1, -1, -1), index.expand(2, -1, -1), 7)


def strided(tensor):
    """The same values in other memory layouts."""
    yield tensor.transpose(1, 2).contiguous().transpose(1, 2)
    yield tensor.transpose(2, 3).contiguous().transpose(2, 3)
    yield tensor.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    padded = tensor.new_full([2 * n for n in tensor.shape], float("nan"))
    yield padded[::2, ::2, ::2, ::2].copy_(tensor)
    yield padded[1::2, 1::2, 1::2, : tensor.shape[3]].copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_results_do_not_depend_on_strides(dtype, device):
    x, p, index = make((2, 5, 6, 9, 7), dtype, device)
    y, s = rpe_index(x, index), rpe_bucket_sum(p, index, 7)
    layouts = [index, index.t().contiguous().t(), index.repeat_interleave(2, 1)[:, ::2]]
    for other, ids in itertools.product(strided(x), layouts):
        assert torch.equal(rpe_index(other, ids), y)
    for other, ids in itertools.product(strided(p), layouts):
        assert torch.equal(rpe_bucket_sum(other, ids, 7), s)


def test_expanded_inputs_give_the_same_results(device):
    x, p, index = make((2, 3, 5, 9, 7), torch.float32, device)
    for dims in ((0,), (0, 1), (2,), (0, 1, 2, 3)):
        few = tuple(slice(0, 1) if d in dims else slice(None) for d in range(4))
        for tensor, operator in ((x, rpe_index), (p, lambda p, index: rpe_bucket_sum(p, index, 7))):
            expanded = tensor[few].expand_as(tensor)
            assert torch.equal(operator(expanded, index), operator(expanded.contiguous(), index))


@pytest.mark.parametrize("shape", [(0, 3, 5, 9, 7), (2, 0, 5, 9, 7), (2, 3, 0, 9, 7), (2, 3, 5, 0, 7), (2, 3, 5, 0, 0)])
def test_empty_sizes(shape, device):
    batch, heads, queries, keys, buckets = shape
    x = torch.ones(batch, heads, queries, buckets, device=device, requires_grad=True)
    p = torch.ones(batch, heads, queries, keys, device=device, requires_grad=True)
    index = torch.zeros(queries, keys, dtype=torch.int32, device=device)
    y, s = rpe_index(x, index), rpe_bucket_sum(p, index, buckets)
    assert y.shape == p.shape and s.shape == x.shape
    assert s.sum() == 0 and torch.autograd.grad(y.sum(), x)[0].sum() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_3000_ones_sum_to_3000_in_half_types(dtype, device):
    ones = torch.ones(1, 2, 1, 3000, dtype=dtype, device=device)
    index = torch.zeros(1, 3000, dtype=torch.int32, device=device)
    x = torch.zeros(1, 2, 1, 1, dtype=dtype, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(rpe_index(x, index), x, ones)
    expected = torch.full_like(x, 3000)  # In bfloat16 this is 3008, the nearest value.
    assert torch.equal(rpe_bucket_sum(ones, index, 1), expected) and torch.equal(grad, expected)


def test_nan_and_infinity_affect_only_their_bucket(device):
    _, p, index = make((1, 2, 3, 9, 4), torch.float32, device)
    p[0, 0, 0, 0], p[0, 1, 2, 3] = float("nan"), float("inf")
    s = rpe_bucket_sum(p, index, 4)
    assert s[0, 0, 0, index[0, 0].item()].isnan() and s[0, 1, 2, index[2, 3].item()] == float("inf")
    assert s.isfinite().sum() == s.numel() - 2


def test_repeated_runs_are_equal(device):
    x, p, index = make((4, 5, 40, 50, 7), torch.float32, device)
    y, s = rpe_index(x, index), rpe_bucket_sum(p, index, 7)
    for _ in range(20):
        assert torch.equal(rpe_index(x, index), y) and torch.equal(rpe_bucket_sum(p, index, 7), s)


def test_results_do_not_depend_on_the_number_of_threads():
    x, p, index = make((3, 5, 97, 99, 7), torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append((rpe_index(x, index), rpe_bucket_sum(p, index, 7), *add_all(x, p, index)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def add_all(x, p, index):
    """The results of the in-place operators; part of x serves as the products of keys."""
    own, by_key, sums = p.clone(), p.clone(), torch.ones(*p.shape[:2], p.shape[3], x.shape[3], dtype=p.dtype)
    rpe_index_add_(own, x, index)
    rpe_index_add_(by_key, sums + x[:, :, :1], index, by_key=True)
    rpe_bucket_sum_add_(sums, p, index)
    return own, by_key, sums


def test_results_do_not_depend_on_the_instruction_set(tmp_path):
    code = """if True:
        import sys, torch
        from rpe_ops.rpe_index import rpe_bucket_sum, rpe_index
        from test_operators import add_all
        print(torch.backends.cpu.get_cpu_capability())
        inputs = torch.load(sys.argv[1])
        torch.save([(rpe_index(x, index), rpe_bucket_sum(p, index, 7), *(add_all(x, p, index) if
                    p.dtype in (torch.float32, torch.float64) else ())) for x, p, index in inputs], sys.argv[2])
    """
    inputs = [make((3, 3, 5, 43, 7), dtype) for dtype in DTYPES]
    torch.save(inputs, tmp_path / "inputs")
    folders = [os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "inputs", tmp_path / "results"],
        check=True,
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "DEFAULT\n"
    for (x, p, index), (y, s, *added) in zip(inputs, torch.load(tmp_path / "results"), strict=True):
        assert torch.equal(rpe_index(x, index), y) and torch.equal(rpe_bucket_sum(p, index, 7), s)
        assert not added or all(map(torch.equal, add_all(x, p, index), added))


def test_results_do_not_depend_on_the_rest_of_the_batch(device):
    x, p, index = make((3, 5, 7, 33, 6), torch.float32, device)
    y, s = rpe_index(x, index), rpe_bucket_sum(p, index, 6)
    for b, h in itertools.product(range(3), range(5)):
        one = (slice(b, b + 1), slice(h, h + 1))
        assert torch.equal(rpe_index(x[one], index), y[one]) and torch.equal(rpe_bucket_sum(p[one], index, 6), s[one])


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_keeps_the_dtype(dtype, device):
    x, p, index = make((2, 3, 5, 9, 7), dtype, device)
    with torch.autocast(device, torch.bfloat16):
        y, s = rpe_index(x, index), rpe_bucket_sum(p, index, 7)
    assert y.dtype == s.dtype == dtype
    assert torch.equal(y, rpe_index(x, index)) and torch.equal(s, rpe_bucket_sum(p, index, 7))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(device):
    batch, heads, length, buckets = 65, 8, 2048, 7  # 65·8·2048² = 2.18e9
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6e9:
        pytest.skip("needs 6 GB of free GPU memory")
    x = torch.randn(batch, heads, length, buckets, device=device, dtype=torch.float16)
    index = torch.randint(buckets, (length, length), device=device, dtype=torch.int32)
    y = rpe_index(x, index)
    assert y.numel() > 2**31
    for b, rows in ((0, slice(0, 2)), (63, slice(-2, None)), (64, slice(-2, None))):  # before, across and beyond 2³¹
        assert torch.equal(y[b : b + 1, :, rows], reference.rpe_index(x[b : b + 1, :, rows], index[rows]))
    counts = torch.stack([(index == c).sum(1) for c in range(buckets)], 1)
    torch.testing.assert_close(rpe_bucket_sum(y, index, buckets).float(), x.float() * counts, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [7, -1, 2**31 - 1, 2**33])
def test_error_contains_the_id_out_of_range_on_the_cpu(bad, ids):
    if bad > torch.iinfo(ids).max:
        pytest.skip("this id needs int64")
    x, p, index = make((2, 3, 5, 9, 7), torch.float32, ids=ids)
    index[4, 8] = bad
    message = rf"id {bad} at index\[4, 8\] is not one of the 7 buckets"
    with pytest.raises(IndexError, match=message):
        rpe_index(x, index)
    with pytest.raises(IndexError, match=message):
        rpe_bucket_sum(p, index, 7)


def test_ids_out_of_range_access_no_memory_on_the_gpu():
    if not (torch.cuda.is_available() and rpe_ops.has_cuda):
        pytest.skip("needs a GPU and an rpe_ops with CUDA kernels")
    x, p, index = make((2, 3, 5, 9, 7), torch.float32, "cuda")
    bad = index.clone()
    bad[4, 8], bad[3, 0] = 7, -1
    y, s = rpe_index(x, bad), rpe_bucket_sum(p, bad, 7)
    assert y[:, :, 4, 8].isnan().all() and y[:, :, 3, 0].isnan().all() and y.isnan().sum() == 2 * 6
    p[:, :, 4, 8] = p[:, :, 3, 0] = 0
    torch.testing.assert_close(s, reference.rpe_bucket_sum(p, index, 7))


def test_ids_on_another_device_are_refused():
    if not (torch.cuda.is_available() and rpe_ops.has_cuda):
        pytest.skip("needs a GPU and an rpe_ops with CUDA kernels")
    x, p, index = make((2, 3, 5, 9, 7), torch.float32, "cuda")
    for operator in (lambda: rpe_index(x, index.cpu()), lambda: rpe_bucket_sum(p, index.cpu(), 7)):
        with pytest.raises(ValueError, match="input is on cuda:0 and index on cpu"):
            operator()


def test_operators_do_not_synchronize_with_the_gpu():
    if not (torch.cuda.is_available() and rpe_ops.has_cuda):
        pytest.skip("needs a GPU and an rpe_ops with CUDA kernels")
    x, p, index = make((2, 3, 5, 9, 7), torch.float32, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(rpe_index(x.requires_grad_(), index), x, p)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_validate_index_error_contains_the_id_and_the_number_of_buckets(device):
    index = torch.tensor([[0, 6], [3, 2]], device=device)
    validate_index(index, 7)
    validate_index(index[:0], 0)
    with pytest.raises(IndexError, match="id 6 is not one of the 6 buckets"):
        validate_index(index, 6)
    with pytest.raises(IndexError, match="id -1 is not one of the 7 buckets"):
        validate_index(index - 1, 7)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, i: (x[0], i), ValueError, "4 dimensions"),
        (lambda x, i: (x, i[0]), ValueError, "2 dimensions"),
        (lambda x, i: (x[:, :, 1:], i), ValueError, "4 queries and index has 5"),
        (lambda x, i: (x.int(), i), TypeError, "float16, bfloat16, float32 or float64, got Int"),
        (lambda x, i: (x, i.float()), TypeError, "int32 or int64, got Float"),
    ],
)
def test_error_describes_wrong_arguments(change, error, message, device):
    x, _, index = make((2, 3, 5, 9, 9), torch.float32, device)
    with pytest.raises(error, match=message):
        rpe_index(*change(x, index))
    with pytest.raises(error, match=message):
        rpe_bucket_sum(*change(x, index), 9)


def test_error_describes_wrong_arguments_of_the_bucket_sum(device):
    _, p, index = make((2, 3, 5, 9, 7), torch.float32, device)
    with pytest.raises(ValueError, match="8 keys and index has 9"):
        rpe_bucket_sum(p[..., 1:], index, 7)
    with pytest.raises(ValueError, match="between 0 and 4194304, got -1"):
        rpe_bucket_sum(p, index, -1)


# --- In-place operators on the CPU -----------------------------------------------------------------------------------


def make_adding(shape, dtype=torch.float64, ids=torch.int32):
    """(y, x, keys_x, sums, index): logits, products of queries and of keys, bucket sums per key, and ids."""
    batch, heads, queries, keys, buckets = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = (queries, keys), (queries, buckets), (keys, buckets), (keys, buckets)
    tensors = [torch.randn(batch, heads, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    return *tensors, torch.randint(buckets, (queries, keys), generator=generator).to(ids)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 8, 3, 150, 9), (2, 4, 90, 131, 81)])
def test_in_place_operators_equal_their_definition(shape, dtype, ids):
    y, x, keys_x, sums, index = make_adding(shape, dtype, ids)
    own, by_key = y.clone(), y.clone()
    rpe_index_add_(own, x, index)
    rpe_index_add_(by_key, keys_x, index, by_key=True)
    assert torch.equal(own, y + reference.rpe_index(x, index))
    assert torch.equal(by_key, y + reference.rpe_index(keys_x, index.t()).transpose(2, 3))
    expected = sums + reference.rpe_bucket_sum(y.transpose(2, 3), index.t(), shape[4])
    rpe_bucket_sum_add_(sums, y, index)
    torch.testing.assert_close(sums, expected)


def test_in_place_operators_equal_loops():
    y, x, keys_x, sums, index = make_adding((2, 3, 4, 5, 6))
    expected = [y.clone(), y.clone(), sums.clone()]
    for b, h, i, j in itertools.product(*map(range, y.shape)):
        expected[0][b, h, i, j] += x[b, h, i, index[i, j]]
        expected[1][b, h, i, j] += keys_x[b, h, j, index[i, j]]
        expected[2][b, h, j, index[i, j]] += y[b, h, i, j]
    rpe_bucket_sum_add_(sums, y, index)
    own, by_key = y.clone(), y
    rpe_index_add_(own, x, index)
    rpe_index_add_(by_key, keys_x, index, by_key=True)
    torch.testing.assert_close([own, by_key, sums], expected)


@pytest.mark.parametrize("number", range(3))
def test_in_place_operators_take_inputs_of_any_strides(number):
    y, x, keys_x, sums, index = make_adding((2, 3, 5, 9, 7), torch.float32)
    plain, other = y.clone(), y.clone()
    plain_sums, other_sums = sums.clone(), sums
    index_t = index.t().contiguous().t()
    for output, outer_sums, change, ids in (
        (plain, plain_sums, lambda t: t, index),
        (other, other_sums, lambda t: list(strided(t))[number], index_t),
    ):
        rpe_index_add_(output, change(x), ids)
        rpe_index_add_(output, change(keys_x), ids, by_key=True)
        rpe_bucket_sum_add_(outer_sums, change(y), ids)
    assert torch.equal(plain, other) and torch.equal(plain_sums, other_sums)


@pytest.mark.parametrize("shape", [(0, 3, 5, 9, 7), (2, 0, 5, 9, 7), (2, 3, 0, 9, 7), (2, 3, 5, 0, 7), (2, 3, 5, 0, 0)])
def test_in_place_operators_take_empty_sizes(shape):
    batch, heads, queries, keys, buckets = shape
    y, x, keys_x, sums = (
        torch.ones(batch, heads, *size)
        for size in ((queries, keys), (queries, buckets), (keys, buckets), (keys, buckets))
    )
    index = torch.zeros(queries, keys, dtype=torch.int32)
    rpe_index_add_(y, x, index)
    rpe_index_add_(y, keys_x, index, by_key=True)
    rpe_bucket_sum_add_(sums, y, index)
    assert (y == 3).all() and (sums[..., 1:] == 1).all() and (sums[..., :1] == 1 + 3 * queries).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_in_place_operators_pass_opcheck(dtype):
    y, x, keys_x, sums, index = make_adding((2, 2, 3, 5, 4), dtype)
    torch.library.opcheck(torch.ops.rpe_ops.rpe_index_add_.default, (y, x, index))
    torch.library.opcheck(torch.ops.rpe_ops.rpe_index_add_.default, (y, keys_x, index, True))
    torch.library.opcheck(torch.ops.rpe_ops.rpe_bucket_sum_add_.default, (sums, y, index))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda y, x, i: (y, x[:, :, 1:], i),
            ValueError,
            "_add_.*(queries and index has|keys, buckets|must have shape)",
        ),
        (lambda y, x, i: (y[:, :1], x, i), ValueError, "output must have shape"),
        (lambda y, x, i: (y.transpose(2, 3).contiguous().transpose(2, 3), x, i), ValueError, "contiguous"),
        (lambda y, x, i: (y, x.float(), i), TypeError, "output is Double and input is Float"),
        (lambda y, x, i: (y.half(), x.half(), i), TypeError, "float32 or float64, got Half"),
        (lambda y, x, i: (y, x, i + 1), IndexError, "is not one of the 7 buckets"),
    ],
)
def test_error_describes_wrong_arguments_of_in_place_operators(change, error, message):
    y, x, keys_x, sums, index = make_adding((2, 3, 5, 9, 7))
    index[2, 3] = 6
    with pytest.raises(error, match=message):
        rpe_index_add_(*change(y, x, index))
    with pytest.raises(error, match=message):
        rpe_index_add_(*change(y, keys_x, index), by_key=True)
    with pytest.raises(error, match=message):
        rpe_bucket_sum_add_(*change(sums, y, index))


def test_autograd_notices_in_place_changes():
    y, x, _, sums, index = make_adding((2, 3, 5, 9, 7))
    square = y.requires_grad_().clone()
    squared = square * square  # Autograd saves `square`, which the operators then change.
    with torch.no_grad():
        rpe_index_add_(square, x, index)
        rpe_bucket_sum_add_(sums, y, index)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()
    for output, source in ((y.detach().clone(), x.clone().requires_grad_()), (y, x)):
        with pytest.raises(RuntimeError, match="rpe_index_add_ has no derivatives"):
            rpe_index_add_(output, source, index)
    with pytest.raises(RuntimeError, match="rpe_bucket_sum_add_ has no derivatives"):
        rpe_bucket_sum_add_(sums, y, index)


def test_overlapping_input_and_output_are_refused():
    memory = torch.zeros(2000)
    y, x = memory[:90].view(1, 2, 5, 9), memory[80:150].view(1, 2, 5, 7)
    with pytest.raises(RuntimeError, match="refer to a single memory location|overlap"):
        rpe_index_add_(y, x, torch.zeros(5, 9, dtype=torch.int32))


def test_in_place_operators_with_many_buckets():
    y, _, keys_x, sums, index = make_adding((1, 9, 3, 70, 20000), torch.float32)
    expected = y + reference.rpe_index(keys_x, index.t()).transpose(2, 3)
    expected_sums = sums + reference.rpe_bucket_sum(y.transpose(2, 3), index.t(), 20000)
    rpe_bucket_sum_add_(sums, y, index)
    rpe_index_add_(y, keys_x, index, by_key=True)
    assert torch.equal(y, expected)
    torch.testing.assert_close(sums, expected_sums)
