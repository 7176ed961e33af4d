"""pyreft's intervention classes as bases of ours, from the moment pyreft is imported.

Importing pyreft takes 1.2 s and brings in pandas, matplotlib and datasets, and
training, saving and loading need none of it. So our classes are defined without pyreft,
and get its classes as further bases when somebody imports it: ``isinstance`` then holds
for objects that were made before as well.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def extend_when_imported(classes: Mapping[str, type]) -> None:
    """Append pyreft's classes to the bases of ours, now or when pyreft is imported.

    Args:
        classes: our class for each name of a pyreft class.
    """
    if "pyreft" in sys.modules:
        _extend(classes, sys.modules["pyreft"])
    else:
        # Patch: Python has no callback for an import.
        sys.meta_path.insert(0, _PyreftFinder(classes))


def _extend(classes: Mapping[str, type], pyreft: ModuleType) -> None:
    for name, ours in classes.items():
        theirs = getattr(pyreft, name, None)
        if theirs is not None and not issubclass(ours, theirs):
            ours.__bases__ = (*ours.__bases__, theirs)


class _PyreftFinder(MetaPathFinder):
    """Finds pyreft as Python would, and extends our classes once it has been loaded."""

    def __init__(self, classes: Mapping[str, type]) -> None:
        self._classes = classes

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: Any = None
    ) -> ModuleSpec | None:
        if name != "pyreft":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_extend(module: ModuleType) -> None:
            load(module)
            _extend(self._classes, module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)

        spec.loader.exec_module = load_and_extend  # type: ignore[method-assign]
        return spec
