"""Configuration: one YAML file (``--memos-config``), checked at start.

Every section is a frozen model that refuses unknown keys; ``load`` turns the first problem of each
key into one sentence. The commented examples in ``configs/`` are the reference for users.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from memos_vllm import api_keys
from memos_vllm.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(value: Any) -> int:
    """``4GiB``, ``500MB``, ``1073741824``: a size in bytes."""
    if isinstance(value, int) and not isinstance(value, bool):
        size_bytes = value
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", str(value).lower())
        if not match:
            raise ValueError(f"{value!r} is not a size; write for example 4GiB, 500MB or a number of bytes")
        size_bytes = int(float(match[1]) * _UNITS[match[2] or ""])
    if size_bytes < 0:
        raise ValueError("a size cannot be negative")
    return size_bytes


def parse_on_off(value: Any) -> Any:
    """YAML reads ``on`` and ``off`` without quotes as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
ListedKey = Annotated[str, AfterValidator(api_keys.checked)]
OnOff = Annotated[Literal["off", "on"], BeforeValidator(parse_on_off)]
MAX_SECONDS = 100 * 365 * 86400
"""More than a date can be moved by is an error of every request; a hundred years are for ever."""

Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]


def checked_path(value: Any) -> Any:
    """No path at all would be the folder that the server is started in."""
    if not isinstance(value, str | Path) or not str(value).strip():
        raise ValueError("must be a path, such as /var/lib/memos")
    return value


ExpandedPath = Annotated[Path, BeforeValidator(checked_path), AfterValidator(lambda path: path.expanduser().absolute())]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class KeyConfig(Section):
    """One API key. Without ``user`` the key is an application's: it names its users per request."""

    tenant: str = Field(min_length=1)
    user: str | None = Field(default=None, min_length=1)
    memory: bool | None = None
    """Whether requests without a ``memos`` field use memory. Those that name no user, of an application, do not."""

    operator: Literal["tenant", "all"] | None = None
    """Whether it may see who has memories, in its tenant or in all; with ``all`` also what the server does."""


class IdentityConfig(Section):
    """Who a request acts for."""

    keys: dict[ListedKey, KeyConfig] = Field(default={}, repr=False)
    """API key, or ``sha256:`` and the hex digest of one, to what it stands for."""

    unlisted_keys: Literal["own_tenant", "refuse"] = "own_tenant"
    """A key that is not listed is a tenant of its own (its digest), or has no memory."""

    trusted_user_header: str | None = Field(default=None, max_length=256)
    """Header in which a trusted gateway names the user, within the key's tenant."""

    @property
    def has_operator(self) -> bool:
        """Whether somebody is listed who may see all; what concerns the whole server is then for him alone."""
        return any(entry.operator == "all" for entry in self.keys.values())

    @field_validator("keys", mode="before")
    @classmethod
    def _are_distinct(cls, keys: Any) -> Any:
        if isinstance(keys, dict):
            api_keys.check_distinct(str(key) for key in keys)
        return keys

    @field_validator("trusted_user_header")
    @classmethod
    def _is_a_header(cls, name: str | None) -> str | None:
        """One that no request can have would leave the gateway's users without a name."""
        if name is not None and not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
            raise ValueError("is no name of a header; write for example X-Authenticated-User")
        if name is not None and name.lower() == "authorization":
            raise ValueError("has the API key, which is no user; name the header that the gateway sets")
        return name


class EmbedderConfig(Section):
    """What makes vectors of memories and queries, for the dense part of search."""

    kind: Literal["auto", "none", "model_rows", "sentence_transformers", "model2vec", "endpoint"] = "auto"
    """``model_rows``: the served model's input embeddings, nothing to download. ``auto``: these where they can
    be read, else none. ``none``: words alone."""

    model: str | None = Field(default=None, min_length=1)
    """Folder or name for sentence_transformers and model2vec, name for an endpoint."""

    url: str | None = Field(default=None, pattern="^https?://")
    """Of an OpenAI-compatible endpoint, up to ``/v1``."""

    api_key_env: str | None = Field(default=None, min_length=1)
    """Environment variable with the endpoint's key."""

    timeout_s: float = Field(default=10.0, gt=0, le=MAX_SECONDS)

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        if self.kind in ("sentence_transformers", "model2vec", "endpoint") and self.model is None:
            raise ValueError(f"{self.kind} needs 'model'")
        if self.kind == "endpoint" and self.url is None:
            raise ValueError("endpoint needs 'url', such as http://127.0.0.1:8001/v1")
        return self


