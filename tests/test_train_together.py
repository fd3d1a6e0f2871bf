"""train_together.py: the same results as separate runs, to the bit, also after a signal, a kill or a failed run."""

import json
import signal

import pytest
import torch
import train_together
from train_together import KeptBatches, UserError, main
from trainings import assert_close, run_separately, write_class_folders

import runtime

MODEL = "--model vit_tiny_patch16_224 --input-size 8 --model-kwargs patch_size=4 embed_dim=8 depth=1 num_heads=1"
RECIPE = (
    f"{MODEL} --data-set FOLDER --device cpu --epochs 2 --warmup-epochs 0 --batch-size 8 --num_workers 0 "
    "--no-repeated-aug --model-ema-decay 0.5 --drop 0.1"
)
VARIANTS = {"none": "", "k": "--rpe rpe-1.9-product-ctx-1-k", "fast": "--lr 0.1 --weight-decay 0.2"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes of 16 images for training and of 16 for validation, which differ in brightness."""
    root = tmp_path_factory.mktemp("data")
    write_class_folders(root, {"train": 16, "val": 16}, (8, 8), darkest_range=60, step=60)
    return root


def commands(data, out, more="", evaluate=True):
    """Commands of main.py that train each variant, and then evaluate each of them."""
    lines = []
    for flags in ("--resume auto", "--eval --resume auto")[: 1 + evaluate]:
        for name, variant in VARIANTS.items():
            (out / name).mkdir(parents=True, exist_ok=True)
            lines.append(
                f"python main.py {RECIPE} {variant} --data-path {data} --output_dir {out / name} {more} {flags}"
            )
    return lines


def run_together(out, lines):
    """Run the commands in this process."""
    path = out / "commands.txt"
    path.write_text("\n".join(lines))
    train_together.run(train_together.argparse.Namespace(commands=path))


def results(out, names=tuple(VARIANTS)):
    """What each run has written: its checkpoint without the flags, its log, and its evaluation."""
    found = {}
    for name in names:
        checkpoint = runtime.load_checkpoint(out / name / "checkpoint.pth")
        flags = vars(checkpoint.pop("args"))
        log = [json.loads(line) for line in (out / name / "log.txt").read_text().splitlines()]
        evaluation = out / name / "eval.json"
        found[name] = (checkpoint, sorted(flags), log, evaluation.exists() and json.loads(evaluation.read_text()))
    return found


@pytest.fixture(scope="module")
def separate(data, tmp_path_factory):
    """The results of separate runs."""
    out = tmp_path_factory.mktemp("separate")
    run_separately(commands(data, out))
    return results(out)


def test_runs_on_shared_batches_equal_separate_runs_to_the_bit(data, tmp_path, separate):
    run_together(tmp_path, commands(data, tmp_path))
    assert_close(results(tmp_path), separate)
    weights = [checkpoint["model"]["head.weight"] for checkpoint, *_ in separate.values()]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_every_image_is_loaded_once_in_an_epoch_for_all_models(data, tmp_path, monkeypatch):
    loaded, get = [], runtime.SeededDataset.__getitem__
    monkeypatch.setattr(
        runtime.SeededDataset, "__getitem__", lambda self, key: loaded.append(key[1:]) or get(self, key)
    )
    run_together(tmp_path, commands(data, tmp_path))
    assert len(loaded) == len(set(loaded)) == 2 * 32


@pytest.mark.parametrize("step", [1, 3])  # in an epoch, and at its end
def test_after_a_signal_all_runs_save_and_resume_to_the_bit(step, data, tmp_path, separate, monkeypatch):
    seed_step = train_together.engine.seed_step

    def signalled(run, at):
        seed_step(run, at)
        if (run.epoch, at) == (1, step) and run.args.output_dir.endswith("k"):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train_together.engine, "seed_step", signalled)
    with pytest.raises(runtime.Interrupted, match=f"stopped by SIGTERM in epoch 1, step {step}"):
        run_together(tmp_path, commands(data, tmp_path))
    monkeypatch.undo()
    places = {name: runtime.resume_point(checkpoint) for name, (checkpoint, *_) in results(tmp_path).items()}
    assert [(epoch, progress["images"]) for epoch, progress in places.values()] == [(1, 8 * (step + 1))] * 3
    run_together(tmp_path, commands(data, tmp_path))
    assert_close(results(tmp_path), separate)


def test_runs_that_a_kill_left_at_different_places_resume_to_the_bit(data, tmp_path, separate, monkeypatch):
    monkeypatch.setattr(train_together.Training, "save", killed_at_the_second_run_of_epoch_one)
    with pytest.raises(KeyboardInterrupt):
        run_together(tmp_path, commands(data, tmp_path, "--save-every 2"))
    monkeypatch.undo()
    places = {name: runtime.resume_point(checkpoint) for name, (checkpoint, *_) in results(tmp_path).items()}
    assert [(epoch, progress and progress["images"]) for epoch, progress in places.values()] == [
        (1, 16),
        (1, None),
        (1, None),
    ]
    run_together(tmp_path, commands(data, tmp_path))
    assert_close(results(tmp_path), separate)


def killed_at_the_second_run_of_epoch_one(training):
    if training.run.epoch == 1 and training.output_dir.endswith("k"):
        raise KeyboardInterrupt
    training.run.save(training.progress.done, training.progress.read())


def test_a_run_whose_loss_is_not_finite_fails_alone(data, tmp_path, separate, capsys):
    lines = [line.replace("--lr 0.1", "--lr 1e38") for line in commands(data, tmp_path)]
    with pytest.raises(UserError, match="1 of the runs failed; see the errors above: .*/fast$"):
        run_together(tmp_path, lines)
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {tmp_path}/fast: loss is ") and errors.count("\n") == 1
    assert "to replay it: python main.py --model" in errors
    assert not (tmp_path / "fast" / "eval.json").exists()
    assert_close(results(tmp_path, ["none", "k"]), {name: separate[name] for name in ("none", "k")})


def test_an_error_of_one_model_that_is_no_users_mistake_leaves_the_others_running(data, tmp_path, separate, capsys):
    lines = [line.replace("--lr 0.1", "--lr 1e42") for line in commands(data, tmp_path)]  # the optimizer overflows
    with pytest.raises(UserError, match="1 of the runs failed"):
        run_together(tmp_path, lines)
    error, *details = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {tmp_path}/fast: RuntimeError: ") and details[0].startswith("Traceback")
    assert_close(results(tmp_path, ["none", "k"]), {name: separate[name] for name in ("none", "k")})


def test_a_failed_save_fails_its_run_alone(data, tmp_path, separate, monkeypatch, capsys):
    write = main.TrainingState.save

    def full(state, path, *rest):
        if path.parent.name == "k":
            raise UserError(f"{path} cannot be written: No space left on device")
        write(state, path, *rest)

    monkeypatch.setattr(main.TrainingState, "save", full)
    with pytest.raises(UserError, match="1 of the runs failed; see the errors above: .*/k$"):
        run_together(tmp_path, commands(data, tmp_path))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {tmp_path}/k: {tmp_path}/k/checkpoint.pth cannot be written: No space left on device"]
    assert_close(results(tmp_path, ["none", "fast"]), {name: separate[name] for name in ("none", "fast")})


def test_no_images_are_loaded_after_all_runs_have_failed(data, tmp_path, monkeypatch):
    loaded, get = [], runtime.SeededDataset.__getitem__
    monkeypatch.setattr(runtime.SeededDataset, "__getitem__", lambda self, key: loaded.append(key) or get(self, key))
    lines = [f"{line} --lr 1e42" for line in commands(data, tmp_path)]
    with pytest.raises(UserError, match="3 of the runs failed"):
        run_together(tmp_path, lines)
    assert len(loaded) == 8


def test_models_with_random_weights_are_evaluated_as_by_main(data, tmp_path):
    flags = f"{RECIPE} --data-path {data} --eval"
    for folder in ("first", "second", "alone"):
        (tmp_path / folder).mkdir()
    lines = [f"python main.py {flags} --output_dir {tmp_path / folder}" for folder in ("first", "second")]
    run_together(tmp_path, lines)
    run_separately([f"python main.py {flags} --output_dir {tmp_path / 'alone'}"])
    found = [(tmp_path / folder / "eval.json").read_text() for folder in ("first", "second", "alone")]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--batch-size 8", "--batch-size 4"), "--batch-size is 8 in .*/none and 4 in .*/k: runs that share"),
        (("--epochs 2", "--epochs 2 --seed 3"), "--seed is 0 in .*/none and 3 in .*/k: runs that share"),
        (("python main.py", "python other.py"), "each line must be a command that begins with python main.py"),
        (("--epochs 2", "--epochs 0"), "--epochs 0 is out of range"),
        (("--epochs 2", "--epochs '2"), "has a line that cannot be read .No closing quotation"),
        (("/k ", "/none/ "), "two commands write to --output_dir .*/none: give each run a folder of its own"),
    ],
)
def test_commands_that_cannot_share_a_process_are_refused_in_one_sentence(change, message, data, tmp_path):
    lines = commands(data, tmp_path, evaluate=False)
    lines[1] = lines[1].replace(*change)
    with pytest.raises(UserError, match=message):
        run_together(tmp_path, lines)
    assert not (tmp_path / "none" / "checkpoint.pth").exists()


@pytest.mark.parametrize("limit", [0, 10**9])
def test_batches_of_an_evaluation_are_kept_if_they_fit(limit, monkeypatch):
    monkeypatch.setattr(train_together, "MAX_KEPT_BYTES", limit)
    read = []

    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, i):
            read.append(i)
            return torch.tensor(float(i)), i

    batches = KeptBatches(torch.utils.data.DataLoader(Numbers(), 2))
    passes = [[batch[1].tolist() for batch in batches] for _ in range(3)]
    assert passes == [[[0, 1], [2, 3], [4]]] * 3 and len(batches) == 3
    assert len(read) == (5 if limit else 15)
