"""The command lines as a user runs them, each in a process of its own."""

import errno
import json
import os
import re
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from configs import digits, folder, imagenet
from sppnet_jax.run.parallel import reason
from sppnet_jax.run.settings import read
from sppnet_jax.training.network_settings import NetworkSettings
from tests.conftest import SMALL
from tests.data_helpers import (
    encode,
    picture,
    write_class_folders,
    write_images,
    write_two_colors,
)
from tests.mock_imagenet import prepare_mock_imagenet
from tests.processes import Started, run_command, run_program


def losses(workdir):
    rows = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["split"] == "train"}


def test_train_writes_everything_a_run_s_folder_should_hold(digits_run):
    names = {path.name for path in digits_run.iterdir()}
    assert {"config.json", "data.json", "metrics.jsonl", "training.png"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert [path.name for path in (digits_run / "checkpoints").iterdir()] == ["3"]
    assert list(losses(digits_run)) == [1, 2, 3]
    assert cv2.imread(str(digits_run / "training.png")).shape[0] > 300


@pytest.mark.parametrize("devices", [3, 4])
def test_evaluate_counts_every_test_image_once_on_any_devices(
    devices, digits_run, command_line
):
    result = command_line("evaluate", f"--workdir={digits_run}", devices=devices)
    report = json.loads((digits_run / "evaluate_single.json").read_text())
    assert report["count"] == 1077
    assert report["broken"] == 0
    assert f"top-1 {report['top1']:.2%} (95 %: " in result.stdout
    assert "of 1077 images" in result.stdout
    picture = cv2.imread(str(digits_run / "evaluate_single.png"))
    assert picture.std() > 10


@pytest.mark.slow
def test_views_at_several_scales_average_over_networks_and_devices(
    digits_run, command_line, tmp_path
):
    """The last of three runs averages what the first two say."""
    shutil.copytree(digits_run, tmp_path / "a")
    shutil.copytree(digits_run, tmp_path / "b")
    reports = []
    for workdirs, devices in ((("a",), 1), (("b",), 3), (("a", "b"), 2)):
        result = command_line(
            "evaluate",
            "--workdir=" + ",".join(str(tmp_path / name) for name in workdirs),
            "--protocol=multi_view_full",
            "--scales=32,36",
            "--views=center,left,right",
            "--flip",
            "--buckets=1",
            "--config.data.test_split=test[:40]",
            devices=devices,
        )
        assert "compiled: 1 of 1 buckets" in result.stderr
        (path,) = (tmp_path / workdirs[0]).glob("evaluate_multi_view_full*.json")
        reports.append(json.loads(path.read_text()))
        path.unlink()
    single, same, combined = reports
    assert single["count"] == 40
    assert single["top1_correct"] == single["top1"] * 40
    low, high = single["top1_interval"]
    assert low < single["top1"] < high
    assert single["loss"] == pytest.approx(same["loss"], rel=1e-5)
    assert combined["loss"] == pytest.approx(single["loss"], rel=1e-5)
    assert combined["views"] == 2 * single["views"]
    assert len(combined["workdirs"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--protocol=full_image", "--scales=big"],
            "--scales takes whole numbers such as",
        ),
        (["--protocol=full_image", "--scales=9"], "needs at least 29"),
        (["--protocol=full_image", "--views=center"], "one view, the whole image"),
        (["--buckets=0"], "--buckets must be at least 1"),
    ],
)
def test_a_test_that_cannot_be_is_refused(arguments, message, digits_run, command_line):
    result = command_line(
        "evaluate", f"--workdir={digits_run}", *arguments, check=False
    )
    assert result.returncode == (2 if message.startswith("-") else 1)
    assert message in result.stderr