class DocumentsConfig(Section):
    """Text, Markdown, HTML and PDF as memories."""

    max_bytes: Annotated[Bytes, Field(ge=1)] = 16 * 2**20
    """Of one document."""

    piece_words: int = Field(default=120, ge=20, le=2000)
    """Longest piece that a document is cut into. Words and not tokens: a document is then cut the same whichever
    model is served, so that its pieces keep their ids."""

    read_timeout_s: float = Field(default=60.0, gt=0, le=MAX_SECONDS)
    """How long a document may take to be read, in a process of its own."""


class RefinerConfig(Section):
    """The served model restates, at idle, what was remembered of chats; see docs/MEMORY.md."""

    enabled: bool = False

    tokens_per_hour: int = Field(default=50_000, ge=1)
    """Of prompts and answers together, in one API process."""

    prompt_tokens: int = Field(default=1024, ge=256)
    """Of one call: instructions and notes."""

    max_tokens: int = Field(default=1024, ge=64)
    """Of one answer; a longer one is cut off, and refused."""

    @model_validator(mode="after")
    def _holds_a_call(self) -> Self:
        if self.tokens_per_hour < self.prompt_tokens + self.max_tokens:
            raise ValueError("tokens_per_hour must hold at least one call: prompt_tokens and max_tokens together")
        return self


class MemoryConfig(Section):
    """Plaintext memory."""

    default: OnOff = "off"
    """Whether a request without a ``memos`` field uses memory (a key's ``memory`` overrides it)."""

    long_lived_tokens: int = Field(default=1024, ge=0)
    """Budget for memory that stands in the system message, in tokens."""

    late_tokens: int = Field(default=512, ge=0)
    """Budget for memory that is recalled for one query, in tokens."""

    top_k: int = Field(default=10, ge=1, le=1000)
    """How many memories one query recalls at most."""

    session_ttl_s: float = Field(default=3600.0, gt=0, le=MAX_SECONDS)
    """How long an idle session keeps its frozen long-lived memory."""

    embedder: EmbedderConfig = EmbedderConfig()

    documents: DocumentsConfig = DocumentsConfig()

    archive_after_s: Seconds = 90 * 86400.0
    """An unused memory leaves recall after this time, a used one later (``core.lifecycle``); 0: never."""

    remove_expired_after_s: Seconds = 30 * 86400.0
    """How long an expired memory is kept before it is deleted; 0: for ever."""

    store: Literal["lmdb", "postgresql"] = "lmdb"
    """Where memories are kept: in ``data_dir``, or in a database that several machines can share."""

    dsn: SecretStr | None = None
    """PostgreSQL's connection string, such as ``postgresql://memos@db.example/memos``. A password need not stand
    here: libpq takes it from PGPASSWORD or its password file."""

    pgvector: bool = True
    """Whether vectors are kept as pgvector's in PostgreSQL too, for other programs; our search needs it not."""

    refiner: RefinerConfig = RefinerConfig()

    max_map_bytes: Bytes = 64 * 2**30
    """The LMDB map grows up to this size; a write beyond it fails with HTTP 507 and loses nothing."""

    max_user_memories: Annotated[int, Field(ge=1)] | None = 100_000
    """Of one user, with those that are superseded, merged or archived; None: no limit."""

    max_user_bytes: Annotated[Bytes, Field(ge=1)] | None = 2**30
    """Of one user's memories with their earlier versions, links and snapshots; None: no limit."""

    max_import_bytes: Annotated[Bytes, Field(ge=1)] = 256 * 2**20
    """Of one import of memories; every other writer waits while it is written."""

    @model_validator(mode="after")
    def _has_a_database(self) -> Self:
        if self.store == "postgresql" and self.dsn is None:
            raise ValueError("'store: postgresql' needs 'dsn', such as postgresql://memos@db.example/memos")
        return self


