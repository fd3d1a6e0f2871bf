"""--compile gives the same results and checkpoints, and compiles once for images of all sizes."""

import pytest
import torch

import main
from conftest import finish, parse, small, start
from models import build_model
from models.compiled import compile_detector
from util import runtime
from util.misc import nested_tensor_from_tensor_list


class Graphs(list):
    """A torch.compile backend that records the graphs and runs them eagerly."""

    def __call__(self, graph, inputs):
        self.append(graph)
        return graph


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile captures, which run without a compiler."""
    graphs, compile = Graphs(), torch.compile
    torch._dynamo.reset()  # graphs of other tests count towards the limit of recompilations
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, **options, backend=graphs))
    yield graphs
    torch._dynamo.reset()


class Patches(torch.nn.Module):
    """A backbone of a single layer, since tracing a ResNet takes long."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 512, 32, 32)

    def forward(self, x):
        return {"0": self.layer(x)}


def detector(*flags):
    torch.manual_seed(0)
    flags = small("", "--num_classes", 5, "--dropout", 0, "--enc_layers", 2, "--num_queries", 11, *flags)
    model = build_model(parse(*flags))[0].train()
    model.backbone[0].body = Patches()
    return model


def images(height, width):
    """Two images of different sizes, padded."""
    generator = torch.Generator().manual_seed(height * width)
    return nested_tensor_from_tensor_list(
        [torch.rand(3, height, width, generator=generator), torch.rand(3, height - 9, width - 3, generator=generator)]
    )


def gradients(model, samples):
    model.zero_grad()
    outputs = model(samples)
    (outputs["pred_logits"].square().sum() + outputs["pred_boxes"].square().sum()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# There are three graphs: backbone, decoder and encoder. With relative positions, the encoder has two graphs, for what
# follows the attention of a layer: one for the first layer, whose tokens are a transposed map, and one for the others.
@pytest.mark.parametrize(("flags", "count"), [(["--enc_rpe2d", ""], 3), ([], 4)])
def test_new_image_sizes_need_no_compilation_and_give_the_same_gradients(graphs, flags, count):
    compiled, plain = detector(*flags), detector(*flags)
    compile_detector(compiled)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for height, width in ((100, 140), (96, 160), (64, 200), (200, 140)):
        samples = images(height, width)
        torch.testing.assert_close(gradients(compiled, samples), gradients(plain, samples), rtol=1e-4, atol=1e-4)
        assert len(graphs) == count
    with torch.inference_mode():
        for height, width in ((100, 140), (64, 200)):
            samples = images(height, width)
            outputs = compiled.eval()(samples)
            torch.testing.assert_close(outputs["pred_logits"], plain.eval()(samples)["pred_logits"])
        assert len(graphs) <= 2 * count


def test_the_detector_under_a_mask_head_is_compiled(graphs):
    model = build_model(parse(*small("", "--num_classes", 5, "--masks")))[0]
    before = list(model.state_dict())
    compile_detector(model)
    parts = model.detr.backbone[0].body, model.detr.transformer.decoder
    assert all(part._compiled_call_impl for part in parts) and list(model.state_dict()) == before


def test_compiled_and_eager_runs_can_resume_each_other(coco, tmp_path, graphs, monkeypatch):
    monkeypatch.setattr(main, "evaluate", lambda *args: ({}, None))
    for name, steps in (
        ("straight", [["--compile", "--epochs", 2]]),
        ("halves", [["--compile"], ["--compile", "--epochs", 2]]),
        ("mixed", [["--compile"], ["--epochs", 2]]),
    ):
        for flags in steps:
            main.main(parse(*small(coco, "--output_dir", tmp_path / name, "--resume", "auto", *flags)))
    assert graphs
    straight, halves, mixed = (
        runtime.load_checkpoint(tmp_path / name / "checkpoint.pth")["model"] for name in ("straight", "halves", "mixed")
    )
    torch.testing.assert_close(halves, straight, rtol=0, atol=0)
    torch.testing.assert_close(mixed, straight, rtol=1e-3, atol=1e-4)


def test_evaluation_of_a_compiled_model_gives_the_same_metrics(coco, tmp_path, graphs):
    main.main(parse(*small(coco, "--output_dir", tmp_path)))
    flags = small(coco, "--eval", "--resume", tmp_path / "checkpoint.pth")
    plain, compiled = main.main(parse(*flags)), main.main(parse(*flags, "--compile"))
    assert graphs and compiled.pop("coco_eval_bbox") == pytest.approx(plain.pop("coco_eval_bbox"), abs=1e-4)
    assert compiled == pytest.approx(plain, rel=1e-4, abs=1e-4)


def test_the_compiled_decoder_gives_the_same_gradients():
    model, plain = detector("--dec_layers", 1), detector("--dec_layers", 1)
    model.transformer.decoder.compile(dynamic=True)
    samples = images(100, 140)
    torch.testing.assert_close(gradients(model, samples), gradients(plain, samples), rtol=1e-3, atol=1e-3)


def test_a_missing_compiler_is_reported_in_one_sentence(coco):
    status, _, err = finish(start("main.py", *small(coco, "--compile"), CXX="/nowhere/g++"))
    assert status == 1
    assert err.count("error: ") == 1 and "Traceback" not in err
    assert "--compile cannot be used" in err and "/nowhere/g++" in err and "leave --compile out" in err