@pytest.mark.slow
def test_predict_names_five_classes_and_goes_on_after_a_file_it_cannot_read(
    digits_run, command_line, tmp_path
):
    sizes = [(40, 60), (300, 20), (1, 1), (97, 96)]
    paths = []
    for number, size in enumerate(sizes):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(encode(picture(*size)))
    torn, drawn = tmp_path / "torn.png", tmp_path / "drawn.png"
    torn.write_bytes(paths[0].read_bytes()[:200])
    given = f"--workdir={digits_run}", f"--picture={drawn}", torn, *paths, "absent.png"
    result = command_line("predict", *given, check=False)
    assert result.returncode == 1
    assert f"{torn}: can't be read: truncated" in result.stdout
    assert "2 of 6 files could not be read" in result.stderr
    lines = result.stdout.splitlines()
    assert len([line for line in lines if "%" in line]) == 5 * len(sizes)
    assert f"{paths[1]} (20×300 pixels)" in lines
    assert drawn.exists()


@pytest.mark.quick
def test_a_folder_of_odd_images_trains_and_its_broken_files_are_named(
    command_line, tmp_path
):
    root = tmp_path / "pets"
    for number in range(40):
        image = picture(20 + number, 70 - number, seed=number)
        folder = root / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        suffix = (".png", ".jpg", ".bmp", ".webp")[number % 4]
        if number % 5 == 0:
            image = np.repeat(image[..., :1], 3, axis=2)
        (folder / f"{number}{suffix}").write_bytes(encode(image, suffix))
    whole = (root / "dog" / "1.jpg").read_bytes()
    (root / "cat" / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    workdir = tmp_path / "run"
    result = command_line(
        "train",
        "--config=configs/folder.py",
        f"--config.data.root={root}",
        f"--workdir={workdir}",
        *SMALL,
        "--config.epochs=2",
    )
    assert "every 5th image of each class" in result.stderr
    evaluated = command_line("evaluate", f"--workdir={workdir}")
    report = json.loads((workdir / "evaluate_single.json").read_text())
    assert "broken.jpg: truncated" in result.stderr + evaluated.stderr
    assert report["count"] + report["broken"] == 8


@pytest.mark.slow
def test_imagenet_trains_from_prepared_files_with_1000_classes(command_line, tmp_path):
    prepare_mock_imagenet(tmp_path / "tfds")
    workdir = tmp_path / "run"
    shared = [f"--config.data.data_dir={tmp_path / 'tfds'}", *SMALL]
    command_line(
        "train",
        "--config=configs/imagenet.py:overfeat5,spp30",
        f"--workdir={workdir}",
        *shared,
        "--config.data.workers=1",
        "--config.model.weight_init=he",
        "--config.inputs.scale=64.0",
        "--config.max_steps=2",
    )
    command_line("evaluate", f"--workdir={workdir}")
    report = json.loads((workdir / "evaluate_single.json").read_text())
    assert (report["split"], report["count"]) == ("validation", 12)
    assert (workdir / "statistics.npz").exists()  # the mean image
    assert len(json.loads((workdir / "data.json").read_text())["class_names"]) == 1000


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_with_the_same_losses(
    command_line, digit_scenes_dir, tmp_path
):
    arguments = [
        "--config=configs/digits.py",
        *SMALL,
        "--config.checkpoint_steps=5",
        "--config.max_steps=60",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command_line("train", *arguments, f"--workdir={whole}")
    process = start_training(killed, *arguments)
    process.wait_until(lambda: count_rows(killed) > 12)
    process.send(signal.SIGKILL)
    assert process.end().returncode == -signal.SIGKILL
    result = command_line("train", *arguments, f"--workdir={killed}")
    assert "training goes on at step" in result.stderr
    assert losses(killed) == losses(whole)


def run_where_no_checkpoint_begins(module, arguments):
    """A command, with a disk that fails as a checkpoint's folder is made."""
    make = os.makedirs

    def fail(path, *given, **named):
        if "checkpoint-tmp" in str(path):
            raise OSError(errno.EIO, "Input/output error", str(path))
        make(path, *given, **named)

    os.makedirs = fail
    run_command(module, arguments)


def test_a_process_ends_after_a_checkpoint_that_can_t_be_written(
    few_scenes, command_line, tmp_path
):
    folder = tmp_path / "checkpoints"
    arguments = [
        "--config=configs/digits.py",
        *SMALL,
        f"--config.data.data_dir={few_scenes}",
        "--config.max_steps=2",
        "--config.checkpoint_steps=1",
        f"--workdir={tmp_path}",
    ]
    error = fails(command_line, *arguments, how=run_where_no_checkpoint_begins)
    assert f"error: the checkpoint {folder}/1, of " in error
    assert "can't be written: [Errno 5] Input/output error" in error
    shutil.rmtree(folder)
    folder.touch()
    error = fails(command_line, *arguments)
    assert f"error: {folder} can't be written" in error
    assert "training:" not in error


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("predict", ["--workdir={run}", "--out={long}.json", "a.png"]),
        ("predict", ["--workdir={run}", "--out={file}/x.csv", "a.png"]),
        ("predict", ["--workdir={run}", "--picture={file}/x.png", "a.png"]),
        ("features", ["--workdir={run}", "--output={long}.npz"]),
        ("features", ["--workdir={run}", "--output={folder}"]),
        ("inspect", ["{pets}", "--picture={file}/x.png"]),
        ("bench", ["pyramid", "--out={file}/x"]),
    ],
)
def test_outputs_that_can_t_be_written_are_told_before_the_work(
    command, arguments, digits_run, command_line, tmp_path
):
    places = {name: tmp_path / name for name in ("file", "folder", "pets")}
    places["file"].touch()
    places["folder"].mkdir()
    write_class_folders(places["pets"], 5)
    places |= {"run": digits_run, "long": tmp_path / ("n" * 255)}
    given = [part.format(**places) for part in arguments]
    result = command_line(command, *given, check=False, cwd=tmp_path)
    assert result.returncode in (1, 2)
    assert "can't be written" in result.stderr
    assert "Traceback" not in result.stderr
    assert not result.stdout


