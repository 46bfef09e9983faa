"""PyTorch's weight files, read without PyTorch and without executing anything.

Such a file is a pickle of names, shapes and strides, and storages of numbers beside it.
Python's unpickler calls what a file names, and takes the memory that a file asks for.
So the few opcodes that PyTorch writes are followed here instead, one by one.
"""

import io
import itertools
import math
import pickletools
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LARGEST_PICKLE = 16 * 2**20  # bytes
MOST_OPCODES = 500_000  # of one pickle; a tensor takes about 30
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
# Bits of a bfloat16 are the upper half of a float32's; a bool is any byte but 0.
_DTYPES = {
    "Float": "<f4",
    "Double": "<f8",
    "Half": "<f2",
    "BFloat16": "<u2",
    "Long": "<i8",
    "Int": "<i4",
    "Short": "<i2",
    "Char": "i1",
    "Byte": "u1",
    "Bool": "u1",
}
_CALLED = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
}


class _Global(NamedTuple):
    """What a pickle names: a word, whatever the name means to Python."""

    name: str


class _Storage(NamedTuple):
    kind: str
    key: str
    elements: int

    @property
    def length(self) -> int:
        return self.elements * np.dtype(_DTYPES[self.kind]).itemsize


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_old_format(path: Path, size: int) -> dict[str, np.ndarray]:
    """The tensors of a file that PyTorch wrote before 1.6: pickles, then storages.

    `size`: of the file in bytes, which what it declares is compared with.
    Returns: arrays by name, read-only, of shared memory where the tensors' was.

    Raises: ValueError, or what else a damaged file leads to.
    """
    storages: dict[str, _Storage] = {}
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(min(size, LARGEST_PICKLE)))
        if _unpickle(stream) != _MAGIC or _unpickle(stream) != _PROTOCOL:
            raise ValueError("it is a pickle, and not one of PyTorch's")
        if not _unpickle(stream)["little_endian"]:
            raise ValueError("its numbers are big-endian, which is not read")
        tensors = _state_dict(_unpickle(stream, storages))
        keys = _unpickle(stream)
        file.seek(stream.tell())
        needed = {tensor.storage.key for tensor in tensors.values()}
        numbers = {}
        for key in keys:
            if not isinstance(key, str) or key not in storages:
                raise ValueError("its list of storages is damaged")
            storage = storages[key]
            (count,) = struct.unpack("<q", file.read(8))
            _check_length(storage, count, storage.elements)
            _check_length(storage, min(storage.length, size - file.tell()))
            if key in needed:
                numbers[key] = _numbers(file.read(storage.length), storage.kind)
            else:
                file.seek(storage.length, io.SEEK_CUR)
    return _arrays(tensors, numbers)


def read_zip_format(archive: zipfile.ZipFile, size: int) -> dict[str, np.ndarray]:
    """The tensors of a file that PyTorch wrote since 1.6: a zip of pickle and storages.

    `size`: of the file in bytes, which what it declares is compared with.
    Returns: arrays by name, read-only, of shared memory where the tensors' was.

    Raises: ValueError, or what else a damaged file leads to.
    """
    members = {info.filename: info for info in archive.infolist()}
    # PyTorch compresses nothing, so nothing inflates; and members may lie over another.
    if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
        raise ValueError("its members are compressed, which PyTorch's are not")
    if sum(info.file_size for info in members.values()) > size:
        raise ValueError("its members are declared larger than the file")
    (pickled,) = (name for name in members if name.endswith("/data.pkl"))
    folder = pickled.removesuffix("data.pkl")
    if members[pickled].file_size > LARGEST_PICKLE:
        raise ValueError(f"its pickle is larger than {LARGEST_PICKLE} bytes")
    order = f"{folder}byteorder"
    if order in members and archive.read(order) != b"little":
        raise ValueError("its numbers are big-endian, which is not read")
    tensors = _state_dict(_unpickle(io.BytesIO(archive.read(pickled))))
    numbers = {}
    for storage in {tensor.storage for tensor in tensors.values()}:
        name = f"{folder}data/{storage.key}"
        _check_length(storage, members[name].file_size)
        numbers[storage.key] = _numbers(archive.read(name), storage.kind)
    return _arrays(tensors, numbers)


def _check_length(storage: _Storage, found: int, wanted: int | None = None) -> None:
    wanted = storage.length if wanted is None else wanted
    if found != wanted:
        key = storage.key[:40]
        raise ValueError(
            f"storage {key!r} is declared as {wanted} long and has {found}"
        )


def _state_dict(read: Any) -> dict[str, _Tensor]:
    """The tensors by name, also where they lie one level deeper."""
    if not isinstance(read, dict):
        raise ValueError("it holds no state dict: torch.save(model.state_dict(), PATH)")
    inner = (read.get(name) for name in ("state_dict", "model"))
    chosen = next((value for value in inner if isinstance(value, dict)), read)
    tensors = {
        name: value
        for name, value in chosen.items()
        if isinstance(name, str) and isinstance(value, _Tensor)
    }
    if not tensors:
        names = ", ".join(str(name)[:40] for name in list(chosen)[:10])
        raise ValueError(f"it holds no tensors by name, but these: {names}")
    return tensors


def _numbers(raw: bytes, kind: str) -> np.ndarray:
    numbers = np.frombuffer(raw, _DTYPES[kind])
    if kind == "BFloat16":
        wide = numbers.astype("<u4")
        wide <<= 16
        numbers = wide.view("<f4")
    if kind == "Bool":
        numbers = numbers != 0
    numbers.flags.writeable = False
    return numbers


