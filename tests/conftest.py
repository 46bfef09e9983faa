"""Four host devices, shapes checked at run time, data prepared once a session."""

import itertools
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from tests.processes import REPOSITORY, Finished, Started, run_command, start_anew

# Tests compile more than they compute. `XLA_FLAGS= make test` compiles as for users.
SOON = "--xla_backend_optimization_level=0"
if tuple(map(int, version("jax").split(".")[:2])) < (0, 11):  # later ones abort
    SOON += " --xla_cpu_use_fusion_emitters=false"
FLAGS = os.environ.get("XLA_FLAGS", SOON)
os.environ["XLA_FLAGS"] = f"{FLAGS} --xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
# Many tests and command lines compile the same programs: once is enough.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(REPOSITORY / ".cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["XDG_CACHE_HOME"] = str(REPOSITORY / ".cache")

import pytest
from jaxtyping import install_import_hook

# The shapes in the annotations are claims too: check them wherever a test goes.
# (pyramid/pooling.py checks what it is given by itself.)
install_import_hook(
    ["sppnet_jax.network.model", "sppnet_jax.network.preprocess"], "beartype.beartype"
)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """One folder for all worker processes of a test session."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def digit_scenes_dir(shared_folder) -> str:
    """Where TFDS keeps what the tests prepare; also the default of every test."""
    folder = str(shared_folder / "tensorflow_datasets")
    os.environ["TFDS_DATA_DIR"] = folder
    return folder


SMALL = [
    "--config.model.width=0.02",
    "--config.data.image_size=32",
    "--config.data.resize_side=36",
    "--config.batch_size=8",
    "--config.log_steps=1",
]


@pytest.fixture(scope="module")
def shallow_zf5() -> Iterator[None]:
    """The name zf5 means a shallow network in this process."""
    from sppnet_jax.network import trunks  # below the hook
    from tests.network_helpers import SHALLOW

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(trunks.BACKBONES, "zf5", SHALLOW)
        yield


@pytest.fixture(scope="module")
def tiny_trunk(tmp_path_factory) -> Iterator[Path]:
    """A file of weights of the tiny trunk, which TINY_TRUNK means in this process."""
    from sppnet_jax.network import trunks  # below the hook
    from tests.network_helpers import TINY, TINY_TRUNK, write_tiny_weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(trunks.BACKBONES, TINY_TRUNK, TINY)
        yield write_tiny_weights(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


@pytest.fixture(scope="session")
def few_scenes(tmp_path_factory) -> Path:
    """Where TFDS finds the embedded data set, 16 scenes of each split."""
    from sppnet_jax.data.digit_scenes import DigitScenes
    from sppnet_jax.data.sources import open_source

    folder = tmp_path_factory.mktemp("tfds")
    made = DigitScenes._generate_examples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            DigitScenes,
            "_generate_examples",
            lambda self, split: itertools.islice(made(self, split), 16),
        )
        for kind in ("classification", "detection"):
            with_boxes = kind == "detection"
            name = f"digit_scenes/{kind}"
            open_source(name, "test", data_dir=str(folder), multi_label=with_boxes)
    return folder


@pytest.fixture(scope="session")
def digits_run(command_line, digit_scenes_dir, tmp_path_factory) -> Path:
    """The folder of three steps on the digit scenes, with two devices."""
    workdir = tmp_path_factory.mktemp("digits")
    given = ("--config=configs/digits.py", f"--workdir={workdir}", *SMALL)
    command_line("train", *given, "--config.max_steps=3")
    return workdir


@pytest.fixture(scope="session")
def command_line():
    """Runs `python -m sppnet_jax.COMMAND …` as a user would; returns the result.

    `imported`: whether the process starts with the libraries of others imported.
    `how`: what is called there with the module and the arguments.
    """

    def run(
        command, *arguments, check=True, timeout=300, imported=True, how=None, **options
    ) -> Finished:
        module, arguments = f"sppnet_jax.{command}", [str(part) for part in arguments]
        how = how or (run_command if imported else start_anew)
        result = Started(how, module, arguments, **options).end(timeout)
        if check and result.returncode:
            raise AssertionError(
                f"{command} ended with {result.returncode}\n{result.stdout}\n"
                f"{result.stderr}"
            )
        return result

    return run
