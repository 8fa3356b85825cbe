"""Attach to a library when it is imported, without importing it first.

PEFT and Transformers have no entry points for plugins, and importing them takes seconds. A finder
at the head of `sys.meta_path` lets their import run as usual and loads our side right after it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(library: str, ours: str) -> None:
    """Import `ours` as soon as `library` has been imported: now, if it has been already."""
    if library in sys.modules:
        importlib.import_module(ours)
    else:
        sys.meta_path.insert(0, _Finder(library, ours))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, library: str, ours: str) -> None:
        self.library, self.ours = library, ours
        self._asking = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        # Being asked is not being imported: `is_peft_available()` asks, and this finder stays.
        if fullname != self.library or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: Any, finder: _Finder) -> None:
        self.inner, self.finder = inner, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        module.__loader__ = self.inner
        self.inner.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        importlib.import_module(self.finder.ours)