def _arrays(
    tensors: Mapping[str, _Tensor], numbers: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    return {
        name: _array(name, tensor, numbers[tensor.storage.key])
        for name, tensor in tensors.items()
    }


def _array(name: str, tensor: _Tensor, numbers: np.ndarray) -> np.ndarray:
    """A view of a storage's numbers, all of it inside."""
    _, offset, shape, strides = tensor
    whole = all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
    if not whole or not len(shape) == len(strides) <= 32:
        raise ValueError(f"tensor {name[:80]!r} has no valid shape, strides or offset")
    steps = [
        stride if length > 1 else 0
        for length, stride in zip(shape, strides, strict=True)
    ]
    count = math.prod(shape)
    reach = sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    # More elements than numbers are repeated ones, of any memory when they are copied.
    if count > len(numbers) or (count and offset + reach >= len(numbers)):
        raise ValueError(f"tensor {name[:80]!r} reaches beyond its storage")
    if not count:
        return np.empty(shape, numbers.dtype)
    size = numbers.itemsize
    in_bytes = [step * size for step in steps]
    return np.ndarray(shape, numbers.dtype, numbers, offset * size, in_bytes)


def _unpickle(stream: io.BytesIO, storages: dict[str, _Storage] | None = None) -> Any:
    """The next pickle's value, of plain values, `_Global`s, `_Storage`s and `_Tensor`s.

    `storages`: is given those that it names, by their keys.
    """
    storages = {} if storages is None else storages
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop(count: int) -> list[Any]:
        items = stack[len(stack) - count :]
        if len(items) != count:
            raise ValueError("its pickle is damaged: it takes more than there is")
        del stack[len(stack) - count :]
        return items

    argument: Any
    opcodes = pickletools.genops(stream)
    for opcode, argument, _ in itertools.islice(opcodes, MOST_OPCODES):
        match opcode.name:
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case (
                ("BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT")
                | ("BINUNICODE" | "SHORT_BINUNICODE" | "BINSTRING" | "SHORT_BINSTRING")
                | ("BINBYTES" | "SHORT_BINBYTES")
            ):
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(int(opcode.name[-1]))))
            case "TUPLE":
                stack.append(tuple(pop(len(stack) - marks.pop())))
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "APPEND":
                _extend(stack[-2], pop(1))
            case "APPENDS":
                items = pop(len(stack) - marks.pop())
                _extend(stack[-1], items)
            case "SETITEM":
                _fill(stack[-3], [pop(2)])
            case "SETITEMS":
                items = pop(len(stack) - marks.pop())
                _fill(stack[-1], zip(items[::2], items[1::2], strict=True))
            case "GLOBAL":
                stack.append(_known(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                stack.append(_known(".".join(pop(2))))
            case "BINPERSID":
                storage = _storage(*pop(1))
                if storages.setdefault(storage.key, storage) != storage:
                    raise ValueError(f"storage {storage.key[:40]!r} is two at once")
                stack.append(storage)
            case "REDUCE":
                stack.append(_call(*pop(2)))
            case "BUILD":
                pop(1)  # attributes, such as a state dict's versions: left out
            case "STOP":
                return stack.pop()
            case "PROTO" | "FRAME":
                pass
            case other:
                raise ValueError(
                    f"its pickle has {other}, which PyTorch does not write"
                )
    raise ValueError(f"its pickle has more than {MOST_OPCODES} opcodes")


def _known(name: str) -> _Global:
    if name in _CALLED or _kind(name) in _DTYPES:
        return _Global(name)
    raise ValueError(
        f"it names {name[:80]!r}, and nothing but tensors is read. Save the weights "
        "alone, with torch.save(model.state_dict(), PATH) or as .safetensors"
    )


def _kind(name: str) -> str:
    """ "Float" of "torch.FloatStorage"; nothing that is a kind for other names."""
    start, end = name[:6], name[-7:]
    return name[6:-7] if (start, end) == ("torch.", "Storage") else ""


def _extend(values: Any, items: list[Any]) -> None:
    if type(values) is not list:
        raise ValueError("its pickle is damaged: it appends to what is no list")
    values.extend(items)


def _fill(values: Any, pairs: Iterable[Any]) -> None:
    """Sets keys that are quick to hash: those of nested tuples may take for ever."""
    if type(values) is not dict:
        raise ValueError(
            "its pickle is damaged: it sets items of what is no dictionary"
        )
    for key, value in pairs:
        if not isinstance(key, str) and not (type(key) is int and abs(key) < 2**31):
            raise ValueError("its pickle has keys that are neither text nor numbers")
        values[key] = value


def _storage(described: Any) -> _Storage:
    match described:
        case ("storage", _Global(name), str(key), _, int(elements), *view) if (
            _kind(name) in _DTYPES and elements >= 0 and not any(view)
        ):
            return _Storage(_kind(name), key, elements)
    raise ValueError("its pickle refers to what is no storage of numbers")


def _call(called: Any, arguments: Any) -> Any:
    """What the few functions that may be named give for their arguments."""
    match called, arguments:
        case _Global("collections.OrderedDict"), ():
            return {}
        case _Global("collections.OrderedDict"), (list() as pairs,):
            values: dict[Any, Any] = {}
            _fill(values, pairs)
            # Else a list that is named a million times would become as many copies.
            pairs.clear()
            return values
        case (
            _Global("torch._utils._rebuild_tensor_v2"),
            (_Storage() as storage, offset, tuple(shape), tuple(strides), *_),
        ):
            return _Tensor(storage, offset, shape, strides)
        case _Global("torch._utils._rebuild_parameter"), (_Tensor() as tensor, *_):
            return tensor
    name = called.name if isinstance(called, _Global) else "what it has not named"
    raise ValueError(f"its pickle calls {name} otherwise than PyTorch does")
