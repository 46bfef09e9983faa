"""Weight files of others, read without executing anything that they hold.

Every size that a file declares is compared with the file's own before memory is taken.
"""

import importlib.util
import io
import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.numpy

from sppnet_jax.network.torch_files import read_old_format, read_zip_format
from sppnet_jax.run.files import whole_file

_SUFFIXES = (".pth", ".safetensors", ".npz", ".h5")
_MIB = 2**20


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors, .npz, .h5 or PyTorch file (.pth, .pt, .bin).

    The content tells the kind, not the name. Of a PyTorch checkpoint, the tensors under
    `state_dict` or `model` where there is such an entry; names of an .h5 are joined by
    "/"; what is no number is left out. An .h5 takes h5py.
    Returns: arrays by name, bfloat16 as float32; some share memory and are read-only.

    Raises: FileNotFoundError; ValueError for a file that is damaged, holds no tensors,
    names what is to be executed, or declares what it does not have.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no weight file {path}")
    with path.open("rb") as file:
        head = file.read(9)
    try:
        tensors = _read(path, path.stat().st_size, head)
    # Whatever a damaged file leads to, in here and in the libraries.
    except Exception as error:
        why = str(error)[:400]
        if type(error) is not ValueError:
            kind = type(error).__name__
            why = f"it is damaged, or of a kind that is not read ({kind}: {why})"
        raise ValueError(f"cannot read the weights of {path}: {why}") from error
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    return {name: _plain(tensor) for name, tensor in tensors.items()}


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] = {},
) -> None:
    """Writes tensors by name, and words about them, as a .safetensors file.

    A write that fails leaves what was there.
    """
    # The library writes an array's memory as it lies, whatever its strides.
    dense = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    with whole_file(Path(path).expanduser()) as file:
        file.write(safetensors.numpy.save(dense, dict(metadata) or None))


def read_metadata(path: str | Path) -> dict[str, str]:
    """The words beside the tensors of a .safetensors file; {} of other files."""
    try:
        with safetensors.safe_open(Path(path).expanduser(), "np") as file:
            return file.metadata() or {}
    except (OSError, safetensors.SafetensorError):  # read_tensors says what is wrong
        return {}


def find_weights(where: str) -> Path:
    """The weight file that a text names.

    `where`: a path; `package:NAME`, the one weight file of an installed package, which
    is not imported; `hub:OWNER/NAME` or `hub:OWNER/NAME/FILE`, of the Hugging Face Hub,
    by its library `huggingface_hub`, which needs FILE where there is no network.

    Raises: FileNotFoundError, which says what to install where that is why.
    """
    kind, _, name = where.partition(":")
    if kind == "package":
        return _find_in_package(name)
    if kind == "hub":
        return _find_on_hub(name)
    path = Path(where).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no weight file {path}: give a file's path, package:NAME, "
            "hub:OWNER/NAME or hub:OWNER/NAME/FILE"
        )
    return path


def _read(path: Path, size: int, head: bytes) -> dict[str, np.ndarray]:
    if not size:
        raise ValueError("it is empty")
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(path, size)
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return _read_h5(path, size)
    if head[8:] == b"{":
        return safetensors.numpy.load_file(path)
    if head.startswith(b"\x80"):
        return read_old_format(path, size)
    raise ValueError(
        f"it begins with {head!r}, and is no .safetensors, .npz, .h5 or PyTorch file"
    )


class _ZipFile(io.FileIO):
    """A file whose reads are bounded, as a zip's list of members is read at once.

    Each member takes far more memory than its line of that list.
    """

    most = 4 * _MIB

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self.most:
            raise ValueError("its list of members is too long")
        return super().read(size) or b""


def _read_zip(path: Path, size: int) -> dict[str, np.ndarray]:
    with _ZipFile(path) as file, zipfile.ZipFile(file) as archive:
        file.most = size
        if any(name.endswith("/data.pkl") for name in archive.namelist()):
            return read_zip_format(archive, size)
        return _read_npz(archive, size)


def _read_npz(archive: zipfile.ZipFile, size: int) -> dict[str, np.ndarray]:
    members = archive.infolist()
    _check_memory(sum(member.file_size for member in members), size)
    arrays = {}
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("it is compressed as NumPy compresses none")
        with archive.open(member) as file:
            array = _read_npy(file, member)
        if array.dtype.kind not in "SU":
            arrays[member.filename.removesuffix(".npy")] = array
    return arrays


