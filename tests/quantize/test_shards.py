"""Files written tensor by tensor are what the safetensors package reads."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from anyrank.errors import RunError
from anyrank.kernels import AffineFormat
from anyrank.quantize.shards import ShardWriter, Spec, affine_specs, layout, shard_names, split


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(12)
    return {
        "odd": torch.randint(0, 255, (3, 7), generator=generator, dtype=torch.uint8),
        "wide": torch.randn(5, 3, generator=generator, dtype=torch.float64),
        "half": torch.randn(5, generator=generator).half(),
        "brain": torch.randn(3, 3, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
        "numbers": torch.arange(4, dtype=torch.int32),
        "turned": torch.randn(4, 6, generator=generator).T,
    }


def specs(tensors) -> dict[str, Spec]:
    return {name: Spec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def test_a_file_is_read_back_bit_for_bit_whatever_the_order(tmp_path):
    tensors = some_tensors()
    with ShardWriter(tmp_path, {"a.safetensors": specs(tensors)}) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_the_file_is_as_long_as_that_of_the_package(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    with ShardWriter(tmp_path, {"a.safetensors": specs(tensors)}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    save_file(tensors, tmp_path / "b.safetensors", metadata={"format": "pt"})
    ours, theirs = (tmp_path / f"{name}.safetensors" for name in "ab")
    assert ours.stat().st_size == theirs.stat().st_size


def test_every_tensor_begins_at_a_multiple_of_its_size():
    _, starts = layout(specs(some_tensors()))
    assert all(starts[n] % t.element_size() == 0 for n, t in some_tensors().items())


def test_groups_stay_together_and_files_stay_small():
    def group(name: str, *sizes: int):
        return {f"{name}{i}": Spec(torch.uint8, (n,)) for i, n in enumerate(sizes)}

    groups = [group("a", 40, 10), group("b", 30), group("c", 30), group("d", 200), group("e", 90)]
    files = split(groups, 100)
    assert [list(file) for file in files] == [["a0", "a1", "b0"], ["c0"], ["d0"], ["e0"]]
    assert list(shard_names(files)) == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_a_layer_stores_is_known_beforehand(bits):
    from anyrank.quantize.minmax import minmax

    form = AffineFormat(bits, (2, 8))
    affine = minmax(torch.randn(6, 24), form)
    codes, offsets = affine_specs("layer", 6, 24, form)
    wanted = {f"layer.{n}": getattr(affine, n) for n in ("codes", "scales", "offsets")}
    assert codes | offsets == specs(wanted)
    assert list(offsets) == ["layer.offsets"]


def test_a_tensor_that_was_planned_but_never_written_is_named(tmp_path):
    tensors = some_tensors()
    writer = ShardWriter(tmp_path, {"a.safetensors": specs(tensors)}).__enter__()
    for name in tensors.keys() - {"half"}:
        writer.write(name, tensors[name])
    with pytest.raises(RunError, match="half was planned, but never written"):
        writer.__exit__(None)


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    with ShardWriter(tmp_path, {"a": {"x": Spec(torch.float32, (2, 3))}}) as writer:
        with pytest.raises(ValueError, match=r"x: got torch\.float32"):
            writer.write("x", torch.zeros(3, 2))
        with pytest.raises(ValueError, match=r"x: got torch\.float16"):
            writer.write("x", torch.zeros(2, 3, dtype=torch.float16))
        writer.write("x", torch.zeros(2, 3))
