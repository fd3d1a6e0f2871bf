"""Exported models agree with eager PyTorch at batch sizes other than the exported one, also without rpe_ops."""
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
program, pictures, outputs = (sys.argv[i] for i in (1, 2, 3))
with torch.no_grad():
    torch.save(torch.export.load(program).module()(torch.load(pictures)), outputs)
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
    return fill(torch.hub.load(str(ROOT), f"deit_small_patch16_224_ctx_product_50_shared_{where}", source="local",
                               **kwargs))


def load_detr(masks=False):
    """DETR-R50 with iRPE; of its like layers one of the encoder and one of the decoder are kept, to be quick. With
    masks it is inside the panoptic model."""
    torch.manual_seed(0)
    detr = model = fill(torch.hub.load(str(ROOT), "detr_resnet50_rpe_20_product_ctx_1_k", source="local"))
    if masks:
        model = torch.hub.load(str(ROOT), "detr_resnet50_panoptic", source="local")
        model.detr.transformer, detr = detr.transformer, model.detr
        with torch.no_grad():  # as if trained: a mask shows where its query looks more than what the backbone sees
            model.mask_head.lay1.weight[:, -detr.transformer.nhead:].mul_(100)
            for number in (1, 2, 3):
                model.mask_head.get_submodule(f"adapter{number}").weight.mul_(0.01)
    for part in (detr.transformer.encoder, detr.transformer.decoder):
        del part.layers[1:]
    detr.aux_loss = False
    return model


def export(model, pictures):
    return torch.export.export(model, (pictures,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def run_elsewhere(program, pictures, folder):
    torch.export.save(program, folder / "program.pt2")
    torch.save(pictures, folder / "pictures.pt")
    subprocess.run([sys.executable, "-c", LOAD, *(str(folder / f"{name}") for name in
                                                  ("program.pt2", "pictures.pt", "outputs.pt"))],
                   cwd=folder, check=True, timeout=PATIENCE)
    return torch.load(folder / "outputs.pt")


def run_onnx(program, pictures, folder, names):
    import onnx
    import onnxruntime
    torch.onnx.export(program, f=folder / "model.onnx", dynamo=True, input_names=["pictures"], output_names=names,
                      verbose=False)
    domains = {node.domain for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node}
    assert domains <= {"", "ai.onnx"}, domains
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    return [[torch.from_numpy(x) for x in session.run(names, {"pictures": batch.numpy()})] for batch in pictures]


def check(outputs, model, pictures):
    """`outputs` of `pictures` are those of `model`, and those of the model without its encoding are not."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items() if "lookup_table" in name}
    with torch.no_grad():
        expected, plain = model(pictures), torch.func.functional_call(model, zeros, (pictures,))
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
    pictures = torch.randn(3, 3, 224, 224)
    check([run_elsewhere(program, pictures, tmp_path)], model, pictures)


@needs_onnx
def test_deit_small_in_onnxruntime_at_other_batch_sizes(deit, tmp_path):
    model, program = deit
    batches = [torch.randn(size, 3, 224, 224) for size in (1, 3)]
    for pictures, outputs in zip(batches, run_onnx(program, batches, tmp_path, ["logits"]), strict=True):
        check(outputs, model, pictures)


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
    pictures = torch.randn(3, 3, 96, 160)
    check(list(run_elsewhere(program, pictures, tmp_path).values()), model, pictures)


@needs_onnx
@pytest.mark.parametrize("detr", [True], ids=["masks"], indirect=True)  # which finds boxes too
def test_detr_in_onnxruntime_at_other_batch_sizes(detr, tmp_path):
    model, program, names = detr
    batches = [torch.randn(size, 3, 96, 160) for size in (1, 3)]
    found = run_onnx(program, batches, tmp_path, names)
    for pictures, outputs in zip(batches, found, strict=True):
        check(outputs, model, pictures)
