"""The PostgreSQL schema ``memos``: the tables of ``tables``, and what SQL can ask of them.

Each table has ``key`` and ``value`` as the code knows them, both ``bytea``, which PostgreSQL compares byte by
byte. For other programs there are, to read only:

    memos.memories       a row per memory, a column per field of the record
    memos.memory_links   a row per link: source, target, type, since and until when it is true
    memos.linked(tenant, "user", memory, depth, at)   what links lead to, with the way there
    memos.nearest(tenant, "user", embedding, k)       with pgvector: the memories nearest by cosine

Vectors are kept as half floats beside their bytes (``halfvec``), where pgvector is used. ``writers`` has the
number of the last commit of each open store, by which a store whose connection broke within a commit learns
what became of it; ``commits`` counts all.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from memos_vllm.errors import DataDirError
from memos_vllm.memory import records, tables

MIN_SERVER, MIN_PGVECTOR = 130000, (0, 7)
LOCK = int.from_bytes(b"memos", "big")
"""Of the advisory lock that writers hold, one at a time."""


def check_server(connection: Any) -> None:
    """
    Raises:
        DataDirError: too old, or the database's encoding is not UTF-8.
    """
    version = connection.info.server_version
    if version < MIN_SERVER:
        raise DataDirError(
            f"PostgreSQL {version // 10000}.{version % 10000} is too old for a memory store; use version "
            f"{MIN_SERVER // 10000} or later"
        )
    (encoding,) = connection.execute("SHOW server_encoding").fetchone()
    if encoding != "UTF8":
        raise DataDirError(f"the database's encoding is {encoding}; create one for Memos with ENCODING 'UTF8'")


def exists(connection: Any) -> bool:
    (oid,) = connection.execute("SELECT to_regclass('memos.meta')").fetchone()
    return oid is not None


def create_schema(connection: Any) -> None:
    """Asks first: IF NOT EXISTS needs the right to create even where nothing is to be created."""
    if connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = 'memos'").fetchone() is None:
        connection.execute("CREATE SCHEMA memos")


def pgvector_schema(connection: Any, wanted: bool) -> str | None:
    """The schema that has pgvector's types, quoted; the extension is made where it is wanted and can be.

    Raises:
        DataDirError: it is wanted, and missing or too old.
    """
    if not wanted:
        return None
    found = _pgvector(connection)
    if found is None:
        available = "SELECT 1 FROM pg_available_extensions WHERE name = 'vector'"
        if connection.execute(available).fetchone() is None:
            raise DataDirError(
                "the PostgreSQL server has no pgvector; install it there (Debian: postgresql-NN-pgvector), or set "
                "memory.pgvector: false"
            )
        connection.execute("CREATE EXTENSION vector SCHEMA memos")
        found = _pgvector(connection)
        assert found
    schema, version = found
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_PGVECTOR:
        least = ".".join(map(str, MIN_PGVECTOR))
        raise DataDirError(
            f"pgvector {version} is too old; install {least} or later and say ALTER EXTENSION vector UPDATE, or set "
            "memory.pgvector: false"
        )
    return str(schema)


def create(connection: Any, vector_schema: str | None) -> None:
    """Makes the tables and views that are missing, within the caller's transaction."""
    for name in tables.NAMES:
        primary = "key, value" if name in tables.SEVERAL_VALUES else "key"
        connection.execute(
            f"CREATE TABLE IF NOT EXISTS memos.{name} (key bytea, value bytea NOT NULL, PRIMARY KEY ({primary}))"
        )
    connection.execute(
        "CREATE TABLE IF NOT EXISTS memos.writers (id uuid PRIMARY KEY, attempt bigint NOT NULL, at timestamptz);"
        "CREATE TABLE IF NOT EXISTS memos.commits (number bigint NOT NULL);"
        "INSERT INTO memos.commits SELECT 0 WHERE NOT EXISTS (SELECT FROM memos.commits);"
        "DELETE FROM memos.writers WHERE at < now() - interval '7 days'"
    )
    has_embedding = _has_embedding(connection)
    if vector_schema and not has_embedding:
        connection.execute(
            f"ALTER TABLE memos.vectors ADD embedder bytea, ADD embedding {vector_schema}.halfvec;"
            "DELETE FROM memos.vectors"  # they are made again, with both
        )
    elif has_embedding and not vector_schema:
        connection.execute("ALTER TABLE memos.vectors DROP embedder, DROP embedding CASCADE")
    _create_views(connection, vector_schema)


def _create_views(connection: Any, vector_schema: str | None) -> None:
    """Anew only where they changed: it locks them, and other servers may be at work."""
    commands = _VIEWS + (_NEAREST.replace("{vectors}", vector_schema) if vector_schema else "")
    digest = hashlib.sha256(commands.encode()).hexdigest()
    comment = connection.execute("SELECT obj_description('memos'::regnamespace, 'pg_namespace')").fetchone()[0]
    if comment == digest:
        return
    connection.execute(
        "DROP VIEW IF EXISTS memos.memories, memos.memory_links CASCADE;"
        "DROP FUNCTION IF EXISTS memos.linked, memos.nearest, memos.owner_of, memos.as_json, memos.end_of CASCADE;"
        f"{commands}; COMMENT ON SCHEMA memos IS '{digest}'"
    )


def _pgvector(connection: Any) -> tuple[str, str] | None:
    row: tuple[str, str] | None = connection.execute(
        "SELECT quote_ident(nspname), extversion FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace "
        "WHERE extname = 'vector'"
    ).fetchone()
    return row


