"""A PEFT LoRA folder, read as data from a stranger: nothing in it is executed, and all of it is checked.

Two files count, ``adapter_config.json`` and ``adapter_model.safetensors``. The safetensors header is
parsed here, byte by byte, and must describe exactly the file it stands in; every tensor must be the A or
B matrix of a module that the served model has, in the shape that module and the rank ask for.

What is kept is a canonical form (``CheckedAdapter.write``): the configuration's fields that change the
computation, sorted, and the tensors in the order of their names. So the same adapter has the same digest,
whatever its folder, key order or metadata.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from memos_vllm.adapters import peft_config
from memos_vllm.adapters.peft_config import CONFIG_FILE, BaseModel
from memos_vllm.errors import AdapterError

WEIGHTS_FILE = "adapter_model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)
MAX_HEADER_BYTES = 16 * 2**20
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_PIECE_BYTES = 2**20

_TENSOR = re.compile(r"base_model\.model\.(?P<module>[\w.]{1,400})\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class CheckedAdapter:
    """An adapter that fits. ``weights`` stays open, so that what was checked is what is copied.

    Attributes:
        config: the canonical configuration.
        rank: the largest of any module.
        size_bytes: of the tensors.
    """

    config: dict[str, Any]
    rank: int
    size_bytes: int
    dtype: str
    _weights: BinaryIO
    _data_begin: int
    _tensors: Mapping[str, _Tensor]

    def write(self, folder: Path) -> bytes:
        """Writes the canonical form into an existing folder, synced; returns its digest (32 bytes).

        Raises:
            AdapterError: a weight is no finite number, or the file changed while it was read.
        """
        digest = hashlib.sha256()
        config = json.dumps(self.config, sort_keys=True, separators=(",", ":")).encode()
        digest.update(len(config).to_bytes(8, "little") + config)
        _write_synced(folder / CONFIG_FILE, lambda file: file.write(config))
        _write_synced(folder / WEIGHTS_FILE, lambda file: self._write_weights(file, digest))
        return digest.digest()

    def _write_weights(self, file: BinaryIO, digest: Any) -> None:
        header: dict[str, Any] = {}
        end = 0
        for name, tensor in sorted(self._tensors.items()):
            begin, end = end, end + tensor.end - tensor.begin
            header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        digest.update(head)
        file.write(head)
        for name, tensor in sorted(self._tensors.items()):
            self._weights.seek(self._data_begin + tensor.begin)
            left = tensor.end - tensor.begin
            while left:
                piece = self._weights.read(min(left, _PIECE_BYTES))
                if not piece:
                    raise AdapterError(f"{WEIGHTS_FILE} became shorter while it was read; send it again")
                _check_finite(piece, tensor.dtype, name)
                digest.update(piece)
                file.write(piece)
                left -= len(piece)


def check(folder: Path, model: BaseModel, max_bytes: int) -> CheckedAdapter:
    """Reads and checks a folder. The caller closes the result's file by dropping the result.

    Args:
        folder: nothing in it is followed (symbolic links) or executed.
        max_bytes: of the weights file.

    Raises:
        AdapterError: with what is wrong and what to do about it.
    """
    with _open_regular(folder, CONFIG_FILE) as file:
        config = peft_config.parse(file.read(peft_config.MAX_CONFIG_BYTES + 1), model)
    weights = _open_regular(folder, WEIGHTS_FILE)
    try:
        size_bytes = os.fstat(weights.fileno()).st_size
        if size_bytes > max_bytes:
            raise AdapterError(
                f"{WEIGHTS_FILE} has {size_bytes} bytes, more than adapters.max_bytes ({max_bytes})", status=413
            )
        data_begin, tensors = _read_header(weights, size_bytes)
        ranks = _check_tensors(tensors, config, model)
    except BaseException:
        weights.close()
        raise
    dtypes = sorted({tensor.dtype for tensor in tensors.values()})
    return CheckedAdapter(
        config=peft_config.canonical(config, list(ranks)),
        rank=max(ranks.values()),
        size_bytes=size_bytes - data_begin,
        dtype="+".join(dtypes),
        _weights=weights,
        _data_begin=data_begin,
        _tensors=tensors,
    )


# -- weights ------------------------------------------------------------------------------------


def _read_header(file: BinaryIO, size_bytes: int) -> tuple[int, dict[str, _Tensor]]:
    """Where the data begins, and the tensors; every byte of the data belongs to exactly one."""
    length = int.from_bytes(file.read(8), "little")
    if size_bytes < 8 or length > min(size_bytes - 8, MAX_HEADER_BYTES):
        raise AdapterError(f"{WEIGHTS_FILE} is no safetensors file: its header does not fit; save it again with PEFT")
    try:
        header = json.loads(file.read(length))
        entries = {name: value for name, value in header.items() if name != "__metadata__"}
        tensors = {
            name: _Tensor(value["dtype"], tuple(value["shape"]), *value["data_offsets"])
            for name, value in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{WEIGHTS_FILE} is no safetensors file: its header is damaged ({error})") from error
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: str(item[1].begin).zfill(20)):
        if len(tensor.shape) != 2:  # before any arithmetic: the product of many numbers takes minutes
            raise AdapterError(f"{WEIGHTS_FILE}: {name[:200]!r} is no matrix; a module needs an A and a B matrix")
        numbers = (*tensor.shape, tensor.begin, tensor.end)
        if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
            raise AdapterError(f"{WEIGHTS_FILE}: the header of {name[:200]!r} holds no sizes")
        if tensor.dtype not in _ITEM_BYTES:
            raise AdapterError(f"{WEIGHTS_FILE}: {name[:200]!r} has dtype {tensor.dtype}; use F32, F16 or BF16")
        expected = math.prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]
        if tensor.begin != end or tensor.end - tensor.begin != expected:
            raise AdapterError(f"{WEIGHTS_FILE} is damaged: the bytes of {name[:200]!r} are not where its shape says")
        end = tensor.end
    if 8 + length + end != size_bytes:
        raise AdapterError(
            f"{WEIGHTS_FILE} is truncated or damaged: {size_bytes} bytes, its header says {8 + length + end}"
        )
    return 8 + length, tensors


def _check_tensors(tensors: Mapping[str, _Tensor], config: Mapping[str, Any], model: BaseModel) -> dict[str, int]:
    """The rank of each module."""
    sides: dict[str, dict[str, _Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise AdapterError(f"{WEIGHTS_FILE}: {name[:200]!r} is not the A or B matrix of a linear module")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    if not sides:
        raise AdapterError(f"{WEIGHTS_FILE} holds no tensor")
    ranks = {}
    for module, pair in sides.items():
        if len(pair) != 2:
            raise AdapterError(f"{WEIGHTS_FILE}: {module} needs an A and a B matrix")
        rank = ranks[module] = peft_config.rank_of(module, config)
        if model.target_modules is not None and not {module, module.rpartition(".")[2]} & model.target_modules:
            raise AdapterError(f"the adapter changes {module}, which the server's --lora-target-modules leaves out")
        if model.modules is None:
            out, into = pair["B"].shape[0], pair["A"].shape[1]
        elif module in model.modules:
            out, into = model.modules[module]
        else:
            raise AdapterError(f"the adapter changes {module}, which the served model does not have")
        if pair["A"].shape != (rank, into) or pair["B"].shape != (out, rank):
            raise AdapterError(
                f"{module}: A must be [{rank}, {into}] and B [{out}, {rank}], but they are {list(pair['A'].shape)} "
                f"and {list(pair['B'].shape)}; the adapter is for another model or another rank"
            )
    return ranks


def _check_finite(piece: bytes, dtype: str, name: str) -> None:
    import numpy as np

    bits, exponent = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}[dtype]
    # Pieces end between two numbers: their size is a multiple of 4.
    if ((np.frombuffer(piece, bits) & exponent) == exponent).any():
        raise AdapterError(f"{WEIGHTS_FILE}: {name[:200]!r} holds values that are not finite numbers")


# -- files --------------------------------------------------------------------------------------


def _open_regular(folder: Path, name: str) -> BinaryIO:
    """Opens a plain file of the folder; a link is refused, so nothing outside is ever read."""
    if not folder.is_dir():
        raise AdapterError(f"there is no adapter folder {folder.name!r}")
    pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _PICKLES)
    if pickles:
        raise AdapterError(
            f"{pickles[0]} is a pickle, which could run code; save the adapter as {WEIGHTS_FILE} and remove the pickle"
        )
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise AdapterError(
            f"there is no {name}; an adapter is the folder that PEFT's save_pretrained writes"
        ) from error
    except OSError as error:
        raise AdapterError(f"{name} cannot be read ({error.strerror}); it must be a plain file, not a link") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterError(f"{name} must be a plain file")
    return os.fdopen(descriptor, "rb")


def digest_of(folder: Path) -> bytes:
    """The digest of what ``CheckedAdapter.write`` left in a folder.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    config = (folder / CONFIG_FILE).read_bytes()
    digest.update(len(config).to_bytes(8, "little") + config)
    with open(folder / WEIGHTS_FILE, "rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.digest()


def _write_synced(path: Path, write: Any) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
