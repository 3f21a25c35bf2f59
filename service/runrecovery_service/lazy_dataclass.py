"""`dataclass` of the standard library, with an `__init__` that is compiled at its first call.

The standard library compiles up to six methods of a class when the class is defined, which takes
0.3 ms. A start defines hundreds of classes, most of which it never instantiates. Here `__repr__`,
`__eq__`, `__hash__` and the refusals of frozen classes are closures, which need no compiler.

There is no `InitVar`, and no pickling of frozen classes.
"""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import MISSING, Field, FrozenInstanceError, fields
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any, NoReturn

__all__ = ["dataclass"]

if TYPE_CHECKING:  # type checkers know the decorator of the standard library
    from collections.abc import Callable
    from dataclasses import dataclass  # noqa: TID251 - this module is its replacement
else:

    def dataclass(cls=None, /, *, frozen=False, eq=True, order=False, **options):
        """Return the class with the methods that `dataclasses.dataclass` would add."""
        if cls is None:
            return lambda cls: dataclass(cls, frozen=frozen, eq=eq, order=order, **options)
        if cls.__doc__ is None:
            cls.__doc__ = cls.__name__  # `make` would compute a signature, which takes longest
        own = frozenset(cls.__dict__)
        make = dataclasses.dataclass  # noqa: TID251 - adds the fields and the slots
        cls = make(init=False, repr=False, eq=False, **options)(cls)
        added = _comparisons(cls, frozen=frozen, order=order) if eq else {}
        added |= {"__init__": _first_init(cls, frozen=frozen), "__repr__": _repr}
        if frozen:
            added |= {"__setattr__": _refuse_to_set, "__delattr__": _refuse_to_delete}
        for name in added.keys() - own:
            setattr(cls, name, added[name])
        return cls


def _first_init(cls: type[Any], *, frozen: bool) -> Callable[..., None]:
    """Return an `__init__` that replaces itself by the compiled one."""

    def __init__(self: object, *args: object, **kwargs: object) -> None:  # noqa: N807 - its name
        cls.__init__ = compiled = _compile_init(cls, frozen=frozen)
        compiled(self, *args, **kwargs)

    return __init__


def _compile_init(cls: type[Any], *, frozen: bool) -> Callable[..., None]:
    names: dict[str, Any] = {"put_": object.__setattr__, "absent_": MISSING}
    positional, keywords, body = ["self"], ["*"], ["pass"]
    for field in fields(cls):
        parameter, value = _init_words(field, names)
        if field.init:
            (keywords if field.kw_only else positional).append(parameter)
        if value:
            body.append(
                f"put_(self, {field.name!r}, {value})" if frozen else f"self.{field.name} = {value}"
            )
    if hasattr(cls, "__post_init__"):
        body.append("self.__post_init__()")
    parameters = positional + (keywords if len(keywords) > 1 else [])
    code = f"def __init__({', '.join(parameters)}):\n " + "\n ".join(body)
    exec(code, names)  # noqa: S102 - as the standard library does; all words are names of fields
    init: Callable[..., None] = names["__init__"]
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    return init


def _init_words(field: Field[Any], names: dict[str, Any]) -> tuple[str, str]:
    """Return the source of a field's parameter in `__init__`, and of the value to assign.

    The latter is empty if nothing is to be assigned. Add to `names` everything to which the two
    texts refer.
    """
    name = field.name
    if field.default_factory is not MISSING:
        names[f"{name}_factory_"] = field.default_factory
        made = f"{name}_factory_()"
        return f"{name}=absent_", f"{made} if {name} is absent_ else {name}" if field.init else made
    if field.default is not MISSING:
        names[f"{name}_default_"] = field.default
        return f"{name}={name}_default_", name if field.init else f"{name}_default_"
    return name, name if field.init else ""


@recursive_repr()
def _repr(self: Any) -> str:
    shown = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.repr)
    return f"{type(self).__qualname__}({shown})"


def _comparisons(cls: type[Any], *, frozen: bool, order: bool) -> dict[str, Any]:
    compared = [field.name for field in fields(cls) if field.compare]
    values: Callable[[Any], Any] = operator.attrgetter(*compared) if compared else bool

    def by(compare: Callable[[Any, Any], bool]) -> Callable[[object, object], bool]:
        def method(self: object, other: object) -> bool:
            if type(other) is not type(self):
                return NotImplemented  # type: ignore[no-any-return] # Python tries the other one
            return compare(values(self), values(other))

        return method

    def __hash__(self: object) -> int:  # noqa: N807 - its name
        return hash(values(self))

    names = ("eq", "lt", "le", "gt", "ge") if order else ("eq",)
    methods: dict[str, Any] = {f"__{name}__": by(getattr(operator, name)) for name in names}
    return methods | {"__hash__": __hash__ if frozen else None}


def _refuse_to_set(self: object, name: str, value: object) -> NoReturn:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_to_delete(self: object, name: str) -> NoReturn:
    raise FrozenInstanceError(f"cannot delete field {name!r}")
