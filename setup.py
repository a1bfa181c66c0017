"""Packages and entry points; the rest of the metadata stands in pyproject.toml."""

from setuptools import find_packages, setup

# Two folders at the top of the repository ship inside the package. A checkout reaches the first one
# through the symbolic link memos_vllm/kernels; package_dir puts real files into a wheel.
SHIPPED_FOLDERS = {"memos_vllm.kernels": "kernels", "memos_vllm.configs": "configs"}

setup(
    packages=[*find_packages(include=["memos_vllm", "memos_vllm.*"]), *SHIPPED_FOLDERS],
    package_dir=SHIPPED_FOLDERS,
    package_data={"memos_vllm.configs": ["*.yaml"]},
    entry_points={
        "console_scripts": ["memos = memos_vllm.cli:main"],
        # vLLM selects plugins of every group by one list of names (VLLM_PLUGINS): one name for all.
        "vllm.general_plugins": ["memos = memos_vllm:register"],
        "vllm.endpoint_plugins": ["memos = memos_vllm.integration.endpoints:create_plugin"],
    },
)