def start_training(workdir, *arguments):
    """`train` with two devices, as the first process of a session."""
    arguments = [*arguments, f"--workdir={workdir}"]
    return Started(run_command, "sppnet_jax.train", arguments)


def count_rows(workdir):
    metrics = workdir / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def fails(command_line, *arguments, command="train", **options):
    result = command_line(command, *arguments, check=False, **options)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a config: --config=configs/digits.py"),
        (["--config=configs/nothing.py"], "configs/nothing.py"),
        (
            ["--config=configs/digits.py", "--config.batchsize=8"],
            "unknown field 'batchsize': config has the fields seed, epochs, ",
        ),
        (["--config=configs/digits.py", "--config.batch_size=many"], "batch_size=many"),
        (
            ["--config=configs/digits.py", "--config.momentum=0.8"],
            "unknown field 'momentum': it is now config.optimizer.momentum",
        ),
        (["--config=configs/imagenet.py:zf5,sspp"], "unknown recipe 'sspp'"),
        (["--config=configs/digits.py"], "give the folder of the run: --workdir"),
    ],
)
def test_mistakes_in_the_config_are_named(arguments, message, command_line):
    assert message in fails(command_line, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --workdir", "Missing value for flag --workdir"),
        ("train --wordir=x", "Unknown command line flag 'wordir'. Did you mean"),
        ("train --config={folder}", "there is no config file {folder}"),
        (
            "train --config={folder}/nothing.py --config.seed=1",
            "there is no config file",
        ),
        ("train --config={folder}/nothing.txt --config.seed=1", "SyntaxError"),
        (
            "train --config={folder}/empty.py --config.seed=1",
            "no attribute 'get_config'",
        ),
        ("train --config={folder}/none.py", "must return an ml_collections.ConfigDict"),
        ("train --config=configs/detect_digits.py", "the config of a detector"),
        (
            "train --config=configs/detect_digits.py --config.epochs=3",
            "no epochs: is it",
        ),
        ("detect train --config=configs/digits.py", "the config of a classifier"),
        (
            "detect train --config=configs/digits.py --config.context=3",
            "no context: is",
        ),
        ("train --config=configs/digits.py --process_count=2", "must find each other"),
        ("train --config=configs/digits.py --coordinator=auto", "clusters that JAX"),
        ("train --config=configs/digits.py --coordinator=x", "no address of process 0"),
        ("train --config=configs/digits.py --config.data.root=x", "which is no folder"),
        ("train --config=configs/digits.py --config.schedule.learning_rate=nan", "nan"),
        ("train --config=configs/digits.py --config.sizes=64px", "sizes must be sides"),
        ("detect nonsense --config=configs/digits.py", "say what to do"),
        ("evaluate", "give the folder of the run: --workdir"),
        ("predict photo.jpg --trunk=nonsense", "unknown backbone 'nonsense'"),
        ("inspect", "the following arguments are required: FOLDER"),
        ("bench nonsense", "unknown suite 'nonsense'"),
    ],
)
def test_a_command_line_that_cannot_be_meant_ends_with_2_and_one_line(
    arguments, message, command_line, tmp_path
):
    (tmp_path / "nothing.txt").write_text("no Python")
    (tmp_path / "empty.py").touch()
    (tmp_path / "none.py").write_text("def get_config():\n    return None\n")
    before = set(tmp_path.iterdir())
    command, *given = arguments.format(folder=tmp_path).split()
    if command in ("train", "detect") and given[-1] != "--workdir":
        given.append(f"--workdir={tmp_path / 'run'}")
    result = command_line(command, *given, check=False)
    assert result.returncode == 2
    *_, error = result.stderr.splitlines()
    assert message.format(folder=tmp_path) in error
    assert "Traceback" not in result.stderr
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("command", "own"),
    [
        ("train", "--workdir"),
        ("evaluate", "--protocol"),
        ("predict", "--picture"),
        ("features", "--layer"),
        ("detect", "--score"),
        ("export", "--format"),
        ("inspect", "FOLDER"),
        ("bench", "SUITE"),
    ],
)
def test_help_says_what_a_command_does_and_begins_with_its_own_flags(
    command, own, command_line
):
    result = command_line(command, "--help")
    assert result.returncode == 0
    assert f"python -m sppnet_jax.{command}" in result.stdout
    if command in ("inspect", "bench"):  # argparse's
        assert own in result.stdout
        return
    assert re.findall(r"^(--\S+): ", result.stdout, re.MULTILINE)[0] == own
    assert "    seed=0\n" in result.stdout


