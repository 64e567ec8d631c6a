"""The devices that recflow knows, and the user's own file over them.

The catalogue is a YAML file beside this module; its header says how its numbers were taken. A file
of the same form changes, adds and removes devices. Both are checked before anything is planned.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Hashable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from recflow.core.errors import ConfigError
from recflow.hardware.device import Device, Kind, Precision, Price

SHIPPED: Final = "gpus.yaml"
_SECTIONS: Final = ("devices", "remove")


def load_catalogue(own: Path | None = None) -> Mapping[str, Device]:
    """All devices by name, in the order of the file.

    Args:
        own: The user's file; it lies over the one that recflow comes with. A device that it names
            changes in the keys that are given (rates key by key, ``null`` takes a rate away; a
            price as a whole, dated by the file where it has no date), a new one needs all keys, and
            those under ``remove`` are left out.

    Raises:
        ConfigError: A file cannot be read or has an unknown key or an impossible value.
    """
    shipped = _shipped()
    if own is None:
        return _devices(SHIPPED, shipped)
    try:
        text = own.read_text(encoding="utf-8")
        written = datetime.datetime.fromtimestamp(own.stat().st_mtime, tz=datetime.UTC).date()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{own} cannot be read as a catalogue of devices: {error}") from error
    return _devices(str(own), _overlaid(str(own), shipped, _parsed(str(own), text), written))


def find_device(name: str, own: Path | None = None) -> Device:
    """One device.

    Raises:
        ConfigError: There is none of this name, or the catalogue is wrong.
    """
    return pick_device(load_catalogue(own), name)


def pick_device(catalogue: Mapping[str, Device], name: str) -> Device:
    """One device of a catalogue.

    Raises:
        ConfigError: There is none of this name.
    """
    if name.lower() not in catalogue:
        raise ConfigError.of("device", name, ", ".join(catalogue))
    return catalogue[name.lower()]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _iso(value: object) -> object:
    # YAML reads 2026-01-19 as a date.
    return value.isoformat() if type(value) is datetime.date else value


def _pairs(value: object) -> object:
    return tuple(cast("list[object]", value)) if isinstance(value, list) else value


_Positive = Annotated[float, Field(gt=0, description="a number above 0")]
_Text = Annotated[str, Field(min_length=1, max_length=2_000, description="a text")]
_Date = Annotated[
    str,
    BeforeValidator(_iso),
    Field(pattern=r"^\d{4}-\d{2}-\d{2}$", description="a date, YYYY-MM-DD"),
]
_LabelKey = Annotated[str, Field(pattern=r"^([a-z0-9.-]+/)?[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?$")]
_LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?$")]
_Instance = Annotated[str, Field(pattern=r"^[a-z0-9-]+:\S+$")]
_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]


class _PriceEntry(_Strict):
    """See :class:`Price`."""

    usd_per_hour: Annotated[
        float, Field(ge=0, description="US dollars an hour, a number from 0 on")
    ]
    date: _Date
    source: _Text


class _Entry(_Strict):
    """See :class:`Device`."""

    label: _Text
    kind: Annotated[Kind, Field(description="cpu or gpu")]
    memory_gib: _Positive
    bandwidth_gb_s: _Positive
    teraflops: Annotated[
        dict[Precision, _Positive],
        Field(description="rates above 0 by precision: fp32, tf32, bf16, int8"),
    ]
    watts: _Positive
    host_memory_gib: _Positive
    cores: Annotated[int, Field(ge=1, description="a whole number from 1 on")]
    price: Annotated[_PriceEntry, Field(description="usd_per_hour, date and source")]
    source: _Text
    node_labels: Annotated[
        dict[_LabelKey, _LabelValue], Field(description="labels of Kubernetes nodes")
    ] = {}
    instances: Annotated[
        tuple[_Instance, ...],
        BeforeValidator(_pairs),
        Field(description="a list of machines as provider:name"),
    ] = ()
    processor: Annotated[
        tuple[_Word, ...],
        BeforeValidator(_pairs),
        Field(description="a list of words of /proc/cpuinfo: vendor, family-N, flags"),
    ] = ()


class _UniqueKeyLoader(yaml.SafeLoader):
    """Plain YAML without a key twice in one mapping, of which YAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = cast("Any", self).construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} is there twice", key_node.start_mark
                )
            seen.add(key)
        return cast("Any", super()).construct_mapping(node, deep)


@cache
def _shipped() -> Mapping[str, Any]:
    text = files("recflow.hardware").joinpath(SHIPPED).read_text(encoding="utf-8")
    return MappingProxyType(_parsed(SHIPPED, text)["devices"])


