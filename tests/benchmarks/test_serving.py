"""Whether there is a GPU to serve on; no server is started here."""

import importlib.metadata
import json
import subprocess
from types import SimpleNamespace

import pytest

from benchmarks import serving


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """Neither a file of the driver nor a device, and no nvidia-smi; vLLM's CUDA build."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.26.0")
    monkeypatch.setattr(serving, "DRIVER_FILES", (str(tmp_path / "version"), str(tmp_path / "nvidia0")))
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: SimpleNamespace(returncode=9, stdout=b"no driver"))
    serving.has_driver.cache_clear()
    yield tmp_path
    serving.has_driver.cache_clear()


def test_without_a_driver_there_is_no_gpu(driver):
    assert not serving.has_gpu()


@pytest.mark.parametrize("name", ["version", "nvidia0"])
def test_a_file_of_the_driver_or_a_device_is_a_gpu(driver, name, monkeypatch):
    (driver / name).touch()
    assert serving.has_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not serving.has_gpu()


@pytest.mark.parametrize(("listed", "gpu"), [(b"GPU 0: NVIDIA H100 80GB HBM3\n", True), (b"\n", False)])
def test_a_gpu_that_nvidia_smi_lists_is_a_gpu(driver, listed, gpu, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: SimpleNamespace(returncode=0, stdout=listed))
    assert serving.has_gpu() is gpu


def test_the_cpu_build_serves_on_no_gpu(driver, monkeypatch):
    (driver / "nvidia0").touch()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.26.0+cpu")
    assert not serving.has_gpu()


def test_servers_on_a_gpu_decode_in_whole_graphs_and_compile_nothing(monkeypatch):
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

    monkeypatch.setattr(serving, "has_gpu", lambda: True)
    flags = serving.Server("model", log_path="unused")._flags()
    config = CompilationConfig(**json.loads(flags[flags.index("--compilation-config") + 1]))
    assert config.mode == CompilationMode.NONE and config.cudagraph_mode == CUDAGraphMode.FULL_DECODE_ONLY
    assert config.cudagraph_capture_sizes[-1] == 32
    own = serving.Server("model", log_path="unused", extra=["--compilation-config", "{}"])._flags()
    assert own.count("--compilation-config") == 1


def test_logs_stand_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv(serving.LOG_DIRECTORY, str(tmp_path / "logs" / "servers"))
    path = serving.Server("model").log_path
    assert path.parent == tmp_path / "logs" / "servers" and path.exists()