def test_a_flag_that_is_given_twice_is_told(command_line, tmp_path):
    given = "--config=configs/digits.py", "--config.seed=1", "--config.seed=2"
    error = fails(command_line, *given, "--coordinator=x", f"--workdir={tmp_path}")
    assert "--config.seed is given 2 times: the last counts" in error


@pytest.mark.parametrize("config", ["configs/nothing.py", "configs/digits.py"])
def test_they_are_named_before_anything_is_loaded(config, command_line):
    error = fails(
        command_line,
        f"--config={config}",
        "--config.batchsize=8",
        imported=False,
        environment={"PYTHONPROFILEIMPORTTIME": "1"},
    )
    assert "config" in error.splitlines()[-1]
    assert "sppnet_jax.run.settings" in error
    for heavy in ("grain", "orbax", "tensorflow_datasets", "matplotlib"):
        assert not re.search(rf"\| +{heavy}\b", error), heavy


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (digits.get_config(), {"data.image_size": 16}, "small .* it needs at least 29"),
        (digits.get_config(), {"sizes": (64, 80)}, "more than config.data.image_size"),
        (digits.get_config(), {"sizes": ("uniform", 53, 55)}, "no multiple of 4 from"),
        (imagenet.get_config("zf5,no_spp"), {"sizes": (224, 180)}, "without a pyramid"),
        (folder.get_config(), {}, "--config.data.root=FOLDER"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config, changes, message):
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        read(NetworkSettings, config.to_dict())


def test_a_refused_command_leaves_the_run_as_it_was(digits_run, command_line):
    before = (digits_run / "config.json").read_text()
    changes = {
        "--config.model.levels=(2, 1)": "fc6/kernel: checkpoint (250, 82), config (25,",
        "--config.batch_size=16": "can't go on with batch_size=16",
        "--config.data.train_split=train[:5000]": "was trained on other data",
    }
    for change, message in changes.items():
        assert message in fails(
            command_line,
            "--config=configs/digits.py",
            f"--workdir={digits_run}",
            *SMALL,
            change,
        )
    assert (digits_run / "config.json").read_text() == before


