"""What the models of each host library are made of, and which of their blocks have a fused form.

One module for each host library, of the library's name; `reference` is for this package's own models. Each defines
`INTEGRATION`. Modules are found here by their names, and one is imported only for an object whose class comes from its
host: the host library has been imported by then.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ._converted import convert, converted_bytes, unconvert
from ._fused import Form, Fused, FusedMethod, forget, give_back, has_form, own_methods, take_form
from ._graphed import Limits, Prepare, graphed, reasons_of, summary
from ._kept import note_invalidation
from ._packed import PackedLinear, joined_bytes, packed_bytes

__all__ = [
    "Form",
    "Fused",
    "FusedMethod",
    "Integration",
    "Limits",
    "Options",
    "PackedLinear",
    "convert",
    "converted_bytes",
    "forget",
    "give_back",
    "graphed",
    "has_form",
    "integration_of",
    "joined_bytes",
    "note_invalidation",
    "own_methods",
    "packed_bytes",
    "reasons_of",
    "summary",
    "supported",
    "take_form",
    "unconvert",
]


class Options(NamedTuple):
    """What `accelerate` was asked for, as far as the choice of forms depends on it."""

    inference: bool = True
    cache_text: bool = True

    def allow(self, form: Form) -> bool:
        """Whether modules may take this form."""
        return (self.inference or not form.packs) and (self.cache_text or not form.caches_text)


@dataclass(frozen=True)
class Integration:
    """How `accelerate` treats the objects of one host library.

    Attributes:
        serves: the classes of whole objects, which keep their class. Their subclasses are served too.
        fused: the fused classes. A module takes a fused form if its class is exactly the form's original; so does a
            part that is no module, if the form is a `FusedMethod`. Of several for one original, the first that the
            options allow.
        parts: the modules (and other parts that can be fused) that an object consists of, by name, each to be treated
            by the integration that serves it. A module that is one piece is its own part, named "".
        runs: for `verify`: calls of an object that reach the modules in it. It takes the object and what the user gave
            as inputs, None for synthetic ones; raises TypeError for what it cannot use.
        converts: whether calls of a part may compute in another dtype or memory format.
        attach, detach: what else is switched in a part when its modules take and lose their fused forms. Both may be
            called again, and on copies; what `detach` goes back to is found in the part itself.
    """

    serves: tuple[type, ...]
    fused: tuple[Form, ...]
    parts: Callable[[Any], Mapping[str, Any]]
    runs: Callable[[Any, Any], Iterable[Callable[[], object]]]
    converts: Callable[[Any], bool] = lambda part: True
    attach: Callable[[Any], None] = lambda part: None
    detach: Callable[[Any], None] = lambda part: None
    graphed: Callable[[Any], Prepare | None] = lambda part: None

    def form_of(self, name: str, module: Any, options: Options) -> Form | None:
        """The fused form that a module has, or could have but for what is particular to it, or None."""
        last = name.rpartition(".")[2]
        allowed = [form for form in self.fused if options.allow(form) and (not form.names or last in form.names)]
        current = next((form for form in self.fused if has_form(module, form)), None)
        original = type(module) if current is None else current.original
        for matches in (
            lambda form: form.original is original,
            lambda form: isinstance(module, form.original) and not form.packs,
        ):
            form = next(filter(matches, allowed), None)
            if form is not None:
                return form
        return None

    def has_fused(self, obj: Any) -> bool:
        """Whether an object has one of the fused forms."""
        return any(has_form(obj, form) for form in self.fused)


_MODULE_OF_HOST = {
    "imagen_fast" if module.name == "reference" else module.name: module.name
    for module in pkgutil.iter_modules(__path__)
    if not module.name.startswith("_")
}


def integration_of(obj: object) -> Integration | None:
    """The integration that serves `obj`, or None."""
    for host in dict.fromkeys(cls.__module__.partition(".")[0] for cls in type(obj).__mro__):
        if host in _MODULE_OF_HOST:
            integration = _load(host)
            if isinstance(obj, integration.serves):
                return integration
    return None


def supported() -> str:
    """The classes that are served, for messages; of a host library that is not imported, its name alone."""
    return "; ".join(
        f"{host}: {', '.join(cls.__name__ for cls in _load(host).serves)}" if host in sys.modules else host
        for host in _MODULE_OF_HOST
    )


def _load(host: str) -> Integration:
    return importlib.import_module(f"{__name__}.{_MODULE_OF_HOST[host]}").INTEGRATION
