"""The top-level hubconf.py: both codebases' models from one folder; each test a fresh process in a fresh folder."""

import subprocess
import sys
import textwrap

import pytest

from conftest import PATIENCE, ROOT

TINY, DETR = "deit_tiny_patch16_224_ctx_product_50_shared_k", "detr_resnet50_rpe_20_product_ctx_1_k"
HEAD = f"""
import sys
import torch
ROOT, TINY, DETR = {str(ROOT)!r}, {TINY!r}, {DETR!r}
FOLDERS = {{"deit": ROOT + "/DeiT-with-iRPE", "detr": ROOT + "/DETR-with-iRPE"}}

def seen_by_hub(folder, ask, *args):
    torch.hub._get_cache_or_reload = lambda *args, **kwargs: folder  # as if it had been fetched from GitHub
    return ask("owner/repository", *args)

def load(folder, name):
    torch.manual_seed(0)
    return torch.hub.load(folder, name, source="local")

def shapes(model):
    return {{name: tensor.shape for name, tensor in model.state_dict().items()}}
"""


def run(folder, code):
    """What Python says to `code` in `folder`."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HEAD + textwrap.dedent(code)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_models_of_both_codebases_are_listed_with_their_own_docstrings_and_no_other_name(tmp_path):
    run(
        tmp_path,
        """
        names = seen_by_hub(ROOT, torch.hub.list)
        assert "timm" not in sys.modules and "pycocotools" not in sys.modules  # to list them imports neither codebase
        own = {name: codebase for codebase, folder in FOLDERS.items() for name in seen_by_hub(folder, torch.hub.list)
               if name.startswith(codebase)}
        assert set(names) == set(own) and len(names) == len(own) > 20
        for name in names:
            text = seen_by_hub(ROOT, torch.hub.help, name)
            assert len(text) > 20 and text == seen_by_hub(FOLDERS[own[name]], torch.hub.help, name)
    """,
    )


def test_both_load_in_one_process_beside_foreign_modules_of_the_same_names(tmp_path):
    for name in ("models", "util"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"whose = 'the caller, {name}'")
        (tmp_path / name / "misc.py").write_text("whose = 'the caller, misc'")
    (tmp_path / "main.py").write_text("whose = 'the caller, main'")
    run(
        tmp_path,
        """
        import main, models, util.misc
        before = [main, models, util, util.misc]
        for name in (TINY, DETR, TINY):
            assert shapes(load(ROOT, name)) == shapes(load(FOLDERS[name[:4]], name))
        import main, models, util.misc
        assert [main, models, util, util.misc] == before and models.whose == "the caller, models"
    """,
    )


def test_arguments_reach_the_model(tmp_path):
    run(
        tmp_path,
        """
        deit = torch.hub.load(ROOT, TINY, source="local", num_classes=7, img_size=32)
        assert deit.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
        detr, postprocess = torch.hub.load(ROOT, DETR, source="local", num_classes=5, return_postprocessor=True)
        found = detr(torch.zeros(1, 3, 64, 96))
        assert found["pred_logits"].shape == (1, 100, 6) and len(postprocess(found, torch.tensor([[64, 96]]))) == 1
    """,
    )


@pytest.mark.parametrize("package, works, lacks", [("pycocotools", TINY, DETR), ("timm", DETR, TINY)])
def test_a_codebase_loads_without_the_packages_of_the_other_and_its_own_are_named(tmp_path, package, works, lacks):
    run(
        tmp_path,
        f"""
        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == {package!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name={package!r})
        sys.meta_path.insert(0, Missing())
        assert {lacks!r} in seen_by_hub(ROOT, torch.hub.list)
        assert load(ROOT, {works!r}) is not None
        try:
            load(ROOT, {lacks!r})
        except ModuleNotFoundError as error:
            assert "need {package}, which is not installed" in str(error), error
        else:
            raise AssertionError("{package} is not needed")
    """,
    )