def test_a_value_of_another_kind_in_a_config_file_is_named_with_the_file(
    command_line, tmp_path
):
    path = tmp_path / "mine.py"
    for line, message in (
        ('config.schedule = "cosine"', "config.schedule is now config.schedule.kind"),
        ("config.model.levels = 6", "field 'levels' (reference). 6 is of"),
        ('raise ValueError("not today")', f"can't read the config {path}: not today"),
    ):
        path.write_text(
            "from sppnet_jax.cli import base_config\n"
            "def get_config():\n"
            "    config = base_config()\n"
            f"    {line}\n"
            "    return config\n"
        )
        error = fails(command_line, f"--config={path}", f"--workdir={tmp_path / 'run'}")
        assert message in error
        assert f"can't read the config {path}: " in error


def test_an_unknown_field_in_a_config_file_is_named(command_line, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from sppnet_jax.cli import base_config\n"
        "def get_config():\n"
        "    config = base_config()\n"
        "    config.epohcs = 5\n"
        "    return config\n"
    )
    error = fails(command_line, f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert "unknown field 'epohcs': config has the fields seed, epochs" in error


def test_ctrl_c_with_worker_processes_saves_a_checkpoint(tmp_path, digit_scenes_dir):
    arguments = [
        "--config=configs/digits.py",
        *SMALL,
        "--config.data.workers=2",
    ]
    process = start_training(tmp_path, *arguments)
    process.wait_until(lambda: count_rows(tmp_path) > 20)
    process.send(signal.SIGINT, to_all=True)  # as a terminal does
    result = process.end()
    assert result.returncode == 1
    assert "the same command goes on from there" in result.stderr
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert int(checkpoint.name) >= 20


def test_a_folder_that_was_never_trained_in_says_so(command_line, tmp_path):
    for command, *paths in (["evaluate"], ["predict", "a.jpg"], ["features"]):
        given = f"--workdir={tmp_path}", *paths
        error = fails(command_line, *given, command=command, imported=False)
        assert "holds no trained run" in error


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_go_on_together(
    digit_scenes_dir, command_line, tmp_path
):
    """Two processes with two devices each, against one with four, across a resume."""
    arguments = [
        "--config=configs/digits.py",
        *SMALL,
        "--config.model.dropout=0.0",  # its random numbers go by device
        "--config.inputs.color_sigma=0.0",
    ]
    together, alone = tmp_path / "together", tmp_path / "alone"
    command_line(
        "train",
        *arguments,
        f"--workdir={alone}",
        "--config.max_steps=6",
        devices=4,
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for steps in (3, 6):
        with ThreadPoolExecutor(2) as pool:
            runs = [
                pool.submit(
                    command_line,
                    "train",
                    *arguments,
                    f"--workdir={together}",
                    f"--config.max_steps={steps}",
                    f"--coordinator=localhost:{port}",
                    f"--process_index={index}",
                    "--process_count=2",
                )
                for index in range(2)
            ]
            for run in runs:
                run.result()
    expected = losses(alone)
    assert losses(together).keys() == expected.keys()
    for step, loss in losses(together).items():
        assert loss == pytest.approx(expected[step], rel=1e-4), step


PROGRAM = """
import jax, jax.numpy as jnp
from sppnet_jax import cli
from sppnet_jax.training.network_settings import NetworkSettings

def main(argv):
    jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
    print(jax.config.jax_compilation_cache_dir)

cli.run(main, NetworkSettings)
"""


def start_a_program(cache_home, **environment):
    """A command line of one small program, as the first in a user's cache folder."""
    given = {
        "XDG_CACHE_HOME": str(cache_home),
        "JAX_COMPILATION_CACHE_DIR": "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_LOG_COMPILES": "1",
    }
    return run_program(PROGRAM, **{**given, **environment})


def test_a_second_start_loads_its_programs_from_the_user_s_cache_folder(tmp_path):
    hit = "Persistent compilation cache hit for 'jit__lambda'"
    first = start_a_program(tmp_path)
    folder = tmp_path / "sppnet_jax" / "jax"
    assert first.stdout.strip() == str(folder)
    assert hit not in first.stderr
    kept = sorted(folder.iterdir())
    assert any(path.name.startswith("jit__lambda") for path in kept)
    assert hit in start_a_program(tmp_path).stderr
    assert sorted(folder.iterdir()) == kept


def test_the_cache_is_where_jax_was_told_and_off_where_it_was_told(tmp_path):
    elsewhere = str(tmp_path / "elsewhere")
    given = start_a_program(tmp_path, JAX_COMPILATION_CACHE_DIR=elsewhere)
    assert given.stdout.strip() == elsewhere
    off = start_a_program(tmp_path, JAX_ENABLE_COMPILATION_CACHE="0")
    assert off.stdout.strip() in ("", "None")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_a_cache_folder_that_can_t_be_made_is_a_warning(tmp_path):
    file = tmp_path / "file"
    file.touch()
    result = start_a_program(file)
    assert result.stdout.strip() in ("", "None")
    assert "compiled programs are not kept" in result.stderr
    assert str(file) in result.stderr


def test_a_damaged_program_in_the_cache_is_compiled_anew(tmp_path):
    start_a_program(tmp_path)
    for path in (tmp_path / "sppnet_jax" / "jax").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert "Error reading persistent" in start_a_program(tmp_path).stderr


def test_a_run_s_folder_in_that_of_its_images_is_refused(command_line, tmp_path):
    write_two_colors(tmp_path / "photos", 40, 48)
    error = fails(
        command_line,
        "--config=configs/folder.py",
        f"--config.data.root={tmp_path / 'photos'}",
        f"--workdir={tmp_path / 'photos' / 'run'}",
        *SMALL,
    )
    assert "lies in that of the images" in error
    assert not (tmp_path / "photos/run").exists()


def test_nothing_that_a_command_reads_is_written_over(
    command_line, digits_run, tmp_path
):
    write_images(tmp_path, "photo.png")
    photo, config = tmp_path / "photo.png", digits_run / "config.json"
    before = photo.read_bytes(), config.read_bytes()
    run = f"--workdir={digits_run}"
    given = [run, f"--picture={photo}", photo]
    assert "is one of the photo" in fails(command_line, *given, command="predict")
    given = [run, f"--output={config}"]
    assert "give a file .npz" in fails(command_line, *given, command="features")
    given = [run, f"--out={config}", "--format=onnx"]
    assert "give a file .onnx" in fails(command_line, *given, command="export")
    assert (photo.read_bytes(), config.read_bytes()) == before


@pytest.mark.parametrize(
    ("command", "argument"),
    [("features", "--side=10000000"), ("evaluate", "--scales=99999999999999999999")],
)
def test_a_side_that_no_image_can_have_is_no_broken_image(
    command, argument, command_line, digits_run
):
    error = fails(
        command_line,
        f"--workdir={digits_run}",
        "--config.data.test_split=test[:3]",
        argument,
        command=command,
    )
    assert "pixels are not made: give 1 to 8,191" in error


def test_a_workdir_may_have_a_comma(command_line, digits_run, tmp_path):
    write_images(tmp_path, "photo.png")
    (tmp_path / "a,b").symlink_to(digits_run)
    command_line("predict", f"--workdir={tmp_path / 'a,b'}", tmp_path / "photo.png")


def test_sigterm_ends_any_command_with_a_sentence(digits_run, tmp_path):
    write_images(tmp_path, *(f"{number}.png" for number in range(300)))
    arguments = [
        f"--workdir={digits_run}",
        f"--out={tmp_path}/found.csv",
        f"{tmp_path}",
    ]
    process = Started(run_command, "sppnet_jax.predict", arguments)
    process.wait_until(lambda: process.printed().count("\n") > 3)
    process.send(signal.SIGTERM)
    ended = process.end()
    assert ended.returncode == 1, ended.stderr
    assert "interrupted" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_error_that_says_nothing_is_named():
    assert reason(MemoryError("std::bad_alloc")) == "out of memory (std::bad_alloc)"
    assert reason(MemoryError()) == "out of memory"
    assert reason(RuntimeError()) == "RuntimeError"
    assert reason(ValueError("two sizes")) == "two sizes"
