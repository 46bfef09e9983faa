"""Weight files are read as they were written, and nothing in them is executed.

PyTorch's files are made here by hand, of opcodes and of bytes, without PyTorch.
"""

import io
import json
import os
import pickle
import struct
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.numpy

from sppnet_jax.network import torch_files
from sppnet_jax.network.weight_files import find_weights, read_tensors, write_tensors

MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
NUMBERS = np.arange(24, dtype=np.float32)
MIB = 2**20


class Stored(NamedTuple):
    """A tensor as PyTorch writes it: a part of a storage."""

    kind: str
    key: str
    raw: bytes
    elements: int
    offset: int
    shape: tuple
    strides: tuple


def stored(array, kind="Float", key=None, offset=0, shape=None, strides=None) -> Stored:
    """A whole array, or a part of it, in a storage of its own."""
    shape = array.shape if shape is None else shape
    if strides is None:
        strides = tuple(step // array.itemsize for step in array.strides)
    key = str(id(array)) if key is None else key
    return Stored(kind, key, array.tobytes(), array.size, offset, shape, strides)


def call(module: str, name: str, *arguments) -> types.SimpleNamespace:
    """What a pickle is to call when it is read."""
    return types.SimpleNamespace(module=module, name=name, arguments=arguments)


def opcodes(value) -> bytes:
    """A value in pickle's opcodes: an oracle that shares nothing with the reader."""
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int() if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        case int():
            digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(digits)]) + digits
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case Stored():
            storage = opcodes(("storage",))[1:-1] + b"ctorch\n%sStorage\n" % (
                value.kind.encode()
            )
            rest = (value.key, "cpu", value.elements)
            storage = b"(" + storage + b"".join(map(opcodes, rest)) + b"tQ"
            part = opcodes(value.offset) + opcodes(value.shape) + opcodes(value.strides)
            hooks = opcodes(call("collections", "OrderedDict"))
            rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
            return rebuild + storage + part + b"\x89" + hooks + b"tR"
        case types.SimpleNamespace():
            named = f"c{value.module}\n{value.name}\n".encode()
            return named + opcodes(value.arguments) + b"R"
        case tuple():
            return b"(" + b"".join(map(opcodes, value)) + b"t"
        case list():
            return b"](" + b"".join(map(opcodes, value)) + b"e"
        case dict():
            items = (part for pair in value.items() for part in pair)
            return b"}(" + b"".join(map(opcodes, items)) + b"u"
    raise TypeError(value)


def pickled(value) -> bytes:
    return b"\x80\x02" + (value if isinstance(value, bytes) else opcodes(value)) + b"."


def storages_of(value) -> dict[str, Stored]:
    """The first tensor of every storage in nested dictionaries."""
    found: dict[str, Stored] = {}
    for inner in value.values() if isinstance(value, dict) else ():
        one = {inner.key: inner} if isinstance(inner, Stored) else storages_of(inner)
        found = one | found
    return found


def old_format(value, storages=None, keys=None, system=SYSTEM) -> bytes:
    """The bytes of a file before PyTorch 1.6; `value`: also the opcodes themselves."""
    storages = storages_of(value) if storages is None else storages
    parts = [MAGIC, 1001, system, value, list(storages) if keys is None else keys]
    numbers = (struct.pack("<q", x.elements) + x.raw for x in storages.values())
    return b"".join(map(pickled, parts)) + b"".join(numbers)


def zip_format(value, storages=None, how=zipfile.ZIP_STORED) -> bytes:
    """The bytes of a file since PyTorch 1.6; `value`: also the opcodes themselves."""
    storages = storages_of(value) if storages is None else storages
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        archive.writestr("archive/data.pkl", pickled(value))
        archive.writestr("archive/byteorder", "little")
        for key, tensor in storages.items():
            archive.writestr(f"archive/data/{key}", tensor.raw)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


