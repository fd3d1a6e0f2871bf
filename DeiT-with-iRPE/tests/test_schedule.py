"""Learning rates and weight decay, held to the released logs."""

import json
from pathlib import Path

import pytest
import torch
from timm.scheduler.plateau_lr import PlateauLRScheduler

import main
from checkpoint import TrainingState
from conftest import TINY, parse
from rpe_models import create_model
from runtime import checkpoint_to_resume

OFFICIAL = json.loads((Path(__file__).parent / "golden" / "official_logs.json").read_text())


def timm_has_plateau():
    """timm 1.0.15's plateau schedule passes an argument that PyTorch 2.7 took away."""
    try:
        PlateauLRScheduler(torch.optim.SGD([torch.zeros(1)], lr=1))
    except TypeError:
        return False
    return True


needs_plateau = pytest.mark.skipif(not timm_has_plateau(), reason="needs a timm whose plateau fits this PyTorch")


def learning_rates(args, first=0, metrics=None):
    """The learning rate of each epoch from ``first`` on, stepped as training steps it."""
    state = main.build_state(args, torch.nn.Linear(2, 2))
    args.start_epoch = first
    main.resume(args, state, None)
    rates = []
    for epoch in range(first, args.epochs):
        rates.append(state.optimizer.param_groups[0]["lr"])
        state.optimizer.step()
        if state.lr_scheduler:
            state.lr_scheduler.step(epoch, metrics[epoch] if metrics else 50.0)
    return rates


def published():
    args = parse("--batch-size", 128)
    args.world_size = 8
    return args


def test_all_300_learning_rates_are_those_of_the_released_logs():
    assert len(OFFICIAL["train_lr"]) == 300
    assert learning_rates(published()) == pytest.approx(OFFICIAL["train_lr"], rel=1e-9)


@pytest.mark.parametrize("name", OFFICIAL["n_parameters"])
def test_parameters_are_as_many_as_in_the_released_logs(name):
    parameters = create_model(name).parameters()
    assert sum(parameter.numel() for parameter in parameters) == OFFICIAL["n_parameters"][name]


def test_start_epoch_joins_the_schedule_where_it_would_be():
    assert learning_rates(published(), first=100) == learning_rates(published())[100:]


def test_only_matrices_and_rpe_tables_are_decayed():
    model = create_model("deit_tiny_distilled_patch16_224", num_classes=3, img_size=32)
    tables = create_model(TINY, num_classes=3, img_size=32)
    names = {id(p): name for m in (model, tables) for name, p in m.named_parameters()}
    decayed = {
        names[id(p)]
        for m in (model, tables)
        for group in main.build_optimizer(parse(), m).param_groups
        for p in group["params"]
        if group["weight_decay"]
    }
    special = ("pos_embed", "cls_token", "dist_token")
    assert decayed == {
        name
        for m in (model, tables)
        for name, p in m.named_parameters()
        if p.ndim > 1 and not name.endswith("bias") and name not in special
    }
    assert "blocks.3.attn.rpe_k.lookup_table_weight" in decayed


def decays(rates):
    """Epochs at which the rate is a tenth of the one before."""
    return [epoch for epoch in range(1, len(rates)) if rates[epoch] == pytest.approx(rates[epoch - 1] / 10)]


@needs_plateau
@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize(("patience", "cooldown", "period"), [(1, 0, 2), (3, 0, 4), (1, 3, 5)])
def test_plateau_decays_after_its_patience_and_cooldown(warmup, patience, cooldown, period):
    args = parse(
        "--sched",
        "plateau",
        "--epochs",
        20,
        "--warmup-epochs",
        warmup,
        "--patience-epochs",
        patience,
        "--cooldown-epochs",
        cooldown,
        "--batch-size",
        512,
        "--min-lr",
        0,
    )
    rates = learning_rates(args, metrics=[10.0] * 20)
    assert rates[2] == args.lr
    assert {later - earlier for earlier, later in zip(decays(rates), decays(rates)[1:], strict=False)} == {period}
    assert not decays(learning_rates(args, metrics=list(range(20))))[warmup:]


def test_step_schedule_decays_every_decay_epochs_by_decay_rate():
    rates = learning_rates(
        parse("--sched", "step", "--epochs", 30, "--warmup-epochs", 0, "--decay-epochs", 7, "--dr", 0.5)
    )
    assert [rates[epoch + 1] / rates[epoch] for epoch in (7, 14, 21)] == [0.5] * 3 and len(set(rates)) == 5


def test_noise_stays_in_its_epochs_and_bound():
    flags = ["--sched", "step", "--decay-epochs", 1000, "--warmup-epochs", 0, "--epochs", 40, "--batch-size", 512]
    quiet, noisy = (
        learning_rates(parse(*flags)),
        learning_rates(parse(*flags, "--lr-noise", 0.25, 0.75, "--lr-noise-pct", 0.4, "--lr-noise-std", 0.3)),
    )
    off = [abs(a / b - 1) for a, b in zip(noisy, quiet, strict=True)]
    assert all(value > 0 for value in off[11:31]) and max(off) < 0.4 and not any(off[:11] + off[31:])
    assert noisy != learning_rates(
        parse(*flags, "--lr-noise", 0.25, 0.75, "--lr-noise-pct", 0.4, "--lr-noise-std", 0.3, "--seed", 7)
    )


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
@pytest.mark.parametrize(
    "sched", ["cosine", "tanh", "step", "multistep", "poly", "none", pytest.param("plateau", marks=needs_plateau)]
)
def test_any_schedule_goes_on_after_a_checkpoint_as_without(sched, tmp_path):
    args = parse(
        "--sched",
        sched,
        "--epochs",
        12,
        "--warmup-epochs",
        2,
        "--patience-epochs",
        1,
        "--cooldown-epochs",
        1,
        "--lr-noise",
        0.5,
    )
    metrics = [10, 20, 20, 20, 20, 30, 30, 30, 30, 30, 30, 30]
    model = create_model("deit_tiny_patch16_224", num_classes=2, img_size=16)
    straight, rates = learning_rates(args, metrics=metrics), []
    for first, last in ((0, 7), (7, 12)):
        state: TrainingState = main.build_state(args, model)
        path = tmp_path / "checkpoint.pth" if first else ""
        assert main.resume(args, state, checkpoint_to_resume(path, "")) == (first, None)
        for epoch in range(first, last):
            rates.append(state.optimizer.param_groups[0]["lr"])
            if state.lr_scheduler:
                state.lr_scheduler.step(epoch, metrics[epoch])
            state.save(tmp_path / "checkpoint.pth", epoch, args)
    assert rates == straight