class KVConfig(Section):
    """Activation memory: KV off the GPU."""

    save: Literal["memory", "all", "none"] = "memory"
    """Whose prefixes are saved: requests with memory, every request, or none."""

    host_bytes: Bytes = 4 * 2**30
    """Host pool over all ranks and data-parallel engines of the machine; pinned where there is a GPU."""

    disk_bytes: Bytes = 64 * 2**30
    """Files over all ranks and data-parallel engines of the machine; 0 switches the disk tier off."""

    disk_reserve_bytes: Bytes | None = None
    """Of the file system, left free of KV, which goes as others take the space; None: see ``store.disk_room``."""

    chunk_bytes: Annotated[Bytes, Field(ge=1)] = 32 * 2**20
    """Largest file and largest unit of transfer, per rank."""

    min_load_tokens: int = Field(default=64, ge=1)
    """A shorter hit is computed rather than loaded."""

    io_threads: int = Field(default=2, ge=1, le=64)
    """Threads for disk reads and writes, per rank."""

    store_dtype: Literal["auto", "fp8"] = "auto"
    """How KV is kept off the GPU: as it is (exact), or as fp8 in half the bytes (approximate)."""

    layer_groups: int = Field(default=1, ge=1, le=64)
    """In how many groups of layers a request's KV comes from host memory; the request runs from the first one on."""

    @model_validator(mode="after")
    def _groups_only_as_it_is(self) -> Self:
        if self.store_dtype == "fp8" and self.layer_groups > 1:
            raise ValueError("KV that is kept as fp8 is loaded whole; with 'store_dtype: fp8' leave out 'layer_groups'")
        return self

    @model_validator(mode="after")
    def _approximate_only_with_memory(self) -> Self:
        if self.store_dtype == "fp8" and self.save == "all":
            raise ValueError(
                "'save: all' would give requests without memory approximate KV; "
                "with 'store_dtype: fp8' use 'save: memory'"
            )
        return self


class BuildConfig(Section):
    """Computing predicted prefixes that no tier holds, while no request is in the engine."""

    enabled: bool = True

    piece_tokens: int = Field(default=512, ge=1)
    """Tokens of one forward pass: the longest that a request can find the engine busy.

    A GPU computes weights in bfloat16 faster than it reads them from about 300 tokens on (H100: 989
    TFLOP/s over 3.35 TB/s is 295). Fewer tokens take as long as a decode step all the same; 512 take about
    two, and keep most of the throughput of a long prefill.
    """

    busy_share: float = Field(default=0.5, gt=0, le=1)
    """Share of idle time that goes into building at most. A request that comes at any moment then waits, on
    average, for half this share of a piece."""


class PredictionConfig(Section):
    """Next-scene prediction."""

    enabled: bool = True
    """Whether predicted prefixes are brought into, and kept in, the GPU's prefix cache."""

    max_scenes: int = Field(default=64, ge=1, le=10_000)
    """How many scenes are expected at a time at most; the GPU's size limits them further. One user has at most a
    quarter of them, as long as others need the rest."""

    build: BuildConfig = BuildConfig()


class AdaptersConfig(Section):
    """Parametric memory: LoRA adapters. The server must run with vLLM's ``--enable-lora``."""

    import_dir: ExpandedPath | None = None
    """Folder below which ``POST /v1/adapters`` may name an adapter by path; None: uploads only."""

    base_models: list[str] = []
    """Further names of the served model that an adapter may give as its base."""

    max_bytes: Bytes = 2**30
    """Of one adapter's weights."""

    disk_bytes: Bytes = 16 * 2**30
    """Of all adapters' files."""

    on_error: Literal["base", "fail"] = "fail"
    """When an adapter cannot be loaded: answer with the base model and say so, or refuse the request."""

    distill: OnOff = "off"
    """Whether users may have their memories distilled into adapters over REST; it takes minutes of this machine."""

    distilled_text: Literal["keep", "leave_out"] = "keep"
    """Whether memories that the request's adapter was distilled from stand in its prompt as well."""

    choose: Literal["request", "assembler"] = "request"
    """Who names the adapter of a request: it or the user's default alone; or, where both are silent, whatever puts
    memory into the prompt: the distilled adapter that knows most of the user's long-lived memories."""

    may_share_with_all: list[str] = []
    """Tenants whose users may share an adapter with every tenant."""


class SourceUser(Section):
    """A user, or without ``user`` all of a tenant. A key that ``identity.keys`` does not list is a tenant by its
    digest."""

    tenant: str = Field(min_length=1)
    user: str | None = None


SourceUsers = Literal["all"] | Annotated[list[SourceUser], Field(min_length=1)]
SourceName = Annotated[str, Field(pattern="^[a-z0-9][a-z0-9_-]{0,63}$")]


class FolderConfig(Section):
    """A folder whose text, Markdown, HTML and PDF files are recalled from."""

    name: SourceName
    path: ExpandedPath

    users: SourceUsers
    """Who is given what stands in it; there is no default."""

    refresh_s: float = Field(default=60.0, ge=1, le=MAX_SECONDS)
    """How often changes are looked for; each time every file's size and time are read."""

    max_files: int = Field(default=10_000, ge=1)