def _has_embedding(connection: Any) -> bool:
    found = connection.execute(
        "SELECT 1 FROM pg_attribute WHERE attrelid = 'memos.vectors'::regclass AND attname = 'embedding' "
        "AND NOT attisdropped"
    )
    return found.fetchone() is not None


_DEFAULTS = json.dumps(records.MOSTLY).replace("'", "''")

# JSON may hold the character 0 as an escape; PostgreSQL's text cannot, so it is shown as U+FFFD.
_VIEWS = rf"""
CREATE FUNCTION memos.as_json(raw bytea) RETURNS jsonb LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT (CASE WHEN position('\u0000' IN whole) = 0 THEN whole
            ELSE regexp_replace(whole, '(?<!\\)((?:\\\\)*)\\u0000', '\1\\ufffd', 'g') END)::jsonb
    FROM convert_from(raw, 'UTF8') AS whole
$$;
CREATE FUNCTION memos.owner_of(tenant text, "user" text) RETURNS bytea LANGUAGE sql STABLE STRICT AS $$
    SELECT substring(value FROM 1 FOR 8) FROM memos.owners
    WHERE key = sha256(int4send(octet_length(tenant)) || convert_to(tenant, 'UTF8')
                       || int4send(octet_length("user")) || convert_to("user", 'UTF8'))
$$;
CREATE FUNCTION memos.end_of(prefix bytea) RETURNS bytea LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT prefix || '\xffffffffffffffffffffffffffffffffffffffffffffffff'::bytea
$$;
CREATE VIEW memos.memories AS
    SELECT j ->> 'tenant' AS tenant, j ->> 'user' AS "user", (j ->> 'id')::uuid AS id, j ->> 'text' AS text,
        j ->> 'type' AS type, j -> 'tags' AS tags, (j ->> 'pinned')::boolean AS pinned, j ->> 'session' AS session,
        j ->> 'state' AS state, (j ->> 'priority')::int AS priority, j ->> 'sensitivity' AS sensitivity,
        (j ->> 'version')::int AS version, (j ->> 'created_at')::timestamptz AS created_at,
        (j ->> 'updated_at')::timestamptz AS updated_at, (j ->> 'valid_from')::timestamptz AS valid_from,
        (j ->> 'valid_to')::timestamptz AS valid_to, (j ->> 'expires_at')::timestamptz AS expires_at,
        (j ->> 'supersedes')::uuid AS supersedes, (j ->> 'superseded_by')::uuid AS superseded_by,
        (j ->> 'uses')::int AS uses, j -> 'origin' AS origin, key
    FROM memos.records, LATERAL (SELECT '{_DEFAULTS}'::jsonb || memos.as_json(value) AS j) AS decoded;
CREATE VIEW memos.memory_links AS
    SELECT (j ->> 'id')::uuid AS id, (j ->> 'from')::uuid AS source, (j ->> 'to')::uuid AS target,
        j ->> 'type' AS type, (j ->> 'valid_from')::timestamptz AS valid_from,
        (j ->> 'valid_to')::timestamptz AS valid_to, j -> 'origin' AS origin, key
    FROM memos.links, LATERAL (SELECT memos.as_json(value) AS j) AS decoded;
CREATE FUNCTION memos.linked(tenant text, "user" text, memory uuid, depth int DEFAULT 2, at timestamptz DEFAULT now())
RETURNS TABLE (id uuid, steps int, way uuid[], types text[]) LANGUAGE sql STABLE AS $$
    WITH RECURSIVE owner AS (SELECT memos.owner_of(tenant, "user") AS prefix),
    reached (id, steps, way, types) AS (
        SELECT memory, 0, ARRAY[memory], ARRAY[]::text[] FROM owner WHERE prefix IS NOT NULL
        UNION ALL
        SELECT o.other, r.steps + 1, r.way || o.other, r.types || l.type
        FROM reached r CROSS JOIN owner
        JOIN memos.link_ends e ON e.key > prefix || uuid_send(r.id) AND e.key < memos.end_of(prefix || uuid_send(r.id))
        JOIN memos.memory_links l ON l.key = prefix || substring(e.key FROM 25)
        CROSS JOIN LATERAL (SELECT CASE WHEN l.source = r.id THEN l.target ELSE l.source END AS other) AS o
        WHERE r.steps < depth AND o.other <> ALL (r.way)
            AND l.valid_from <= at AND (l.valid_to IS NULL OR at < l.valid_to)
    )
    SELECT DISTINCT ON (id) id, steps, way, types FROM reached WHERE steps > 0 ORDER BY id, steps
$$;
"""
_NEAREST = """
CREATE FUNCTION memos.nearest(tenant text, "user" text, embedding {vectors}.halfvec, k int DEFAULT 10)
RETURNS TABLE (id uuid, distance float8) LANGUAGE sql STABLE AS $$
    WITH owner AS (SELECT memos.owner_of(tenant, "user") AS prefix)
    SELECT encode(substring(v.key FROM 9), 'hex')::uuid, v.embedding OPERATOR({vectors}.<=>) $3
    FROM owner, memos.vectors v
    WHERE v.key > prefix AND v.key < memos.end_of(prefix)
        AND {vectors}.vector_dims(v.embedding) = {vectors}.vector_dims($3)
    ORDER BY 2 LIMIT k
$$;
"""
