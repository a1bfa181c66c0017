"""Embedders: the rows of a model on disk, and an endpoint over HTTP."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from memos_vllm.errors import ConfigError, EmbedderError, EmbedderRefused
from memos_vllm.memory import vectors as vectors_module
from memos_vllm.memory.embedders import ModelRows
from memos_vllm.memory.encoders import EndpointEncoder, SentenceEncoder, StaticEncoder
from memos_vllm.memory.vectors import Vectors
from tests.memory.embedder_factories import TopicEmbedder, write_model, write_tensor

ROWS = {"tea": [1.0, 0, 0.5], "oolong": [0.8, 0.2, 0.5], "cat": [-1, 1, 0.5], "the": [9, 9, 9]}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


class TestModelRows:
    @pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
    def test_is_the_weighted_mean_of_centred_rows_of_one_length(self, tmp_path: Path, dtype: str) -> None:
        embedder = ModelRows(write_model(tmp_path, ROWS, dtype))
        table = np.zeros((ModelRows.MIN_VOCABULARY, 3))
        table[: len(ROWS)] = list(ROWS.values())
        centred = table - table.mean(axis=0)
        share = 1 / ((np.arange(len(table)) + 1) * np.log(len(table)))
        weights = 1e-3 / (1e-3 + share)
        expected = sum(weights[i] * centred[i] / np.linalg.norm(centred[i]) for i in (0, 2))
        assert embedder.embed(["tea cat"])[0] == pytest.approx(expected, rel=2e-2, abs=1e-6)

    def test_function_words_do_not_count(self, tmp_path: Path) -> None:
        embedder = ModelRows(write_model(tmp_path, ROWS))
        with_and_without = embedder.embed(["the tea", "tea"])
        assert with_and_without[0] == pytest.approx(with_and_without[1])

    def test_a_text_without_words_is_zero(self, tmp_path: Path) -> None:
        assert not ModelRows(write_model(tmp_path, ROWS)).embed(["the", ""]).any()

    def test_long_rows_are_projected_and_keep_their_cosines(self, tmp_path: Path) -> None:
        generator = np.random.default_rng(1)
        tea = generator.standard_normal(1000)
        rows = {
            "tea": tea,
            "oolong": tea + 0.5 * generator.standard_normal(1000),
            "cat": generator.standard_normal(1000),
        }
        embedder = ModelRows(write_model(tmp_path, {word: list(row) for word, row in rows.items()}))
        assert embedder.num_dims == 256
        tea_, oolong, cat = embedder.embed(["tea", "oolong", "cat"])
        assert cosine(tea_, oolong) == pytest.approx(cosine(rows["tea"], rows["oolong"]), abs=0.2)
        assert cosine(tea_, cat) == pytest.approx(0, abs=0.2)

    def test_reads_the_file_that_an_index_names(self, tmp_path: Path) -> None:
        write_model(tmp_path, ROWS)
        (tmp_path / "model.safetensors").rename(tmp_path / "model-00002-of-00002.safetensors")
        write_tensor(tmp_path / "model-00001-of-00002.safetensors", "lm_head.weight", np.ones((2, 2)), "F32")
        weight_map = {"model.embed_tokens.weight": "model-00002-of-00002.safetensors"}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert ModelRows(tmp_path).num_dims == 3

    def test_a_small_vocabulary_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="100 tokens"):
            ModelRows(write_model(tmp_path, ROWS, size=100))

    def test_unknown_formats_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="F8_E4M3"):
            ModelRows(write_model(tmp_path, ROWS, "F8_E4M3"))
        path = write_model(tmp_path, ROWS) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(ConfigError, match="cannot be read"):
            ModelRows(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"no safetensors")
        with pytest.raises(ConfigError, match=r"model\.safetensors is no safetensors"):
            ModelRows(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(ConfigError, match="no safetensors with input embeddings"):
            ModelRows(tmp_path)
        (tmp_path / "tokenizer.json").unlink()
        with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
            ModelRows(tmp_path)


class TestStoredVectors:
    def test_come_back_in_half_precision(self) -> None:
        embedder = TopicEmbedder()
        vector = np.array([1, -2, 0.5], np.float32)
        assert embedder.decode(embedder.encode(vector)) == pytest.approx(vector)

    def test_of_another_embedder_or_none_are_nothing(self) -> None:
        stored = TopicEmbedder("one").encode(np.ones(3, np.float32))
        assert TopicEmbedder("another").decode(stored) is None
        assert TopicEmbedder("one").decode(None) is None


class TestVectors:
    def test_score_is_the_cosine_less_the_mean(self) -> None:
        rows = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32) + 1
        vectors = Vectors(8)
        for slot, row in enumerate(rows, 1):
            vectors.put(slot, row)
        vectors.put(3, rows[5])  # changed
        vectors.remove(7)
        kept = {slot: rows[slot - 1] for slot in range(1, 41) if slot != 7} | {3: rows[5]}
        unit = {slot: row / np.linalg.norm(row) for slot, row in kept.items()}
        mean = np.mean(list(unit.values()), axis=0)
        query = rows[0] + rows[1]
        found = vectors.score(query, 41).scores
        for slot, row in unit.items():
            assert found[slot] == pytest.approx(cosine(row - mean, query / np.linalg.norm(query) - mean), abs=1e-4)
        assert (found[0], found[7], len(vectors)) == (0, 0, 39)

    def test_renumbered_scores_the_same(self) -> None:
        rows = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
        vectors = Vectors(8)
        for slot, row in enumerate(rows, 1):
            vectors.put(slot, row)
        vectors.remove(2)
        renewed = vectors.renumbered(np.array([0, 1, 0, 2, 3, 4, 5]), 6)
        before = vectors.score(rows[0], 7).scores
        assert renewed.score(rows[0], 6).scores == pytest.approx(before[[0, 1, 3, 4, 5, 6]], abs=1e-5)

    @pytest.mark.parametrize("vector", [[0, 0], [np.nan, 1], [np.inf, 1]])
    def test_a_vector_that_says_nothing_is_left_out(self, vector: list[float]) -> None:
        vectors = Vectors(2)
        vectors.put(1, np.array(vector, np.float32))
        assert (len(vectors), vectors.has(1)) == (0, False)
        assert vectors.score(np.ones(2, np.float32), 2).scores.tolist() == [0, 0]


class TestManyVectors:
    """Beyond ``EXACT_UP_TO``, here a low one."""

    SIZE = 3000

    @pytest.fixture
    def rows(self, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
        monkeypatch.setattr(vectors_module, "EXACT_UP_TO", 1000)
        monkeypatch.setattr(vectors_module, "NUM_CANDIDATES", 100)
        generator = np.random.default_rng(0)
        topics = generator.standard_normal((30, 16))
        return (topics[generator.integers(0, 30, self.SIZE)] + generator.standard_normal((self.SIZE, 16))).astype(
            np.float32
        )

    def scored(self, vectors: Vectors, query: np.ndarray, **also: object) -> np.ndarray:
        return vectors.score(query, self.SIZE + 1, **also).scores  # type: ignore[arg-type]

    def filled(self, rows: np.ndarray) -> Vectors:
        vectors = Vectors(16)
        for slot, row in enumerate(rows, 1):
            vectors.put(slot, row)
        return vectors

    def exact(self, vectors: Vectors, query: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
        with monkeypatch.context() as patch:
            patch.setattr(vectors_module, "EXACT_UP_TO", 10**9)
            return self.scored(vectors, query)

    def test_the_nearest_are_found_with_their_exact_scores(
        self, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vectors = self.filled(rows)
        for query in rows[:5]:
            exact, found = self.exact(vectors, query, monkeypatch), self.scored(vectors, query)
            compared = found != 0
            assert found[compared] == pytest.approx(exact[compared], abs=1e-5)
            assert np.mean(compared[np.argsort(-exact)[:20]]) >= 0.9
            assert compared.sum() < self.SIZE / 2

    def test_what_the_caller_names_is_compared(self, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
        vectors = self.filled(rows)
        far = np.argsort(self.exact(vectors, rows[0], monkeypatch))[:50]
        assert (self.scored(vectors, rows[0], also=far)[far] != 0).all()

    def test_changes_are_followed(self, rows: np.ndarray) -> None:
        vectors = self.filled(rows)
        self.scored(vectors, rows[0])
        vectors.remove(1)
        vectors.put(2, rows[0])
        new_slots = np.arange(-1, self.SIZE)
        new_slots[:2] = 0  # slot 1 is out, all others are one lower
        vectors = vectors.renumbered(new_slots, self.SIZE)
        found = vectors.score(rows[0], self.SIZE).scores
        assert int(np.argmax(found)) == 1
        assert found[1] == pytest.approx(1, abs=1e-5)
        assert np.sum(found > 0.9999) == 1

    def test_nothing_of_a_removed_vector_is_left(self, rows: np.ndarray) -> None:
        vectors = self.filled(rows)
        self.scored(vectors, rows[0])
        for slot in (5, 6):
            vectors.remove(slot)
        assert not vectors._rows[5:7].any()
        assert vectors._cells._file.ntotal == len(vectors) == self.SIZE - 2

    def test_the_sample_tells_the_spread_of_all(self, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
        vectors = self.filled(rows)
        exact = self.exact(vectors, rows[0], monkeypatch)[1:]
        result = vectors.score(rows[0], self.SIZE + 1)
        assert result.scores[result.sample].std() == pytest.approx(exact.std(), rel=0.1)


class TestEndpoint:
    def embedder(self, handler: httpx.MockTransport) -> EndpointEncoder:
        return EndpointEncoder("http://host/v1/", "small", client=httpx.Client(transport=handler))

    def test_asks_as_openai_does_and_takes_rows_by_their_index(self) -> None:
        asked: list[dict[str, object]] = []

        def answer(request: httpx.Request) -> httpx.Response:
            body = json.loads(request.content)
            asked.append({"url": str(request.url), **body})
            rows = [{"index": i, "embedding": [float(len(text)), 1.0]} for i, text in enumerate(body["input"])]
            return httpx.Response(200, json={"data": rows[::-1]})

        embedder = self.embedder(httpx.MockTransport(answer))
        assert embedder.embed(["a", "bbb"]).tolist() == [[1, 1], [3, 1]]
        assert asked[-1] == {"url": "http://host/v1/embeddings", "model": "small", "input": ["a", "bbb"]}
        assert len(embedder.embed(["x"] * 130)) == 130
        assert max(len(each["input"]) for each in asked) <= 64  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "answer",
        [
            httpx.Response(500),
            httpx.Response(200, text="no JSON"),
            httpx.Response(200, json={"data": []}),
            httpx.Response(200, json={"data": [{"index": 0, "embedding": "x"}]}),
        ],
    )
    def test_a_bad_answer_is_an_error_that_names_the_url(self, answer: httpx.Response) -> None:
        good = httpx.Response(200, json={"data": [{"index": 0, "embedding": [1.0]}]})
        answers = [good, answer]
        embedder = self.embedder(httpx.MockTransport(lambda _: answers.pop(0)))
        with pytest.raises(EmbedderError, match="http://host/v1/embeddings"):
            embedder.embed(["a"])

    @pytest.mark.parametrize(
        ("status", "refuses"),
        [*((status, True) for status in (400, 413, 422)), *((status, False) for status in (401, 404, 408, 429, 503))],
    )
    def test_a_text_that_is_refused_is_no_endpoint_that_is_away(self, status: int, refuses: bool) -> None:
        good = httpx.Response(200, json={"data": [{"index": 0, "embedding": [1.0]}]})
        answers = [good, httpx.Response(status, text="this text")]
        embedder = self.embedder(httpx.MockTransport(lambda _: answers.pop(0)))
        with pytest.raises(EmbedderError) as caught:
            embedder.embed(["a"])
        assert isinstance(caught.value, EmbedderRefused) is refuses

    def test_an_endpoint_that_is_away_stops_the_start(self) -> None:
        def away(request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("refused")

        with pytest.raises(ConfigError, match="refused"):
            self.embedder(httpx.MockTransport(away))

    def test_a_missing_key_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("NO_SUCH_KEY", raising=False)
        with pytest.raises(ConfigError, match="NO_SUCH_KEY is not set"):
            EndpointEncoder("http://host/v1", "small", api_key_env="NO_SUCH_KEY")


@pytest.mark.parametrize(
    ("encoder", "module", "words"),
    [
        (SentenceEncoder, "sentence_transformers", "pip install sentence-transformers"),
        (StaticEncoder, "model2vec", "pip install model2vec"),
    ],
)
def test_a_library_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, encoder: type, module: str, words: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=words):
        encoder("somewhere")