def _parsed(file: str, text: str) -> dict[str, Any]:
    """The two sections of a file, each of its right kind."""
    try:
        content = yaml.load(text, _UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{file} is not YAML that a catalogue may hold: {' '.join(str(error).split())}"
        ) from error
    sections = _mapping(file, "the file", {} if content is None else content)
    for key, value in sections.items():
        if key not in _SECTIONS:
            raise ConfigError(
                f"{file}: the key {key!r} is not allowed; allowed: {', '.join(_SECTIONS)}"
            )
        if key == "remove" and not (
            isinstance(value, list) and all(isinstance(n, str) for n in cast("list[Any]", value))
        ):
            raise ConfigError(
                f"{file}: remove = {value!r} is not allowed; allowed: a list of names"
            )
    devices = _mapping(file, "devices", sections.get("devices") or {})
    return {
        "devices": {name: _mapping(file, name, entry) for name, entry in devices.items()},
        "remove": sections.get("remove") or [],
    }


def _mapping(file: str, name: object, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: {name} = {value!r} is not allowed; allowed: keys with values")
    return cast("dict[str, Any]", value)


def _overlaid(
    file: str, shipped: Mapping[str, Any], own: Mapping[str, Any], written: datetime.date
) -> dict[str, Any]:
    """The shipped devices with the own file's changes."""
    known = [*shipped, *own["devices"]]
    for name in own["remove"]:
        if name not in shipped:
            raise ConfigError(
                f"{file}: remove {name!r} is not allowed; allowed: {', '.join(shipped)}"
            )
        if name in own["devices"]:
            raise ConfigError(f"{file}: {name} is both changed and removed; do one of the two")
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(known):
        if name in own["remove"]:
            continue
        entry = dict(shipped.get(name, {}))
        for key, value in own["devices"].get(name, {}).items():
            if key == "teraflops" and isinstance(value, dict):
                rates = {**entry.get(key, {}), **cast("dict[str, Any]", value)}
                value = {k: rate for k, rate in rates.items() if rate is not None}
            elif key == "price" and isinstance(value, dict):
                # A price keeps nothing of the other one's: its date and source would be wrong.
                told = {"date": written.isoformat(), "source": Path(file).name}
                value = {**told, **cast("dict[str, Any]", value)}
            entry[key] = value
        merged[name] = entry
    return merged


def _devices(file: str, entries: Mapping[str, Any]) -> Mapping[str, Device]:
    if not entries:
        raise ConfigError(f"{file} leaves no device; keep at least one")
    return MappingProxyType({name: _device(file, name, entry) for name, entry in entries.items()})


def _device(file: str, name: object, entry: Mapping[str, Any]) -> Device:
    # Names are tag values of Dagster and Kubernetes: at most 63 characters.
    if not (isinstance(name, str) and re.fullmatch(r"(?=.{1,63}$)[a-z0-9]+(-[a-z0-9]+)*", name)):
        raise ConfigError(
            f"{file}: the device name {name!r} is not allowed; "
            "allowed: lower-case letters and digits, with single dashes between, at most 63"
        )
    values = dict(entry)
    if values.get("kind") == "cpu" and "memory_gib" in values:
        values.setdefault("host_memory_gib", values["memory_gib"])
    try:
        checked = _Entry.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{file}: {name}: {_sentence(error)}") from error
    _require_possible(file, name, checked)
    return Device(
        name=name,
        label=checked.label,
        kind=checked.kind,
        memory_gib=checked.memory_gib,
        bandwidth_gb_s=checked.bandwidth_gb_s,
        teraflops=dict(checked.teraflops),
        watts=checked.watts,
        host_memory_gib=checked.host_memory_gib,
        cores=checked.cores,
        price=Price(**checked.price.model_dump()),
        source=checked.source.strip(),
        node_labels=dict(checked.node_labels),
        instances=checked.instances,
        processor=checked.processor,
    )


def _require_possible(file: str, name: str, entry: _Entry) -> None:
    """Raise ConfigError where keys contradict each other."""
    if "fp32" not in entry.teraflops:
        raise ConfigError(f"{file}: {name}: teraflops needs fp32; every device multiplies it")
    if entry.kind == "cpu" and entry.host_memory_gib != entry.memory_gib:
        raise ConfigError(
            f"{file}: {name}: host_memory_gib = {entry.host_memory_gib} is not allowed; "
            f"allowed: memory_gib, {entry.memory_gib}, the machine's only memory"
        )
    try:
        datetime.date.fromisoformat(entry.price.date)
    except ValueError as error:
        raise ConfigError(
            f"{file}: {name}: price.date = {entry.price.date!r} is not allowed; "
            "allowed: a date, YYYY-MM-DD"
        ) from error


def _sentence(error: ValidationError) -> str:
    """The first of the mistakes: the key, the value seen, and what is allowed."""
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"] if part != "[key]"]
    key = ".".join(place)
    fields = _PriceEntry.model_fields if place[0] == "price" and len(place) > 1 else None
    known = fields or _Entry.model_fields
    name = place[1] if fields else place[0]
    if first["type"] == "extra_forbidden":
        return f"the key {key} is not allowed; allowed: {', '.join(known)}"
    allowed = known[name].description or "another value"
    if first["type"] == "missing":
        return f"the key {key} is missing; allowed: {allowed}"
    return f"{key} = {first['input']!r} is not allowed; allowed: {allowed}"
