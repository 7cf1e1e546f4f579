"""The locks: what must fit together does."""

from __future__ import annotations

import re

import pytest
import torch

from tests.conftest import REPOSITORY


def locked(kind: str) -> dict[str, str]:
    """Versions by package."""
    text = (REPOSITORY / "requirements" / f"{kind}.txt").read_text()
    return dict(re.findall(r"^([\w.-]+)={2,3}([\w.+-]+)", text, re.MULTILINE))


@pytest.mark.parametrize("package", ["nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime"])
def test_the_compiler_of_cuda_is_of_torchs_cuda(package):
    assert torch.version.cuda is not None, "the lock installs torch's published wheel"
    assert locked("gpu")[package].startswith(f"{torch.version.cuda}.")