def _read_npy(file: IO[bytes], member: zipfile.ZipInfo) -> np.ndarray:
    name = member.filename[:80]
    # Another version has a header of any length, and is for arrays of records.
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{name} is not an array of numbers as NumPy writes them")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.kind not in "biufcSU":
        raise ValueError(f"{name} holds {str(dtype)[:80]}, not numbers: it is not read")
    wanted = math.prod(shape) * dtype.itemsize
    if any(length < 0 for length in shape) or wanted > member.file_size:
        raise ValueError(f"{name} is declared larger than it is")
    # Only so many bytes are inflated as are asked for.
    data = file.read(wanted)
    if len(data) != wanted or file.read(1):
        raise ValueError(f"{name} has another size than it declares")
    return np.ndarray(shape, dtype, data, order="F" if is_fortran else "C")


def _read_h5(path: Path, size: int) -> dict[str, np.ndarray]:
    try:
        import h5py
    except ImportError as error:
        raise ValueError("to read HDF5 takes h5py: pip install h5py") from error
    arrays = {}
    memory = 0
    with h5py.File(path, "r") as file:
        for name, dataset in _h5_datasets(file):
            # Filters may be any library of this machine, and inflate.
            filters = dataset.id.get_create_plist().get_nfilters()
            if dataset.is_virtual or dataset.external or filters:
                raise ValueError(
                    f"{name[:80]} is compressed, virtual or in another file; only what "
                    "is stored as it is, in the file, is read"
                )
            chunk = math.prod(dataset.chunks or ())
            memory += (dataset.size + chunk) * dataset.dtype.itemsize
            _check_memory(memory, size)
            if dataset.dtype.kind in "biuf":
                arrays[name] = np.asarray(dataset[()])
    return arrays


def _h5_datasets(file: Any) -> Iterator[tuple[str, Any]]:
    """The datasets that a file itself holds, each group's once, also in a circle."""
    import h5py

    groups, seen = [("", file)], set()
    while groups:
        prefix, group = groups.pop()
        address = h5py.h5o.get_info(group.id).addr
        if address in seen:
            continue
        seen.add(address)
        for name in group:
            whole = f"{prefix}{name}"
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"{whole[:80]} is a link, and links are refused")
            found = group[name]
            if isinstance(found, h5py.Group):
                groups.append((f"{whole}/", found))
            elif isinstance(found, h5py.Dataset) and found.shape is not None:
                yield whole, found


def _check_memory(wanted: int, size: int) -> None:
    if wanted > 4 * size + 16 * _MIB:
        raise ValueError(
            f"its arrays would take {wanted} bytes, far more than the file's {size}"
        )


def _plain(array: np.ndarray) -> np.ndarray:
    """The same numbers as a type of NumPy's own, in this machine's byte order."""
    if array.dtype.name == "bfloat16":
        return array.astype(np.float32)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _find_in_package(name: str) -> Path:
    module = name.replace("-", "_")
    # A dotted name would import its parent.
    if not module.isidentifier():
        raise FileNotFoundError(
            f"package:{name} names no package, as package:NAME does"
        )
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise FileNotFoundError(
            f"package:{name} is not installed: pip install {module.replace('_', '-')}"
        )
    folders = list(spec.submodule_search_locations or ())
    files = sorted(
        path
        for folder in folders
        for path in Path(folder).rglob("*")
        if path.suffix in _SUFFIXES and path.is_file()
    )
    if len(files) == 1:
        return files[0]
    listed = "".join(f"\n    {path}" for path in files[:20])
    hint = (
        f": give the path of one of{listed}" if files else f" ({' '.join(_SUFFIXES)})"
    )
    raise FileNotFoundError(f"package:{name} holds {len(files)} weight files{hint}")


def _find_on_hub(name: str) -> Path:
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if not owner or not repository:
        raise FileNotFoundError(
            f"hub:{name} is incomplete: give hub:OWNER/NAME or hub:OWNER/NAME/FILE"
        )
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise FileNotFoundError(
            f"hub:{name} takes huggingface_hub: pip install huggingface_hub"
        ) from error
    whole = f"{owner}/{repository}"
    try:
        file = file or _choose(hub.list_repo_files(whole))
        return Path(hub.hf_hub_download(whole, file))
    # The library has a dozen kinds of errors, from the network's to the account's.
    except Exception as error:
        raise FileNotFoundError(f"hub:{name} was not found: {error}") from error


def _choose(files: list[str]) -> str:
    """The weight file among a repository's."""
    for only in ("model.safetensors", None, "pytorch_model.bin"):
        found = [x for x in files if x == only]
        if only is None:
            found = [x for x in files if x.endswith(".safetensors")]
        if len(found) == 1:
            return found[0]
    raise FileNotFoundError(
        "it has no model.safetensors, no single other .safetensors and no "
        f"pytorch_model.bin; give one as hub:OWNER/NAME/FILE of {', '.join(files[:50])}"
    )
