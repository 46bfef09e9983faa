"""How a command starts and ends: what it imports, and when garbage is collected."""

import gc

import cv2

from configs import digits
from sppnet_jax import cli
from tests.data_helpers import picture
from tests.network_helpers import write_network
from tests.processes import import_times, run_command

# What training, testing and drawing take, each a tenth of a second or more.
NOT_NEEDED = (
    *("orbax", "tensorflow_datasets", "grain", "sklearn", "scipy", "pandas", "optax"),
    *("matplotlib", "tensorboardX", "onnx", "torch", "IPython"),
)


def write_small_network(folder):
    config = digits.get_config()
    config.model.width = 0.02
    cv2.imwrite(str(folder / "photo.png"), picture(60, 80))
    return write_network(folder / "run", config)


def test_predict_imports_nothing_that_it_has_no_need_of(tmp_path, command_line):
    run = write_small_network(tmp_path)
    arguments = f"--workdir={run}", tmp_path / "photo.png"
    result = command_line("predict", *arguments, how=import_times)
    assert "photo.png (80×60 pixels)" in result.stdout
    imported = {line.split()[-1].split(".")[0] for line in result.stderr.splitlines()}
    assert {"sppnet_jax", "jax", "cv2"} <= imported
    assert not imported & set(NOT_NEEDED)


def run_and_tell(module, arguments):
    """Runs a command, and says whether garbage is collected at its end."""
    try:
        run_command(module, arguments)
    finally:
        print("collects" if gc.isenabled() else "does not collect")
        print("modules were left out" if gc.get_freeze_count() else "of everything")


def test_a_command_collects_garbage_when_all_is_imported(tmp_path, command_line):
    arguments = f"--workdir={write_small_network(tmp_path)}", tmp_path / "photo.png"
    result = command_line("predict", *arguments, how=run_and_tell)
    assert result.stdout.endswith("collects\nmodules were left out\n")


def test_a_program_that_imports_a_command_collects_garbage_as_before():
    assert cli.run
    assert gc.isenabled()
    assert not gc.get_freeze_count()
