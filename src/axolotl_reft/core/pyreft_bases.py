"""pyreft's intervention classes as bases of ours, from the moment pyreft is imported.

Importing pyreft takes 1.2 s and brings in pandas, matplotlib and datasets, and
training, saving and loading need none of it. Once somebody imports it, ``isinstance``
holds for objects that were made before as well.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _PyreftFinder(MetaPathFinder):
    """Finds pyreft as Python would, and extends our classes once it has been loaded."""

    def __init__(self, classes: Mapping[str, type]) -> None:
        self._classes = classes

    def extend(self, pyreft: ModuleType) -> None:
        for name, ours in self._classes.items():
            theirs = getattr(pyreft, name, None)
            if theirs is not None and not issubclass(ours, theirs):
                ours.__bases__ = (*ours.__bases__, theirs)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: Any = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == "pyreft" else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_extend(module: ModuleType) -> None:
            load(module)
            self.extend(module)

        spec.loader.exec_module = load_and_extend  # type: ignore[method-assign]
        return spec


def extend_when_imported(classes: Mapping[str, type]) -> None:
    """Append pyreft's classes, by name, to the bases of ours, once it is imported."""
    finder = _PyreftFinder(classes)
    if "pyreft" in sys.modules:
        finder.extend(sys.modules["pyreft"])
    else:
        # Patch: Python has no callback for an import.
        sys.meta_path.insert(0, finder)
