"""The public names, and the stdlib error that each error also is."""

from __future__ import annotations

import inspect
import pkgutil

import pytest

import anyrank
from anyrank import errors

PUBLIC = [
    "AnyRankConfig",
    "AnyRankError",
    "Draw",
    "Geometry",
    "METHODS",
    "Method",
    "RankCallback",
    "RankPlan",
    "Schedule",
    "__version__",
    "evaluate_ranks",
    "export_lora",
    "fold_run",
    "lean_decoder",
    "quantize_model",
]
STDLIB = {
    "ConfigError": ValueError,
    "GeometryError": ValueError,
    "RankError": ValueError,
    "LayerError": TypeError,
    "MergeError": RuntimeError,
    "DataError": ValueError,
    "RunError": OSError,
    "MissingPackageError": ImportError,
}


def test_the_public_names_are_exactly_these():
    assert sorted(anyrank.__all__) == PUBLIC
    assert len(anyrank.__all__) == len(set(anyrank.__all__))


def test_dir_shows_the_public_names():
    assert dir(anyrank) == PUBLIC


@pytest.mark.parametrize("name", sorted({*PUBLIC} - {"METHODS", "__version__"}))
def test_a_public_name_is_the_class_or_function_of_that_name(name):
    value = getattr(anyrank, name)
    assert value.__name__ == name
    assert value.__module__.startswith("anyrank.")


def test_methods_and_version_are_data():
    assert set(anyrank.METHODS) >= {"lora", "qdylora", "qbara", "qahira"}
    assert all(isinstance(row, anyrank.Method) for row in anyrank.METHODS.values())
    assert anyrank.__version__.count(".") == 2


def test_no_public_name_is_also_the_name_of_a_module():
    """Importing a module binds it as an attribute of the package, in place of the public name."""
    modules = {module.name for module in pkgutil.iter_modules(anyrank.__path__)}
    assert {"errors", "tuner", "export"} <= modules
    assert modules & set(anyrank.__all__) == set()


def test_an_unknown_attribute_is_named_in_the_error():
    with pytest.raises(AttributeError) as caught:
        anyrank.export_gguf_to_the_moon  # noqa: B018
    assert str(caught.value) == "module 'anyrank' has no attribute 'export_gguf_to_the_moon'"


def test_the_errors_are_exactly_these():
    children = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.AnyRankError)
    }
    assert children == {*STDLIB, "AnyRankError"}
    assert anyrank.AnyRankError is errors.AnyRankError


@pytest.mark.parametrize("name", STDLIB)
def test_an_error_is_caught_as_anyrank_error_and_as_its_stdlib_error(name):
    error = getattr(errors, name)
    for expected in (errors.AnyRankError, STDLIB[name]):
        with pytest.raises(expected) as caught:
            raise error("q_proj: pool=48 must divide d_in=4096")
        assert str(caught.value) == "q_proj: pool=48 must divide d_in=4096"
