"""Interpret pickles without calling anything, for files from sources that may not be trusted.

A pickle is a program that may call any function that Python can import. pickle.Unpickler can restrict which names are
looked up, but still lets the file call them, set attributes on them and choose the size of its tables. This interpreter
supports only the operations that files of tensors need: a global name is a string that is looked up in the tables below
and nowhere else, nothing is imported, no attribute is set, and everything else is refused by name. The size of the file
bounds memory and time. `convert.torch_files.reader` finds the pickles and the storages.
"""

import dataclasses
import io
import math
import pickletools
import reprlib
from collections.abc import Callable

import ml_dtypes
import numpy as np

MAX_NAME = 1000
_MAX_AXES = 64
_PAIR_BYTES = 100

_STORAGES = {
    "torch.BoolStorage": np.dtype(np.bool_),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.DoubleStorage": np.dtype(np.float64),
}
_DTYPES = {f"torch.{dtype.name}" for dtype in _STORAGES.values()}
_NUMPY_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_TENSORS = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
_DICTS = {"collections.OrderedDict", "collections.Counter"}
_BECOME_FIRST_ARGUMENT = {
    "builtins.frozenset",
    "builtins.set",
    "torch.Size",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.jit._pickle.build_boollist",
    "torch.jit._pickle.build_doublelist",
    "torch.jit._pickle.build_intlist",
    "torch.jit._pickle.build_tensorlist",
    "torch.jit._pickle.restore_type_tag",
}
_BECOME_ARGUMENTS = {"pathlib.PosixPath", "pathlib.WindowsPath", "torch.device"}
_NAMESPACE, _ENCODE = "argparse.Namespace", "_codecs.encode"
_DTYPE, _SCALAR = "numpy.dtype", "numpy._core.multiarray.scalar"
_SCRIPT_MODULE = "__torch__."
_KNOWN = {_NAMESPACE, _ENCODE, _DTYPE, _SCALAR, *_STORAGES, *_TENSORS, *_DICTS}
_KNOWN |= _BECOME_FIRST_ARGUMENT | _BECOME_ARGUMENTS
_RENAMED = (("__builtin__.", "builtins."), ("numpy.core.", "numpy._core."), ("pathlib._local.", "pathlib."))