FORMATS = pytest.mark.parametrize("write", [old_format, zip_format])


@pytest.fixture
def read(tmp_path):
    """Reads bytes as a weight file."""

    def read_bytes(data: bytes, name="weights.bin"):
        path = tmp_path / name
        path.write_bytes(data)
        return read_tensors(path)

    return read_bytes


def assert_same(found, wanted):
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array)


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def members(how=zipfile.ZIP_STORED, **contents: bytes) -> bytes:
    """A zip of .npy members, whatever is in them."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, content in contents.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def npy_header(shape: str, dtype="<f4") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def safe_bytes(header, data=b"", length=None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def h5_bytes(fill) -> bytes:
    h5py = pytest.importorskip("h5py")
    file = io.BytesIO()
    with h5py.File(file, "w") as root:
        fill(root)
    return file.getvalue()


@FORMATS
def test_tensors_of_every_number_type_are_read(write, read):
    kinds = {
        "Float": "f4",
        "Double": "f8",
        "Half": "f2",
        "Long": "i8",
        "Int": "i4",
        "Short": "i2",
        "Char": "i1",
        "Byte": "u1",
        "Bool": "?",
    }
    arrays = {
        kind: np.arange(-3, 3).reshape(2, 3).astype(dtype)
        for kind, dtype in kinds.items()
    }
    found = read(write({kind: stored(arrays[kind], kind) for kind in kinds}))
    assert_same(found, arrays)


@FORMATS
def test_bfloat16_becomes_float32(write, read):
    exact = np.array([0, -1.5, 3.140625, 2.0**100, np.inf], np.float32)
    upper = (exact.view(np.uint32) >> 16).astype(np.uint16)
    assert_same(read(write({"a": stored(upper, "BFloat16")})), {"a": exact})


@FORMATS
def test_parts_of_one_storage_are_read_where_they_lie(write, read):
    whole = NUMBERS.reshape(2, 3, 4)
    parts = {
        "whole": whole,
        "turned": whole.transpose(2, 0, 1),
        "cut": whole[1:, ::2, 1:3],
        "one": whole[1, 2, 3:].reshape(()),
        "none": whole[:0],
    }
    tensors = {}
    for name, part in parts.items():
        offset = part.ctypes.data - whole.ctypes.data if part.size else 0
        strides = tuple(step // 4 for step in part.strides)
        tensors[name] = stored(NUMBERS, "Float", "0", offset // 4, part.shape, strides)
    assert_same(read(write(tensors)), parts)


@FORMATS
@pytest.mark.parametrize("inside", ["state_dict", "model"])
def test_the_state_dict_of_a_checkpoint_is_taken_and_nothing_else(write, inside, read):
    weights, momentum = NUMBERS[:3].copy(), NUMBERS[5:9].copy()
    checkpoint = {
        "epoch": 3,
        "best": 0.5,
        "optimizer": {0: stored(momentum, key="m")},
        inside: {"fc.weight": stored(weights), "steps": 7, "name": "net"},
    }
    assert_same(read(write(checkpoint)), {"fc.weight": weights})


def parameter(tensor: Stored) -> types.SimpleNamespace:
    hooks = call("collections", "OrderedDict")
    return call("torch._utils", "_rebuild_parameter", tensor, True, hooks)


@FORMATS
def test_ordered_dictionaries_parameters_and_their_attributes_are_read(write, read):
    tensor = stored(NUMBERS, key="0")
    pairs = [["a", parameter(tensor)]]
    for made in (call("collections", "OrderedDict", pairs), {"a": parameter(tensor)}):
        versions = opcodes({"_metadata": {"": 1}, "__class__": 3, "items": None})
        value = opcodes(made) + versions + b"b"
        assert_same(read(write(value, {"0": tensor})), {"a": NUMBERS})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle_is_read(protocol, read):
    # Python's own pickler writes, where the objects' names are those of PyTorch.
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    class FloatStorage:
        __module__, __qualname__ = "torch", "FloatStorage"

    def _rebuild_tensor_v2(*arguments):
        raise AssertionError("executed")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    torch.FloatStorage, utils._rebuild_tensor_v2 = FloatStorage, _rebuild_tensor_v2

    class Tensor:
        def __reduce__(self):
            return _rebuild_tensor_v2, (self, 0, (2, 3), (3, 1), False, {})

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            # A tensor is met once to be reduced, and then as its own storage.
            if isinstance(value, Tensor):
                if value in seen:
                    return "storage", FloatStorage, "0", "cpu", 6
                seen.append(value)
            return None

    seen: list[Tensor] = []
    file = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", torch)
        patch.setitem(sys.modules, "torch._utils", utils)
        Pickler(file, protocol).dump({"a": Tensor(), "lr": 0.5, "big": 2**70})
    raw = file.getvalue()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("x/data.pkl", raw)
        members.writestr("x/data/0", NUMBERS[:6].tobytes())
    assert_same(read(archive.getvalue()), {"a": NUMBERS[:6].reshape(2, 3)})


def test_what_is_written_is_read_with_its_metadata(tmp_path):
    arrays = {
        "turned": NUMBERS.reshape(4, 6).T,
        "cut": NUMBERS[::2],
        "one": np.asarray(np.float64(3)),
        "half": NUMBERS.astype(np.float16),
        "whole": np.arange(3),
    }
    path = tmp_path / "new" / "weights.safetensors"
    write_tensors(path, arrays, {"from": "a test"})
    found = read_tensors(path)
    assert_same(found, {name: arrays[name] for name in found})
    assert set(found) == set(arrays)
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"from": "a test"}


def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "weights.safetensors"
    write_tensors(path, {"a": NUMBERS})
    before = path.read_bytes()
    with pytest.raises(Exception, match="object"):
        write_tensors(path, {"a": np.array([None])})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_bfloat16_of_safetensors_becomes_float32(read):
    upper = (NUMBERS.view(np.uint32) >> 16).astype(np.uint16)
    header = {"a": {"dtype": "BF16", "shape": [24], "data_offsets": [0, 48]}}
    assert_same(read(safe_bytes(header, upper.tobytes())), {"a": NUMBERS})


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numbers_of_npz_are_read_and_words_are_left_out(save, tmp_path):
    arrays = {
        "a/b": NUMBERS.reshape(2, 12),
        "turned": NUMBERS.reshape(4, 6).T,
        "big": NUMBERS.astype(">f4"),
        "one": np.array(3),
        "none": np.zeros((0, 3)),
    }
    save(tmp_path / "x.npz", **arrays, words=np.array(["x"]))
    wanted = arrays | {"big": NUMBERS}
    assert_same(read_tensors(tmp_path / "x.npz"), wanted)


def test_datasets_of_h5_come_with_their_groups_names(read):
    def fill(root):
        root["conv/conv_1/kernel:0"] = NUMBERS.reshape(2, 3, 4)
        root["big"] = NUMBERS.astype(">f4")
        root["one"] = 3
        root["words"] = "left out"
        root.attrs["backend"] = "x"
        root["conv/again"] = root["conv"]  # a circle

    found = read(h5_bytes(fill))
    kernel = NUMBERS.reshape(2, 3, 4)
    wanted = {"big": NUMBERS, "conv/conv_1/kernel:0": kernel, "one": np.array(3)}
    assert_same({name: found[name] for name in sorted(found)}, wanted)


@pytest.mark.parametrize("name", ["x.pth", "x.npz", "x.h5", "x.safetensors", "x"])
def test_the_content_tells_the_kind_and_not_the_name(name, read):
    assert_same(read(npz(a=NUMBERS), name), {"a": NUMBERS})
    assert_same(read(zip_format({"a": stored(NUMBERS)}), name), {"a": NUMBERS})
    assert_same(read(old_format({"a": stored(NUMBERS)}), name), {"a": NUMBERS})
    assert_same(read(safetensors.numpy.save({"a": NUMBERS}), name), {"a": NUMBERS})


DANGEROUS = [
    ("os", "system"),
    ("posix", "system"),
    ("builtins", "eval"),
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("subprocess", "Popen"),
    ("torch", "load"),
    ("torch", "os.system.FloatStorage"),
    ("collections", "OrderedDict.__init__"),
    ("numpy", "load"),
]


@FORMATS
@pytest.mark.parametrize(("module", "name"), DANGEROUS)
@pytest.mark.parametrize("how", ["GLOBAL", "STACK_GLOBAL", "INST", "unused"])
def test_a_name_that_is_not_of_a_tensor_is_refused_and_not_executed(
    write, module, name, how, read, tmp_path
):
    target = tmp_path / "executed"
    command = f"touch {target}" if name == "system" else f"open({str(target)!r}, 'w')"
    tensor = stored(NUMBERS, key="0")
    named = f"c{module}\n{name}\n".encode()
    match how:
        case "GLOBAL":
            evil = named + opcodes((command,)) + b"R"
        case "STACK_GLOBAL":
            evil = (
                opcodes(module) + opcodes(name) + b"\x93" + opcodes((command,)) + b"R"
            )
        case "INST":
            evil = b"(" + opcodes(command) + b"i" + named[1:]
        case "unused":
            evil = named
    value = b"}(" + opcodes("a") + opcodes(tensor) + opcodes("b") + evil + b"u"
    wanted = "INST" if how == "INST" else f"{module}.{name}"
    with pytest.raises(ValueError, match=wanted) as error:
        read(write(value, {"0": tensor}))
    assert "weights.bin" in str(error.value)
    assert not target.exists()


def test_what_python_s_own_pickle_would_execute_is_not_executed(read, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        raw = pickle.dumps({"a": Evil()}, protocol)
        for data in (raw, b"\x80\x02" + raw, old_format(raw.removesuffix(b"."), {})):
            with pytest.raises(ValueError, match=r"weights\.bin"):
                read(data)
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x/data.pkl", raw)
        with pytest.raises(ValueError, match=r"weights\.bin"):
            read(file.getvalue())
    assert not (tmp_path / "executed").exists()


def test_arrays_of_objects_are_refused(read, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    for value in (np.array([Evil()]), np.zeros(2, [("x", object)])):
        with pytest.raises(ValueError, match="not numbers"):
            read(npz(a=NUMBERS, b=value))
    assert not (tmp_path / "executed").exists()


@FORMATS
def test_attributes_that_a_file_sets_are_not_set(write, read):
    before = torch_files._call, dict(vars(torch_files._call))
    named = b"ccollections\nOrderedDict\n"
    value = named + opcodes({"harm": 1}) + b"b"
    slots = named + b"N" + opcodes({"__init__": 1}) + b"\x86b"
    for evil in (value, slots):
        with pytest.raises(ValueError, match=r"weights\.bin"):
            read(write(evil, {}))
    assert (torch_files._call, dict(vars(torch_files._call))) == before
    assert not hasattr(dict, "harm")


WHOLE = {
    "old": old_format({"a": stored(NUMBERS), "b": stored(NUMBERS[:5].copy())}),
    "zip": zip_format({"a": stored(NUMBERS), "b": stored(NUMBERS[:5].copy())}),
    "npz": npz(a=NUMBERS, b=NUMBERS[:5]),
    "safetensors": safetensors.numpy.save({"a": NUMBERS, "b": NUMBERS[:5].copy()}),
}


@pytest.mark.parametrize("kind", [*WHOLE, "h5"])
def test_a_file_that_is_cut_anywhere_is_refused_by_its_name(kind, read):
    whole = WHOLE.get(kind) or h5_bytes(lambda root: root.update({"a": NUMBERS}))
    # HDF5 reserves room behind the last number.
    end = len(whole) if kind != "h5" else whole.rindex(NUMBERS.tobytes())
    assert len(read(whole)) > 0
    for cut in {*np.linspace(0, end - 1, 30, dtype=int), *range(12), end - 1}:
        with pytest.raises(ValueError, match=r"weights\.bin"):
            read(whole[:cut])


@pytest.mark.parametrize("kind", WHOLE)
def test_a_damaged_byte_gives_an_error_in_words_or_tensors_of_some_numbers(kind, read):
    whole = WHOLE[kind]
    random = np.random.default_rng(0)
    errors = []
    for place in random.integers(0, len(whole), 300):
        data = bytearray(whole)
        data[place] ^= random.integers(1, 256)
        try:
            found = read(bytes(data))
        except ValueError as error:
            errors.append(str(error))
        else:
            assert sum(array.nbytes for array in found.values()) < len(whole)
    assert errors
    assert all("weights.bin" in error for error in errors)


@FORMATS
@pytest.mark.parametrize(
    "change",
    [
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**40},
        {"strides": (7, 1)},
        {"strides": (-6, 1), "offset": 18},
        {"strides": (0, 0), "shape": (2**20, 2**20)},
        {"strides": (2**62, 1)},
        {"strides": (1,)},
        {"shape": (4, 7)},
        {"shape": (-4, 6)},
        {"shape": (2**31 - 1, 2**31 - 1)},
        {"shape": (0, 2**62)},
        {"shape": (1,) * 70, "strides": (1,) * 70},
        {"shape": ("4", 6)},
        {"shape": (4.0, 6)},
        {"shape": 24},
        {"elements": 25},
        {"elements": 23},
        {"elements": -24},
        {"elements": 2**62},
        {"elements": 2**500},
        {"kind": "Double"},
        {"kind": "Untyped"},
    ],
    ids=str,
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(write, change, read):
    tensor = stored(NUMBERS.reshape(4, 6), key="0")
    assert read(write({"a": tensor}))["a"].shape == (4, 6)
    changed = opcodes({"a": tensor._replace(**change)})
    with pytest.raises(ValueError, match=r"weights\.bin"):
        read(write(changed, {"0": tensor}))


@FORMATS
def test_one_storage_of_two_sizes_is_refused(write, read):
    tensor = stored(NUMBERS, key="0")
    both = {"a": tensor, "b": tensor._replace(elements=12, kind="Double")}
    with pytest.raises(ValueError, match="two at once"):
        read(write(both))


def test_storages_that_are_not_there_or_lie_are_refused(read):
    tensor = stored(NUMBERS, key="0")
    lying = {"0": tensor._replace(elements=2**40)}
    value = opcodes({"a": tensor})
    with pytest.raises(ValueError, match="storage '0' is declared"):
        read(old_format(value, lying))
    for keys in ([], ["1"], ["0", "1"], [1], 3, [("0",)]):
        with pytest.raises(ValueError, match=r"weights\.bin"):
            read(old_format(value, {"0": tensor}, keys))
    with pytest.raises(ValueError, match=r"archive/data/0"):
        read(zip_format(value, {}))
    with pytest.raises(ValueError, match="big-endian"):
        read(old_format(value, {"0": tensor}, system={"little_endian": False}))


def nested(depth: int) -> bytes:
    return b")" + b"\x85" * depth


# A tuple of two times the one before, 60 times: to hash it takes for ever.
DOUBLED = b")q\x00" + b"h\x00h\x00\x86q\x00" * 60

HOSTILE = {
    "a memo of any size": b"Nr\xff\xff\xff\xff0}",
    "bytes of any length": b"\x8e" + struct.pack("<Q", 2**40),
    "a frame of any length": b"\x95" + struct.pack("<Q", 2**60) + b"}",
    "text of any length": b"X\xff\xff\xff\xff",
    "digits of any length": b"\x8b\xff\xff\xff\x7f",
    "a digit too many": b"L" + b"9" * 100_000 + b"L\n",
    "deep tuples": nested(100_000),
    "a key of deep tuples": b"}" + nested(100_000) + b"Ns",
    "a key of doubled tuples": DOUBLED + b"}h\x00Ns",
    "lists in lists": b"](K\x01K\x02" * 10_000 + b"e",
    "marks without end": b"(" * 50_000,
    "more taken than there is": b"\x87",
    "a mark that is not there": b"t",
    "a memo that is not there": b"h\x05",
    "a key without a value": b"}(" + opcodes("a") + b"u",
    "items of a number": b"K\x01(" + opcodes("a") + b"Nu",
    "what is called is a number": b"K\x01)R",
    "what is called is a storage": b"ctorch\nFloatStorage\n)R",
    "an opcode that is none": b"\xff",
    "an extension": b"\x82\x01",
    "a new object": b"ccollections\nOrderedDict\n)\x81",
    "a persistent number": b"K\x01Q",
    "a storage that is a tensor's function": b"(X\x07\x00\x00\x00storagectorch._utils\n"
    b"_rebuild_tensor_v2\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_that_asks_for_much_gets_an_error_and_no_memory(name, read):
    data = zip_format(HOSTILE[name], {})
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"weights\.bin") as error:
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 60 * MIB + 4 * len(data)
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 1000


def test_a_pickle_of_more_opcodes_than_any_state_dict_has_is_refused(read, monkeypatch):
    data = zip_format({f"{n}": stored(NUMBERS, key="0") for n in range(100)})
    assert len(read(data)) == 100
    monkeypatch.setattr(torch_files, "MOST_OPCODES", 2000)
    with pytest.raises(ValueError, match="more than 2000 opcodes"):
        read(data)
    monkeypatch.setattr(torch_files, "LARGEST_PICKLE", 2000)
    with pytest.raises(ValueError, match="larger than 2000 bytes"):
        read(data)


def test_a_list_of_pairs_that_is_copied_often_takes_no_memory(read):
    pairs = opcodes([[f"{n}", n] for n in range(5_000)]) + b"q\x01"
    again = b"ccollections\nOrderedDict\nh\x01\x85R"
    data = zip_format(b"(" + pairs + again * 5_000 + b"t", {})
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="state dict"):
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 60 * MIB
    finally:
        tracemalloc.stop()


def test_a_storage_whose_name_takes_for_ever_to_hash_is_refused(read):
    tensor = stored(NUMBERS, key="0")
    with pytest.raises(ValueError, match="list of storages"):
        read(old_format({"a": tensor}, keys=DOUBLED + b"]h\x00a"))


def test_many_tensors_of_one_storage_take_its_memory_once(read):
    numbers = np.zeros(MIB, np.float32)
    tensor = stored(numbers, key="0")
    data = zip_format({f"{n}": tensor for n in range(1000)})
    tracemalloc.start()
    try:
        assert len(read(data)) == 1000
        assert tracemalloc.get_traced_memory()[1] < 6 * len(data)
    finally:
        tracemalloc.stop()


def deflated_more_than_declared() -> bytes:
    """A member of 100 MiB that says that it has 4."""
    header = npy_header(f"({MIB},)")
    content = header + bytes(100 * MIB)
    data = members(zipfile.ZIP_DEFLATED, a=content)
    declared = struct.pack("<I", len(header) + 4 * MIB)
    return data.replace(struct.pack("<I", len(content)), declared)


BOMBS = {
    "an .npz that inflates": lambda: members(zipfile.ZIP_DEFLATED, a=bytes(200 * MIB)),
    "an .npz that inflates to more than it says": deflated_more_than_declared,
    "an .npz that declares much": lambda: members(a=npy_header(f"({2**34},)")),
    "an .npz of a huge shape": lambda: members(a=npy_header(f"({2**62}, {2**62})")),
    "an .npz of a negative shape": lambda: members(
        a=npy_header("(-1, -4)") + bytes(16)
    ),
    "an .npz of deep brackets": lambda: members(a=npy_header("(" * 9000 + ")" * 9000)),
    "an .npz of a long header": lambda: members(
        zipfile.ZIP_DEFLATED,
        a=b"\x93NUMPY\x02\x00" + struct.pack("<I", 15 * MIB) + bytes(15 * MIB),
    ),
    "a .pth that inflates": lambda: zip_format(
        {"a": stored(np.zeros(50 * MIB, np.float32))}, how=zipfile.ZIP_DEFLATED
    ),
    "a .pth whose storages are declared larger": lambda: WHOLE["zip"].replace(
        struct.pack("<I", NUMBERS.nbytes), struct.pack("<I", 2**31)
    ),
    "a .safetensors with a long header": lambda: safe_bytes({}, length=2**62),
    "a .safetensors that declares much": lambda: safe_bytes(
        {"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}
    ),
    "a .safetensors whose tensors overlap": lambda: safe_bytes(
        {
            name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
            for name in ("a", "b")
        },
        bytes(8),
    ),
    "an .h5 that declares much": lambda: h5_bytes(
        lambda root: root.create_dataset("a", (2**30,), "f4")
    ),
    "an .h5 that inflates": lambda: h5_bytes(
        lambda root: root.create_dataset("a", data=NUMBERS, compression="gzip")
    ),
    "an .h5 of a large chunk": lambda: h5_bytes(
        lambda root: root.create_dataset(
            "a", (1,), "f4", chunks=(2**28,), maxshape=(None,)
        )
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_declares_more_than_it_holds_takes_no_memory(name, read):
    data = BOMBS[name]()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"weights\.bin"):
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 20 * MIB + 4 * len(data)
    finally:
        tracemalloc.stop()


def test_a_list_of_a_million_members_takes_no_memory(read):
    entry = b"PK\x01\x02" + bytes(24) + struct.pack("<H", 1) + bytes(16) + b"a"
    listed = entry * 200_000
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 65535, 65535, len(listed), 4, 0)
    data = b"PK\x03\x04" + listed + end
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="list of members"):
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(data)
    finally:
        tracemalloc.stop()


def test_links_and_numbers_of_other_files_are_refused(read, tmp_path):
    h5py = pytest.importorskip("h5py")
    other = tmp_path / "other.h5"
    other.write_bytes(h5_bytes(lambda root: root.update({"secret": NUMBERS})))

    def external_link(root):
        root["x"] = h5py.ExternalLink(str(other), "secret")

    def soft_link(root):
        root["b/a"] = NUMBERS
        root["x"] = h5py.SoftLink("/b/a")

    def virtual(root):
        layout = h5py.VirtualLayout((24,), "f4")
        layout[:] = h5py.VirtualSource(str(other), "secret", (24,))
        root.create_virtual_dataset("x", layout)

    def external(root):
        root.create_dataset("x", (24,), "f4", external=[(str(other), 0, 96)])

    for fill in (external_link, soft_link, virtual, external):
        with pytest.raises(ValueError, match="x is"):
            read(h5_bytes(fill))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1", "begins with b'version h'"),
        (b"<!DOCTYPE html>", "begins with"),
        (pickle.dumps({"a": 1}), "not one of PyTorch's"),
        (old_format({"epoch": 1}), "holds no tensors"),
        (old_format([1]), "torch.save"),
        (npz(), "begins with"),
        (npz(words=np.array(["x"])), "holds no tensors"),
        (safe_bytes({}), "holds no tensors"),
    ],
)
def test_what_holds_no_weights_is_said_in_words(data, words, read):
    with pytest.raises(ValueError, match=words) as error:
        read(data)
    assert "weights.bin" in str(error.value)


def test_hdf5_without_its_library_says_what_to_install(read, monkeypatch):
    data = h5_bytes(lambda root: root.update({"a": NUMBERS}))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match="pip install h5py"):
        read(data)


def test_a_path_is_found_also_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_tensors(tmp_path / "a.safetensors", {"a": NUMBERS})
    assert find_weights("~/a.safetensors") == tmp_path / "a.safetensors"
    assert_same(read_tensors("~/a.safetensors"), {"a": NUMBERS})
    for missing in ("~/b.safetensors", str(tmp_path), ""):
        with pytest.raises(FileNotFoundError, match="package:NAME"):
            find_weights(missing)
        with pytest.raises(FileNotFoundError, match="no weight file"):
            read_tensors(missing)


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """The folder of an installed package that must not be imported."""
    folder = tmp_path / "weights_of_a_test"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


@pytest.mark.parametrize("name", ["weights_of_a_test", "weights-of-a-test"])
def test_the_one_file_of_a_package_is_found_without_importing_it(name, package):
    path = package / "models" / "a.pth"
    path.write_bytes(b"")
    (package / "models" / "notes.txt").write_text("")
    assert find_weights(f"package:{name}") == path
    assert "weights_of_a_test" not in sys.modules


def test_a_package_with_none_or_several_says_so(package):
    with pytest.raises(FileNotFoundError, match="holds 0 weight files"):
        find_weights("package:weights_of_a_test")
    for name in ("a.pth", "b.h5"):
        (package / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"holds 2 .*\n.*a\.pth\n.*b\.h5"):
        find_weights("package:weights_of_a_test")


def test_a_package_that_is_not_there_says_what_to_install(package):
    with pytest.raises(FileNotFoundError, match="pip install weights-of-another"):
        find_weights("package:weights_of_another")
    for name in ("", "weights_of_a_test.models", "../x", "a b"):
        with pytest.raises(FileNotFoundError, match="names no package"):
            find_weights(f"package:{name}")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one repository, `ours/net`, with files that the test names."""
    files: list[str] = []
    library = types.ModuleType("huggingface_hub")

    def list_repo_files(repo_id):
        if repo_id != "ours/net":
            raise RuntimeError("404")
        return files

    def hf_hub_download(repo_id, filename):
        if filename not in list_repo_files(repo_id):
            raise RuntimeError("404")
        return str(tmp_path / filename)

    library.list_repo_files = list_repo_files
    library.hf_hub_download = hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    return files


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["a.txt", "b.safetensors", "model.safetensors"], "model.safetensors"),
        (["b.safetensors", "pytorch_model.bin"], "b.safetensors"),
        (["b.safetensors", "c.safetensors", "pytorch_model.bin"], "pytorch_model.bin"),
    ],
)
def test_a_repository_s_weights_are_chosen_from_the_safest_on(
    files, chosen, hub, tmp_path
):
    hub += files
    assert find_weights("hub:ours/net") == tmp_path / chosen


def test_a_file_of_a_repository_is_found_by_its_name(hub, tmp_path):
    hub += ["a/b.pth", "model.safetensors"]
    assert find_weights("hub:ours/net/a/b.pth") == tmp_path / "a/b.pth"


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("hub:ours", "is incomplete"),
        ("hub:", "is incomplete"),
        ("hub:/net", "is incomplete"),
        ("hub:theirs/net", "404"),
        ("hub:ours/net/b.pth", "404"),
        ("hub:ours/net", r"OWNER/NAME/FILE of a\.pth"),
    ],
)
def test_what_the_hub_does_not_have_is_said_in_words(where, words, hub):
    hub += ["a.pth"]
    with pytest.raises(FileNotFoundError, match=words):
        find_weights(where)


def test_the_hub_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        find_weights("hub:ours/net")
