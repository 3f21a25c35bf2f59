"""`lazy_dataclass.dataclass` makes what the standard library's makes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, field, replace
from typing import Any

import pytest
from runrecovery_service.lazy_dataclass import dataclass

DESCRIBE = """
import dataclasses, inspect, json, pkgutil, sys
from importlib import import_module
from runrecovery_service import lazy_dataclass
lazy = sys.argv[1] == "lazy"
if not lazy:
    lazy_dataclass.dataclass = dataclasses.dataclass

def init_of(cls):
    if "_first_init" not in cls.__init__.__qualname__:
        return cls.__init__
    owner = next(c for c in cls.__mro__ if "__init__" in vars(c))
    frozen = owner.__setattr__ is lazy_dataclass._refuse_to_set
    return lazy_dataclass._compile_init(owner, frozen=frozen)

def described(cls):
    parameters = inspect.signature(init_of(cls)).parameters.values()
    return {
        "init": [(p.name, int(p.kind), p.default is p.empty) for p in parameters],
        "fields": [field.name for field in dataclasses.fields(cls)],
        "match": cls.__match_args__,
        "slots": vars(cls).get("__slots__"),
        "equality": cls.__eq__ is not object.__eq__,
        "hash": cls.__hash__ is not None and cls.__hash__ is not object.__hash__,
        "no_hash": cls.__hash__ is None,
        "frozen": cls.__setattr__ is not object.__setattr__,
        "ordered": "__lt__" in vars(cls),
    }

found = {}
import runrecovery_service
for module in pkgutil.walk_packages(runrecovery_service.__path__, "runrecovery_service."):
    if module.name.endswith("_main") or module.name.endswith("__main__"):
        continue
    for cls in vars(import_module(module.name)).values():
        if isinstance(cls, type) and "__dataclass_fields__" in vars(cls):
            if cls.__module__.startswith("runrecovery_service."):
                found[f"{cls.__module__}.{cls.__qualname__}"] = described(cls)
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A frozen class with every kind of field."""

    x: int
    y: int = 7
    tags: list[str] = field(default_factory=list)
    unseen: str = field(default="s", repr=False, compare=False)


@dataclass(slots=True)
class Counter:
    """A class with positional fields and computed ones."""

    start: int
    step: int = 1
    at: int = field(init=False)
    seen: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.at = self.start


@dataclass(eq=False)
class Refusal(Exception):
    """An exception with a field."""

    reason: str


@dataclass(eq=False)
class DetailedRefusal(Refusal):
    """A subclass with a further field."""

    detail: str = "none"


class Silent(DetailedRefusal):
    """A subclass that passes its arguments on."""

    def __init__(self) -> None:
        super().__init__("silent")


@dataclass(frozen=True, slots=True)
class Named:
    """A class that has a representation of its own."""

    name: str

    def __repr__(self) -> str:
        return f"<{self.name}>"


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """An ordered class with a field that does not count."""

    major: int
    minor: int
    name: str = field(default="", compare=False)


def describe(kind: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE, kind], check=True, capture_output=True, text=True
    )
    classes: dict[str, Any] = json.loads(done.stdout)
    return classes


def test_every_class_of_the_service_equals_the_one_that_the_standard_library_makes() -> None:
    lazy = describe("lazy")
    assert len(lazy) > 300
    assert lazy == describe("standard")


def test_defaults_and_factories_are_those_of_the_fields() -> None:
    one, other = Point(x=1), Point(x=1, tags=["a"])
    assert (one.y, one.tags, one.unseen, other.tags) == (7, [], "s", ["a"])
    assert Point(x=1).tags is not one.tags


def test_equal_fields_make_equal_instances_with_equal_hashes() -> None:
    assert Named("a") == Named("a")
    assert Named("a") != Named("b")
    assert len({Named("a"), Named("a"), Named("b")}) == 2
    assert Point(x=1, unseen="a") == Point(x=1, unseen="b")


def test_an_ordered_class_compares_its_fields_in_their_order() -> None:
    assert Version(1, 2, "z") < Version(1, 3, "a") < Version(2, 0)
    assert Version(1, 2, "z") <= Version(1, 2, "a") >= Version(1, 1)
    assert not Version(1, 2) > Version(1, 2)
    with pytest.raises(TypeError, match="not supported"):
        _ = Version(1, 2) < (1, 3)  # type: ignore[operator] # the point of the test


def test_a_class_that_can_change_has_no_hash() -> None:
    assert Counter.__hash__ is None


def test_a_representation_shows_the_fields_that_may_be_shown() -> None:
    assert repr(Point(x=1)) == "Point(x=1, y=7, tags=[])"
    assert repr(Named("a")) == "<a>"


def test_a_frozen_instance_refuses_every_change() -> None:
    point = Point(x=1)
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'x'"):
        point.x = 2  # type: ignore[misc] # the point of the test
    with pytest.raises(FrozenInstanceError, match="cannot delete field 'x'"):
        del point.x
    assert point.x == 1


def test_a_replaced_field_leaves_the_others() -> None:
    assert replace(Point(x=1, y=2), x=5) == Point(x=5, y=2)


def test_computed_fields_are_set_after_the_others() -> None:
    counter = Counter(3, 2)
    assert (counter.start, counter.step, counter.at, counter.seen) == (3, 2, 3, [])


def test_an_exception_keeps_its_fields_and_its_arguments() -> None:
    with pytest.raises(Refusal) as raised:
        raise DetailedRefusal("full", detail="disk")
    assert (raised.value.args, raised.value.reason) == (("full",), "full")
    assert repr(raised.value) == "DetailedRefusal(reason='full', detail='disk')"
    assert (Silent().reason, Silent().detail) == ("silent", "none")


def test_a_wrong_argument_names_the_class() -> None:
    with pytest.raises(TypeError, match=r"Point\.__init__\(\) missing 1 required keyword-only"):
        Point()  # type: ignore[call-arg] # the point of the test
    with pytest.raises(TypeError, match=r"Counter\.__init__\(\) got an unexpected keyword"):
        Counter(1, speed=3)  # type: ignore[call-arg] # the point of the test
