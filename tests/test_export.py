"""Exported and traced models agree with eager PyTorch at batch sizes other than the recorded one, without rpe_ops."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from conftest import PATIENCE, ROOT

LACKING = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)} (requirements-export.txt)")

# the programs are loaded where neither rpe_ops nor timm nor this repository can be imported
LOAD = """
import sys
import torch
for name in ("rpe_ops", "timm", "irpe", "torchvision"):
    sys.modules[name] = None
program, images, outputs = (sys.argv[i] for i in (1, 2, 3))
with torch.no_grad():
    torch.save({load}(torch.load(images)), outputs)
"""


def fill(model):
    """Tables as if trained: of zeros, any encoding would agree with none."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lookup_table" in name:
                parameter.normal_(std=2)
    return model.eval()


def load_deit(where, **kwargs):
    torch.manual_seed(0)
    return fill(
        torch.hub.load(str(ROOT), f"deit_small_patch16_224_ctx_product_50_shared_{where}", source="local", **kwargs)
    )


def load_detr(masks=False):
    """DETR-R50 with iRPE; of its like layers one of the encoder and one of the decoder are kept, to be quick. With
    masks it is inside the panoptic model."""
    torch.manual_seed(0)
    detr = model = fill(torch.hub.load(str(ROOT), "detr_resnet50_rpe_20_product_ctx_1_k", source="local"))
    if masks:
        model = torch.hub.load(str(ROOT), "detr_resnet50_panoptic", source="local")
        model.detr.transformer, detr = detr.transformer, model.detr
        with torch.no_grad():  # as if trained: a mask shows where its query looks more than what the backbone sees
            model.mask_head.lay1.weight[:, -detr.transformer.nhead :].mul_(100)
            for number in (1, 2, 3):
                model.mask_head.get_submodule(f"adapter{number}").weight.mul_(0.01)
    for part in (detr.transformer.encoder, detr.transformer.decoder):
        del part.layers[1:]
    detr.aux_loss = False
    return model


def export(model, images):
    return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def load_elsewhere(load, program, images, folder):
    """What the program in a file computes; `load` is the expression that loads it."""
    torch.save(images, folder / "images.pt")
    subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            LOAD.format(load=load),
            str(program),
            *(str(folder / f"{name}.pt") for name in ("images", "outputs")),
        ],
        cwd=folder,
        check=True,
        timeout=PATIENCE,
    )
    return torch.load(folder / "outputs.pt")


def run_elsewhere(program, images, folder):
    torch.export.save(program, folder / "program.pt2")
    return load_elsewhere("torch.export.load(program).module()", folder / "program.pt2", images, folder)


def onnx_session(file):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options)


def run_onnx(program, images, folder, names):
    import onnx

    torch.onnx.export(
        program, f=folder / "model.onnx", dynamo=True, input_names=["images"], output_names=names, verbose=False
    )
    domains = {node.domain for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node}
    assert domains <= {"", "ai.onnx"}, domains
    session = onnx_session(folder / "model.onnx")
    return [[torch.from_numpy(x) for x in session.run(names, {"images": batch.numpy()})] for batch in images]


def check(outputs, model, images):
    """`outputs` of `images` are those of `model`, and those of the model without its encoding are not."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items() if "lookup_table" in name}
    with torch.no_grad():
        expected, plain = model(images), torch.func.functional_call(model, zeros, (images,))
    expected, plain = (list(x.values()) if isinstance(x, dict) else [x] for x in (expected, plain))
    for found, exact, other in zip(outputs, expected, plain, strict=True):
        assert (exact - other).abs().max() > 1e-3
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def deit():
    model = load_deit("k")
    return model, export(model, torch.randn(2, 3, 224, 224))


@pytest.fixture(scope="module", params=[False, True], ids=["boxes", "masks"])
def detr(request):
    model, names = load_detr(request.param), ["pred_logits", "pred_boxes"] + ["pred_masks"] * request.param
    return model, export(model, torch.randn(2, 3, 96, 160)), names


def test_deit_small_exported_runs_without_rpe_ops_at_another_batch_size(deit, tmp_path):
    model, program = deit
    images = torch.randn(3, 3, 224, 224)
    check([run_elsewhere(program, images, tmp_path)], model, images)


@needs_onnx
def test_deit_small_in_onnxruntime_at_other_batch_sizes(deit, tmp_path):
    model, program = deit
    batches = [torch.randn(size, 3, 224, 224) for size in (1, 3)]
    for images, outputs in zip(batches, run_onnx(program, batches, tmp_path, ["logits"]), strict=True):
        check(outputs, model, images)


@needs_onnx
@pytest.mark.parametrize("gradients", [False, True])
def test_encodings_on_queries_keys_and_values_in_onnxruntime(gradients, tmp_path):
    model = load_deit("qkv", depth=2, img_size=64)
    with torch.set_grad_enabled(gradients):
        program = export(model, torch.randn(2, 3, 64, 64))
    batch = torch.randn(3, 3, 64, 64)
    check(run_onnx(program, [batch], tmp_path, ["logits"])[0], model, batch)


def test_detr_exported_runs_without_rpe_ops_at_another_batch_size(detr, tmp_path):
    model, program, _ = detr
    images = torch.randn(3, 3, 96, 160)
    check(list(run_elsewhere(program, images, tmp_path).values()), model, images)


@needs_onnx
@pytest.mark.parametrize("detr", [True], ids=["masks"], indirect=True)  # which finds boxes too
def test_detr_in_onnxruntime_at_other_batch_sizes(detr, tmp_path):
    model, program, names = detr
    batches = [torch.randn(size, 3, 96, 160) for size in (1, 3)]
    found = run_onnx(program, batches, tmp_path, names)
    for images, outputs in zip(batches, found, strict=True):
        check(outputs, model, images)


# ---------------------------------------------------------------------------------------------------------------------
# torch.jit.trace, and with it the older torch.onnx.export(..., dynamo=False)

ignore_deprecation = pytest.mark.filterwarnings(
    "ignore:.*deprecated", "ignore:.*legacy TorchScript", "ignore::torch.jit.TracerWarning"
)


def load_irpe():
    """DeiT's irpe.py, of which DETR has a copy."""
    spec = importlib.util.spec_from_file_location("irpe_of_test_export", ROOT / "DeiT-with-iRPE" / "irpe.py")
    irpe = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(irpe)
    return irpe