class WebConfig(Section):
    """Web search: any endpoint that answers a GET with JSON. The user's question is sent there."""

    name: SourceName = "web"

    url: str = Field(pattern=r"^https?://.*\{query\}")
    """With ``{query}``, and ``{limit}`` where the endpoint wants to know how many."""

    users: SourceUsers
    headers_env: dict[str, str] = {}
    """Header to the environment variable with its value, for keys."""

    results: str = "results"
    """Where the list of results stands in the answer, with dots between the names."""

    title: str = "title"
    link: str = "url"
    text: str = "content"
    """Names in a result."""

    deadline_s: float = Field(default=2.0, gt=0, le=MAX_SECONDS)
    """How long a chat waits for it, counted from the start of its recall."""


class SourcesConfig(Section):
    """What is recalled beside memory, and never becomes one."""

    share: float = Field(default=0.5, ge=0, le=1)
    """Share of ``memory.late_tokens`` that sources may take; what they leave is memory's."""

    top_k: int = Field(default=5, ge=1, le=100)
    """How many passages each source gives at most."""

    deadline_s: float = Field(default=0.3, gt=0, le=MAX_SECONDS)
    """How long a chat waits for folders, counted from the start of its recall."""

    folders: list[FolderConfig] = Field(default=[], max_length=16)
    web: WebConfig | None = None

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [source.name for source in (*self.folders, *([self.web] if self.web else []))]
        if len(set(names)) < len(names):
            raise ValueError("two sources have one name")
        return self


class MemosConfig(Section):
    """The whole file."""

    data_dir: ExpandedPath = Path("~/.local/share/memos").expanduser()
    """LMDB and KV files of one server. It is created if it is missing."""

    identity: IdentityConfig = IdentityConfig()
    memory: MemoryConfig = MemoryConfig()
    sources: SourcesConfig = SourcesConfig()
    kv: KVConfig = KVConfig()
    prediction: PredictionConfig = PredictionConfig()
    adapters: AdaptersConfig = AdaptersConfig()


def load(path: str | os.PathLike[str] | None) -> MemosConfig:
    """Reads and checks a configuration file; ``None`` gives the defaults.

    Raises:
        ConfigError: the file is missing, is no YAML mapping, has an unknown key, one twice, or a bad value.
    """
    if path is None:
        return MemosConfig()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    try:
        values = yaml.load(text, _EachKeyOnce)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise ConfigError(f"{path} is not valid YAML{line}: {getattr(error, 'problem', None) or error}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping such as 'data_dir: /srv/memos', not a {type(values).__name__}")
    try:
        return MemosConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(map(_sentence, error.errors()))) from error


class _EachKeyOnce(yaml.SafeLoader):
    """YAML forbids a key twice in one mapping; PyYAML takes the last and is silent about the others."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        known: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in known:  # the line and not the key is told, for it may be an API key
                    problem = "this key stands twice in its section; join the two"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                known.add(key.value)
        return super().construct_mapping(node, deep)


def _sentence(error: Any) -> str:
    key = ".".join(_shown(error["loc"])) or "the file"
    if error["type"] == "extra_forbidden":
        return f"unknown key '{key}'{_known_beside(error['loc'])}"
    if error["type"] == "model_type":
        keys = "" if error["input"] is not None else "; give it keys, or leave it out"
        return f"'{key}' is a section with keys of its own, not {error['input']!r}{keys}"
    # Not whole sections, nor what stands in the place of an API key: they hold API keys and passwords.
    is_secret = isinstance(error["input"], dict | list) or error["loc"] == _KEYS or error["loc"][-1:] == ("[key]",)
    got = "" if is_secret else f" (got {error['input']!r})"
    quotes = (
        "; write it in quotes" if error["type"] == "string_type" and isinstance(error["input"], int | float) else ""
    )
    return f"'{key}': {error['msg'].removeprefix('Value error, ')}{got}{quotes}"


_KEYS = ("identity", "keys")


def _shown(loc: Sequence[Any]) -> list[str]:
    """The place of a problem, with API keys cut short: also one that stands in ``identity`` itself by mistake."""
    parts = [str(part) for part in loc if part != "[key]"]
    if tuple(parts[:2]) == _KEYS and len(parts) > 2:
        parts[2] = api_keys.shown(parts[2])
    elif parts[:1] == ["identity"] and len(parts) > 1 and not re.fullmatch(r"[a-z_]{1,40}", parts[1]):
        parts[1] = api_keys.shown(parts[1])
    return parts


def _known_beside(loc: Sequence[Any]) -> str:
    """The keys of the section that an unknown one stands in; empty where it is not one of ours."""
    section: Any = MemosConfig
    for part in loc[:-1]:
        field = section.model_fields.get(part)
        section = None if field is None else field.annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return ""
    return f"; there are {', '.join(section.model_fields)}"