_CONSTANTS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING"}
_CONSTANTS |= {"BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"}
_NEW = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}
_NEW |= {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class ForbiddenError(Exception):
    """The file needs something outside the tables; the message names it."""


class ScriptModule(dict):
    """The attributes of a module in a TorchScript archive."""


@dataclasses.dataclass(frozen=True)
class _Global:
    """The name of something that Python could import; it is only compared with the tables."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """The numbers of one or more tensors; `memory` is None in the first pass over a legacy file."""

    name: str
    dtype: np.dtype
    length: int
    memory: memoryview | None


class Interpreter:
    """Interprets one pickle.

    `load(key, dtype)` returns the bytes of a storage; if it returns None, tensors become None. `budget` limits the
    bytes of tensors and copies, which may be larger than the file; everything else is no larger than the pickle.

    Every method raises ForbiddenError for what is refused, and ValueError or another exception for a damaged pickle.
    """

    def __init__(self, load: Callable[[str, np.dtype], memoryview | None], budget: int):
        self._load = load
        self._budget = budget
        self._stack, self._outer_stacks, self._memo = [], [], {}
        self._unfilled = {}
        self._pairwise = {
            "STACK_GLOBAL": lambda module, name: _find(f"{_name(module)}.{_name(name)}"),
            "REDUCE": self._reduce,
            "NEWOBJ": self._new_object,
            "BUILD": self._build,
        }

    def run(self, stream: io.BytesIO) -> object:
        """Return the value of the pickle at the position of `stream`, and leave the position after it."""
        for operation, argument, _ in pickletools.genops(stream):
            if operation.name == "STOP":
                break
            self._step(operation.name, argument)
        return self._stack.pop()

    def _step(self, operation: str, argument: object) -> None:
        stack = self._stack
        if operation in _CONSTANTS:
            stack.append(argument)
        elif operation in _NEW:
            stack.append(_NEW[operation]())
        elif operation in _TUPLES:
            items = [stack.pop() for _ in range(_TUPLES[operation])]
            stack.append(tuple(reversed(items)))
        elif operation in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if operation == "MEMOIZE" else argument] = stack[-1]
        elif operation in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif operation == "MARK":
            self._outer_stacks.append(stack)
            self._stack = []
        elif operation in ("TUPLE", "APPENDS", "SETITEMS"):
            self._close_mark(operation)
        elif operation == "APPEND":
            value = stack.pop()
            _expect(list, stack[-1]).append(value)
        elif operation == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _expect(dict, stack[-1])[_name(key)] = value
        elif operation == "GLOBAL":
            stack.append(_find(argument.replace(" ", ".", 1)))
        elif operation in self._pairwise:
            second, first = stack.pop(), stack.pop()
            stack.append(self._pairwise[operation](first, second))
        elif operation == "BINPERSID":
            stack.append(self._storage(*_expect(tuple, stack.pop())))
        elif operation not in ("PROTO", "FRAME"):
            raise ForbiddenError(f"the pickle operation {operation} ({_describe(argument)})")

    def _close_mark(self, operation: str) -> None:
        items, self._stack = self._stack, self._outer_stacks.pop()
        if operation == "TUPLE":
            self._stack.append(tuple(items))
        elif operation == "APPENDS":
            _expect(list, self._stack[-1]).extend(items)
        else:
            target = _expect(dict, self._stack[-1])
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[_name(key)] = value

    def _reduce(self, function: object, arguments: object) -> object:
        """Return the value that represents `function(*arguments)`; nothing is called."""
        name, arguments = _expect(_Global, function).name, _expect(tuple, arguments)
        if name in _TENSORS:
            return self._tensor(*arguments[:4], *arguments[6:])
        if name in _BECOME_FIRST_ARGUMENT:
            return arguments[0]
        if name in _BECOME_ARGUMENTS:
            return arguments
        if name in _DICTS:
            return self._fill({}, *arguments[:1])
        if name == _ENCODE:
            text = _expect(str, arguments[0])
            self._spend(len(text))
            return text.encode("latin-1")
        # _NUMPY_CODES is a tuple, not a set: hashing nested tuples from a file could take forever
        if name == _DTYPE and arguments[0] in _NUMPY_CODES:
            return np.dtype(arguments[0])
        if name == _SCALAR:
            dtype, raw = _expect(np.dtype, arguments[0]), _expect(bytes, arguments[1])
            return np.frombuffer(raw, dtype, count=1)[0]
        raise ForbiddenError(f"{name}({_describe(arguments[0]) if arguments else ''})")

    def _new_object(self, kind: object, arguments: object) -> dict:
        name = _expect(_Global, kind).name
        if arguments != () or not (name == _NAMESPACE or name.startswith(_SCRIPT_MODULE)):
            raise ForbiddenError(f"a new {name}")
        made = {} if name == _NAMESPACE else ScriptModule()
        self._unfilled[id(made)] = made
        return made

    def _build(self, target: object, state: object) -> object:
        """Set the state of `target`; the state of an OrderedDict (the _metadata of state dicts) is ignored."""
        if id(target) in self._unfilled:
            self._fill(self._unfilled.pop(id(target)), _expect(dict, state))
        elif isinstance(target, np.dtype):
            if _expect(tuple, state)[1] not in ("<", "|"):
                raise ValueError("its numbers are big-endian")
        elif type(target) is not dict:
            raise ForbiddenError(f"a change to {_describe(target)}")
        return target

    def _fill(self, target: dict, pairs: dict | list = ()) -> dict:
        self._spend(_PAIR_BYTES * len(pairs))
        for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
            target[_name(key)] = value
        return target

    def _storage(self, tag: object, kind: object, key: object, _device: object, length: object, view: object = None):
        kind = _expect(_Global, kind).name
        if tag != "storage" or kind not in _STORAGES or view is not None:
            raise ForbiddenError(f"{kind} as {_describe(tag)}, a view of {_describe(view)}")
        key, dtype = _name(_expect(str, key)), _STORAGES[kind]
        memory, needed = self._load(key, dtype), _count(length) * dtype.itemsize
        if memory is not None and len(memory) < needed:
            raise ValueError(f"its storage {key} has {len(memory)} bytes, but its length requires {needed}")
        return _Storage(key, dtype, length, memory)

    def _tensor(self, storage: object, offset: object, shape: object, strides: object, metadata: object = None):
        storage, offset, shape, strides = _expect(_Storage, storage), _count(offset), _counts(shape), _counts(strides)
        if len(shape) != len(strides) or metadata:
            raise ValueError(f"a tensor of shape {shape} has strides {strides} and metadata {_describe(metadata)}")
        if storage.memory is None:
            return None
        size, itemsize = math.prod(shape), storage.dtype.itemsize
        if size == 0:
            return np.zeros(shape, storage.dtype)
        needed = offset + 1 + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
        if needed > storage.length:
            has = f"its storage {storage.name} has {storage.length} numbers"
            raise ValueError(f"{has}, but a tensor of shape {shape} needs {needed}")
        self._spend(size * itemsize)
        steps = tuple(stride * itemsize for stride in strides)
        return np.ndarray(shape, storage.dtype, storage.memory, offset * itemsize, steps)

    def _spend(self, size: int) -> None:
        self._budget -= size
        if self._budget < 0:
            raise ValueError("its tensors take far more memory than the file")


def _find(name: str) -> object:
    for old, new in _RENAMED:
        name = new + name.removeprefix(old) if name.startswith(old) else name
    if name in _DTYPES:
        return name
    if name not in _KNOWN and not name.startswith(_SCRIPT_MODULE):
        raise ForbiddenError(name[:MAX_NAME])
    return _Global(name)


def _name(value: object) -> object:
    """Return `value` if it may be a key: keys have a bounded length, so that hashing and comparing them is fast."""
    if isinstance(value, str) and len(value) <= MAX_NAME:
        return value
    if isinstance(value, float | None) or (isinstance(value, int) and -(2**63) <= value < 2**63):
        return value
    raise ValueError(f"it uses {_describe(value)} as a name")


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"it has {_describe(value)} as a count")
    return value


def _counts(values: object) -> tuple[int, ...]:
    if len(_expect(tuple, values)) > _MAX_AXES:
        raise ValueError(f"a tensor has {len(values)} axes")
    return tuple(_count(value) for value in values)


def _expect(kind: type, value: object) -> object:
    if not isinstance(value, kind):
        raise ValueError(f"its pickle has {_describe(value)} instead of a {kind.__name__.strip('_').lower()}")
    return value


def _describe(value: object) -> str:
    """Return a short description of `value`; for containers only the type, since they may contain themselves."""
    if isinstance(value, str | int | float | bytes | None):
        return reprlib.repr(value)
    return value.name if isinstance(value, _Global) else f"a {type(value).__name__}"
