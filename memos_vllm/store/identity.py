"""What KV bytes depend on: the identity of a deployment, and keys of blocks made from it.

Everything here is a digest of content, equal in every process and after every restart.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import blake2b, sha256
from pathlib import Path

from memos_vllm.types import BlockKey

FORMAT_VERSION = 1
"""Of chunk files and keys; raised when either changes its meaning."""

_SAMPLE_BYTES = 64 * 2**10
_NUM_SAMPLES = 64
_WHOLE_FILE_BYTES = _NUM_SAMPLES * _SAMPLE_BYTES
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_OTHER_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")


@dataclass(frozen=True)
class KVIdentity:
    """Everything besides tokens, salt and adapter that the bytes of a KV block depend on.

    Two servers may exchange KV exactly if their identities are equal.
    """

    format_version: int
    model: str
    model_fingerprint: str
    revision: str
    tokenizer: str
    """Fingerprint of the tokenizer."""
    dtype: str
    kv_cache_dtype: str
    block_size: int
    """Tokens per block."""
    hash_algo: str
    effective_config: str
    """Digest of what changes the computation without changing a file: overrides, online quantisation."""
    world: str
    """Parallel shape, such as ``tp2pp1``."""
    layout: tuple[str, ...]
    """One block of each plane and the order of its bytes, as ``kv_copy.describe_planes`` gives it."""

    def as_metadata(self) -> dict[str, str]:
        """The fields as strings, for the header of a file."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: json.dumps(value) if isinstance(value, tuple) else str(value) for name, value in values.items()}

    def digest(self) -> bytes:
        """32 bytes that differ if any field does."""
        return self._digest

    @cached_property
    def _digest(self) -> bytes:
        return _digest_parts(part.encode() for item in sorted(self.as_metadata().items()) for part in item)

    def differences(self, metadata: Mapping[str, str]) -> list[str]:
        """Names of the fields that are absent from ``metadata`` or have another value there."""
        return [name for name, value in self.as_metadata().items() if metadata.get(name) != value]

    def block_key(self, block_hash: bytes, adapter_digest: bytes = b"", generation: bytes = b"") -> BlockKey:
        """Key of the block that vLLM calls ``block_hash`` (which covers its tokens, all before, and the salt).

        Args:
            generation: empty until the weights change in a running server; then a random text, so that
                nothing older is found, and nothing of it after a restart.
            adapter_digest: of the LoRA adapter's content (``fingerprint_adapter``), empty without one.
                vLLM's hash has the adapter's name only, which survives a change of its weights.
        """
        return BlockKey(_digest_parts((self._digest, block_hash, adapter_digest, generation)))


def chunk_id(keys: Sequence[BlockKey]) -> str:
    """Name of the chunk that holds ``keys`` in this order: 40 hex digits."""
    return _digest_parts(keys, digest_bytes=20).hex()


def fingerprint_dir(path: str | os.PathLike[str]) -> str:
    """Fingerprint of a local model: weights, configuration and tokenizer, by name, size and content.

    Files up to 4 MiB are read whole; of larger ones the first sample (a safetensors header, say) and
    63 more of 64 KiB at even distances up to the file's end. So 100 GB in 40 files cost 160 MiB of
    reads, well below a second from an SSD. The price: an edit that keeps a weight file's size and
    falls between the samples goes unseen. A fine-tune or another quantisation changes nearly all
    bytes and is always seen; whoever patches single tensors in place must clear the KV directory.

    Raises:
        FileNotFoundError: ``path`` is no directory or has none of these files.
    """
    root = Path(path)
    files = (file for pattern in _WEIGHT_FILES + _OTHER_FILES for file in root.glob(pattern))
    names = sorted({file.name for file in files if file.is_file()})
    if not names:
        raise FileNotFoundError(f"{root} holds no model files to fingerprint")
    return _digest_parts(part for name in names for part in (name.encode(), _sampled_digest(root / name))).hex()


def fingerprint_file(path: str | os.PathLike[str]) -> str:
    """Fingerprint of a model that is one file (GGUF, say), sampled as in ``fingerprint_dir``."""
    return _sampled_digest(Path(path)).hex()


def fingerprint_adapter(path: str | os.PathLike[str]) -> bytes:
    """Digest (32 bytes) of a LoRA adapter's whole content: its configuration and its weights.

    Remembered per file until its size or modification time changes.

    Raises:
        FileNotFoundError: ``path`` is no directory with an adapter.
    """
    root = Path(path)
    weights = [root / name for name in _ADAPTER_WEIGHTS if (root / name).is_file()]
    if not weights:
        raise FileNotFoundError(f"{root} holds no {_ADAPTER_WEIGHTS[0]}")
    files = [root / _ADAPTER_CONFIG, *weights]
    return _digest_parts(part for file in files for part in (file.name.encode(), _whole_digest(file)))


_whole_digests: dict[tuple[str, int, int], bytes] = {}


def _whole_digest(file: Path) -> bytes:
    status = file.stat()
    stamp = (os.path.realpath(file), status.st_size, status.st_mtime_ns)
    if stamp not in _whole_digests:
        digest = sha256()
        with open(file, "rb") as stream:
            while piece := stream.read(2**20):
                digest.update(piece)
        _whole_digests[stamp] = digest.digest()
    return _whole_digests[stamp]


def _sampled_digest(file: Path) -> bytes:
    size_bytes = file.stat().st_size
    digest = sha256(size_bytes.to_bytes(8, "little"))
    with open(file, "rb") as stream:
        if size_bytes <= _WHOLE_FILE_BYTES:
            digest.update(stream.read())
        else:
            for index in range(_NUM_SAMPLES):
                stream.seek(index * (size_bytes - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.digest()


def _digest_parts(parts: Iterator[bytes] | Sequence[bytes], digest_bytes: int = 32) -> bytes:
    """Length-prefixed, so that no two lists of parts give the same bytes."""
    digest = blake2b(digest_size=digest_bytes)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
