"""The model to quantize: a folder or a Hub name, its tensors read one at a time.

Every tensor is read through a mapping of its own that goes with the tensor, so no more of a file
than this tensor stays in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import ConfigError, RunError
from ..files import read_json
from ..quant.checkpoint import COMPANIONS, CONFIG, INDEX, WEIGHTS
from .shards import TYPES, Spec, Specs

# What belongs to a model besides its weights and config.json. No .bin: it may hold a pickle.


class Source(ABC):
    """The tensors of a model by name.

    Attributes:
        specs: every tensor, in the order in which reading is fastest.
    """

    specs: Specs

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor."""


class Checkpoint(Source):
    """The safetensors files of a folder; without any, `specs` is empty."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.specs, self._files = {}, {}
        for file in _files(folder):
            self._read_header(file)

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(str(path), "pt") as tensors:
                names = tensors.offset_keys()
                slices = {name: tensors.get_slice(name) for name in names}
                kinds = {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
        except (OSError, SafetensorError) as error:
            raise RunError(f"{path}: cannot be read ({error})") from error
        for name, (dtype, shape) in kinds.items():
            if dtype not in TYPES:
                raise RunError(
                    f"{path}: {name} is of type {dtype}; quantize a float16, bfloat16 or float32 "
                    "model"
                )
            self.specs[name] = Spec(TYPES[dtype], tuple(shape))
            self._files[name] = path

    def read(self, name: str) -> Tensor:
        """One tensor of the files.

        Raises:
            RunError: its file cannot be read.
        """
        path = self._files[name]
        try:
            with safe_open(str(path), "pt") as tensors:
                return tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{path}: cannot be read ({error})") from error


class LoadedModel(Source):
    """A model in memory: for checkpoints whose names or files only Transformers understands."""

    def __init__(self, model: nn.Module) -> None:
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        self._tensors = {k: v for k, v in model.state_dict().items() if k not in tied}
        self.specs = {k: Spec(v.dtype, tuple(v.shape)) for k, v in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor of the model, sharing its memory."""
        return self._tensors[name]


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        return [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else []
    return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]


def local_folder(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a model; a Hub name is downloaded, weights as safetensors only.

    Raises:
        ConfigError: no such folder and no such model on the Hub.
        RunError: the folder holds no model.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        wanted = [CONFIG, INDEX, "model*.safetensors", "*.py", *COMPANIONS]
        try:
            found = snapshot_download(
                str(model), revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"{model}: neither a folder nor a model of the Hub ({reason})") from (
                error
            )
        folder = Path(found)
    if not (folder / CONFIG).is_file():
        raise RunError(f"{folder}: holds no model ({CONFIG} is missing)")
    return folder


def skeleton(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model without memory for its weights, on the meta device.

    Raises:
        ConfigError: Transformers does not know the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        config.__dict__.pop("quantization_config", None)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{folder}: Transformers cannot build the model ({reason})") from error


def load(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The whole model, in the precision of its checkpoint.

    Raises:
        ConfigError: Transformers cannot load it.
        RunError: some weights are not in the checkpoint.
    """
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{folder}: Transformers cannot load the model ({reason})") from error
    model, found = loaded
    if found["missing_keys"]:
        raise RunError(
            f"{folder}: {min(found['missing_keys'])} is not in the checkpoint; "
            "use a complete checkpoint of a causal language model"
        )
    return model.eval()
