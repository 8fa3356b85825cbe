"""What cannot be quantized is said in one line, and nothing is left of the attempt."""

import errno
import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_folders import family, saved
from tiny import IDS, llama

from anyrank.errors import ConfigError, DataError, GeometryError, LayerError, RunError
from anyrank.quant.checkpoint import QuantizedModel
from anyrank.quantize.model import quantize_model
from anyrank.quantize.plan import Request


def test_a_model_without_linear_layers_is_refused(tmp_path):
    base = family(tmp_path / "base", "gpt2")
    with pytest.raises(LayerError) as caught:
        quantize_model(base, tmp_path / "out")
    assert str(caught.value) == (
        f"{base}: GPT2LMHeadModel has no torch.nn.Linear to quantize besides lm_head; "
        "other kinds of layers cannot be quantized"
    )
    assert not (tmp_path / "out").exists()


def spoiled(tmp_path: Path, value: float) -> Path:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    return saved(tmp_path / "base", model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused_and_nothing_is_left(value, tmp_path):
    base = spoiled(tmp_path, value)
    with pytest.raises(RunError) as caught:
        quantize_model(base, tmp_path / "out", tile=(1, 16))
    assert str(caught.value) == (
        "model.layers.1.mlp.up_proj: its weight holds NaN or infinite values; use an intact "
        "checkpoint, or keep the layer as it is with --keep up_proj"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_a_weight_beyond_the_storage_precision_is_refused(tmp_path):
    base = spoiled(tmp_path, -1e5)
    with pytest.raises(ConfigError) as caught:
        quantize_model(base, tmp_path / "out", tile=(1, 16))
    assert str(caught.value) == (
        "model.layers.1.mlp.up_proj: its scales or offsets exceed what float16 holds; store them "
        "as bfloat16 or float32, or keep the layer as it is with --keep up_proj"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]
    out = quantize_model(base, tmp_path / "out", tile=(1, 16), dtype=torch.bfloat16)
    assert next(iter(QuantizedModel.open(out).weights()))[1].scales.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"bits": 9}, ConfigError, "bits=9 must lie in 2..8"),
        ({"tile": (0, 4)}, ConfigError, "tile=0x4 must be at least 1x1"),
        (
            {"dtype": torch.int8},
            ConfigError,
            "int8 cannot hold scales and offsets; known: float16, bfloat16, float32",
        ),
        (
            {"quantizer": "minmx"},
            ConfigError,
            "quantizer=minmx is unknown; did you mean minmax?",
        ),
        (
            {"quantizer": "gptq"},
            ConfigError,
            "quantizer=gptq needs calibration rows; name a data set, or use half_quadratic, "
            "which needs none",
        ),
        (
            {"calibration": [IDS[0]]},
            ConfigError,
            "calibration rows are of no use to quantizer=half_quadratic; use gptq, or leave them "
            "out",
        ),
        (
            {"quantizer": "gptq", "calibration": [], "tile": (1, 16)},
            DataError,
            "gptq needs calibration rows, and got none; name a data set to read",
        ),
        (
            {"keep": ["up_prj"], "tile": (1, 16)},
            ConfigError,
            "keep=up_prj: LlamaForCausalLM has no linear layer of this name; "
            "did you mean up_proj, v_proj or q_proj?",
        ),
        (
            {"tile": (1, 64)},
            GeometryError,
            "model.layers.0.mlp.down_proj: groups of 64 columns must divide d_in=96; choose "
            "another --group_size or --tile, or keep the layer in its precision with --keep "
            "down_proj",
        ),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(
    options, kind, text, base, tmp_path
):
    with pytest.raises(kind) as caught:
        quantize_model(base, tmp_path / "out", **options)
    assert str(caught.value) == text
    assert list(tmp_path.iterdir()) == []


def test_an_option_that_makes_no_sense_is_refused_before_the_model_is_looked_for(tmp_path):
    with pytest.raises(ConfigError, match=r"bits=1 must lie in 2\.\.8"):
        quantize_model("no/model", tmp_path / "out", bits=1)
    Request(bits=8, tile=(8, 4), dtype=torch.float32, quantizer="gptq", calibrated=True).check()


def test_a_model_that_is_nowhere_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^no model: neither a folder nor a model of the Hub"):
        quantize_model("no model", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError) as caught:
        quantize_model(tmp_path / "empty", tmp_path / "out")
    assert str(caught.value) == f"{tmp_path / 'empty'}: holds no model (config.json is missing)"


def test_a_quantized_model_is_not_quantized_again(base, tmp_path):
    out = quantize_model(base, tmp_path / "out", tile=(1, 16))
    with pytest.raises(ConfigError) as caught:
        quantize_model(out, tmp_path / "again")
    assert str(caught.value) == (
        f"{out}: is quantized already, by anyrank; quantize its float original"
    )
    with pytest.raises(RunError, match="exists already"):
        quantize_model(base, out)


def test_a_broken_file_is_named(base, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    broken = sorted(folder.glob("*.safetensors"))[0]
    broken.write_bytes(broken.read_bytes()[:-7])
    with pytest.raises(RunError) as caught:
        quantize_model(folder, tmp_path / "out", tile=(1, 16))
    assert str(caught.value).startswith(f"{broken}: cannot be read (")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_a_full_disk_gives_one_line(base, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(RunError, match=r"out: the quantized model needs 0\.1 MB, but 0\.0 MB are"):
        quantize_model(base, tmp_path / "out", tile=(1, 16))


def test_a_disk_that_fills_up_between_two_tensors_leaves_nothing(base, tmp_path, monkeypatch):
    written = []

    class Full(io.BytesIO):
        def close(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    def some(path, mode):
        written.append(path.name)
        return open(path, mode) if len(written) < 20 else Full()

    monkeypatch.setattr("anyrank.quantize.shards.open", some, raising=False)
    with pytest.raises(RunError) as caught:
        quantize_model(base, tmp_path / "out", tile=(1, 16))
    assert str(caught.value) == (
        f"{tmp_path / 'out'}: the disk is full, nothing was written; free some room, or name a "
        "folder on another disk"
    )
    assert len(written) == 20
    assert list(tmp_path.iterdir()) == []