class Attention(torch.nn.Module):
    """`rpe_attention` of a class token and a map of 3×5, with a mask."""

    def __init__(self, method, mode, shared_head):
        super().__init__()
        irpe = load_irpe()
        config = irpe.get_rpe_config(1.9, method, mode, shared_head, skip=1, rpe_on="qkv" if mode == "ctx" else "qk")
        self.rpe_q, self.rpe_k, self.rpe_v = irpe.build_rpe(config, 8, 4)
        self.attend = irpe.rpe_attention

    def forward(self, x):
        q, k, v = x.reshape(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        mask = torch.ones(16, 16, dtype=torch.bool, device=x.device).tril()
        return self.attend(q, k, v, self.rpe_q, self.rpe_k, self.rpe_v, 3, 5, mask)


class EncoderAttention(torch.nn.Module):
    """The attention of a layer of DETR's encoder on a map of 3×5, with padding."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        padding = torch.zeros(x.shape[0], 15, device=x.device)
        padding[:, -2:] = float("-inf")
        return self.attention(x, x, x, padding, need_weights=False, hw=(3, 5))[0]


def as_list(outputs):
    return list(outputs.values()) if isinstance(outputs, dict) else [outputs]


def record(name):
    """A model of `RECORDED`, what it is recorded with, and a batch of another size."""
    make, shape = RECORDED[name]
    return make(), torch.randn(2, *shape), torch.randn(3, *shape)


RECORDED = {
    "deit on k": (lambda: load_deit("k", depth=2, img_size=64), (3, 64, 64)),
    "deit on qkv": (lambda: load_deit("qkv", depth=2, img_size=64), (3, 64, 64)),
    "detr": (load_detr, (3, 96, 160)),
    "encoder": (lambda: EncoderAttention(load_detr().transformer.encoder.layers[0].self_attn).eval(), (15, 256)),
    "euc": (lambda: fill(Attention("euc", "ctx", False)), (16, 96)),
    "quant": (lambda: fill(Attention("quant", "ctx", True)), (16, 96)),
    "cross": (lambda: fill(Attention("cross", "ctx", False)), (16, 96)),
    "product": (lambda: fill(Attention("product", "ctx", False)), (16, 96)),
    "bias": (lambda: fill(Attention("cross", "bias", True)), (16, 96)),
}


@ignore_deprecation
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", RECORDED)
def test_a_trace_contains_only_operators_of_pytorch_and_agrees_at_another_batch_size(name, gradients, tmp_path):
    model, example, batch = record(name)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, example, strict=False, check_trace=False)
    libraries = {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()}
    assert libraries <= {"aten", "prim"}, libraries
    traced.save(tmp_path / "trace.pt")
    with torch.no_grad():
        check(as_list(torch.jit.load(tmp_path / "trace.pt")(batch)), model, batch)


@ignore_deprecation
def test_a_trace_runs_with_pytorch_alone(tmp_path):
    model, example, batch = record("deit on qkv")
    torch.jit.trace(model, example).save(tmp_path / "program.pt")
    check([load_elsewhere("torch.jit.load(program)", tmp_path / "program.pt", batch, tmp_path)], model, batch)


@needs_onnx
@ignore_deprecation
@pytest.mark.parametrize("name", RECORDED)
def test_the_older_onnx_export_agrees_at_other_batch_sizes(name, tmp_path):
    import onnx

    model, example, batch = record(name)
    with torch.no_grad():
        outputs = [f"output{number}" for number in range(len(as_list(model(example))))]
    torch.onnx.export(
        model,
        (example,),
        str(tmp_path / "model.onnx"),
        dynamo=False,
        input_names=["x"],
        output_names=outputs,
        dynamic_axes={name: {0: "batch"} for name in ["x", *outputs]},
    )
    assert {node.domain for node in onnx.load(tmp_path / "model.onnx").graph.node} <= {"", "ai.onnx"}
    session = onnx_session(tmp_path / "model.onnx")
    for x in (example, batch):
        check([torch.from_numpy(found) for found in session.run(outputs, {"x": x.numpy()})], model, x)


@ignore_deprecation
def test_scripting_a_whole_model_is_refused_with_the_alternatives():
    with pytest.raises(RuntimeError, match="torch.jit.trace, torch.export or torch.compile"):
        torch.jit.script(load_deit("k", depth=2, img_size=64))
