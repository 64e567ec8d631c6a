import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from recflow.core.errors import ConfigError
from recflow.hardware.catalogue import find_device, load_catalogue, pick_device
from recflow.hardware.device import Device

NEW: dict[str, Any] = {
    "label": "NVIDIA A40",
    "kind": "gpu",
    "memory_gib": 44.4,
    "bandwidth_gb_s": 696,
    "teraflops": {"fp32": 37.4, "bf16": 149.7},
    "watts": 300,
    "host_memory_gib": 64,
    "cores": 8,
    "price": {"usd_per_hour": 0.4, "date": "2026-02-03", "source": "a contract"},
    "source": "data sheet",
}
NAMES = list(load_catalogue())


def _file(tmp_path: Path, content: Any) -> Path:
    file = tmp_path / "own.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


def _refusal(tmp_path: Path, content: Any) -> str:
    with pytest.raises(ConfigError) as error:
        load_catalogue(_file(tmp_path, content))
    assert "\n" not in str(error.value)
    assert "own.yaml" in str(error.value)
    return str(error.value)


def test_knows_the_devices_of_the_field() -> None:
    expected = ["t4", "l4", "a10g", "l40s", "a100-40", "a100-80", "h100", "h200", "rtx-4090"]
    devices = load_catalogue()
    assert [device.name for device in devices.values() if device.is_gpu] == expected
    assert [name for name in devices if name not in expected] == [
        "cpu-2", "cpu-8", "cpu-16", "cpu-2-zen4", "cpu-8-zen4", "cpu-8-amx",
    ]  # fmt: skip


@pytest.mark.parametrize("device", load_catalogue().values(), ids=NAMES)
def test_every_number_says_where_it_is_from(device: Device) -> None:
    assert re.search(r"https://|As [a-z0-9-]+,", device.source)
    assert re.search(r"on demand", device.price.source)
    assert device.instances
    assert device.node_labels
    key = "nvidia.com/gpu.product" if device.is_gpu else "kubernetes.io/arch"
    assert list(device.node_labels) == [key]


@pytest.mark.parametrize("device", load_catalogue().values(), ids=NAMES)
def test_rates_are_dense_and_in_order(device: Device) -> None:
    rates = device.teraflops
    ordered = [rates[name] for name in ("fp32", "tf32", "bf16", "int8") if name in rates]
    assert ordered == sorted(ordered)
    if "bf16" in rates:
        # A sparse rate among dense ones would be off by two here.
        assert rates["int8"] / rates["bf16"] == pytest.approx(
            4 if device.name == "rtx-4090" else 2, rel=0.05
        )
    # Bytes of a float32 vector that are read while one operation is done: never more than two.
    assert rates["fp32"] * 1e12 > device.bandwidth_gb_s * 1e9


def test_turing_has_no_bf16() -> None:
    assert not find_device("t4").supports("bf16")
    assert not find_device("t4").supports("tf32")


def test_an_unknown_device_is_refused_with_the_names() -> None:
    assert find_device("H100").name == "h100"
    with pytest.raises(
        ConfigError, match=r"device = 'v100' is not allowed; allowed: cpu-2, .*h200"
    ):
        find_device("v100")


def test_an_own_file_changes_adds_and_removes(tmp_path: Path) -> None:
    file = _file(
        tmp_path,
        {
            "remove": ["t4"],
            "devices": {
                "l4": {"memory_gib": 20, "teraflops": {"bf16": 100, "tf32": None}},
                "a40": NEW,
                "cpu-2": {"memory_gib": 24},
            },
        },
    )
    own, shipped = load_catalogue(file), load_catalogue()
    assert list(own) == [name for name in shipped if name != "t4"] + ["a40"]
    changed = shipped["l4"]
    assert own["l4"] == dataclasses.replace(
        changed, memory_gib=20, teraflops={"fp32": 30.3, "bf16": 100, "int8": 242}
    )
    assert own["a40"].price.source == "a contract"
    assert own["cpu-2"].host_memory_gib == own["cpu-2"].memory_gib == 24
    assert all(own[name] == shipped[name] for name in own if name not in ("l4", "a40", "cpu-2"))


def test_an_own_price_keeps_neither_date_nor_source_of_the_shipped_one(tmp_path: Path) -> None:
    price = load_catalogue(_file(tmp_path, {"devices": {"h100": {"price": {"usd_per_hour": 2}}}}))[
        "h100"
    ].price
    assert price.usd_per_hour == 2
    assert price.source == "own.yaml"
    assert price.date != load_catalogue()["h100"].price.date


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_catalogue(_file(tmp_path, "")) == load_catalogue()


def test_a_device_is_plain_data() -> None:
    assert dataclasses.asdict(find_device("l4"))["teraflops"]["bf16"] == 121


POSITIVE = st.floats(0.001, 1e6)


@given(
    changes=st.dictionaries(
        st.sampled_from(NAMES),
        st.fixed_dictionaries(
            {}, optional={"watts": POSITIVE, "bandwidth_gb_s": POSITIVE, "label": st.just("mine")}
        ),
    ),
    removed=st.sets(st.sampled_from(NAMES), max_size=len(NAMES) - 1),
)
def test_what_is_not_named_stays(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], removed: set[str]
) -> None:
    changes = {name: keys for name, keys in changes.items() if name not in removed}
    file = _file(tmp_path_factory.mktemp("own"), {"devices": changes, "remove": sorted(removed)})
    own, shipped = load_catalogue(file), load_catalogue()
    assert list(own) == [name for name in shipped if name not in removed]
    for name, device in own.items():
        assert device == dataclasses.replace(shipped[name], **changes.get(name, {}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"memory_gib": 0}, "memory_gib = 0 is not allowed; allowed: a number above 0"),
        ({"memory_gib": "24 GB"}, "memory_gib = '24 GB' is not allowed; allowed: a number above 0"),
        ({"watts": float("nan")}, "watts = nan is not allowed; allowed: a number above 0"),
        ({"watts": True}, "watts = True is not allowed; allowed: a number above 0"),
        ({"cores": 1.5}, "cores = 1.5 is not allowed; allowed: a whole number from 1 on"),
        ({"kind": "tpu"}, "kind = 'tpu' is not allowed; allowed: cpu or gpu"),
        (
            {"teraflops": {"fp16": 65}},
            "teraflops.fp16 = 'fp16' is not allowed; "
            "allowed: rates above 0 by precision: fp32, tf32, bf16, int8",
        ),
        ({"teraflops": {"fp32": None}}, "teraflops needs fp32; every device multiplies it"),
        (
            {"price": 0.3},
            "price = 0.3 is not allowed; allowed: usd_per_hour, date and source",
        ),
        (
            {"price": {"date": "2026-01-19"}},
            "the key price.usd_per_hour is missing; "
            "allowed: US dollars an hour, a number from 0 on",
        ),
        (
            {"price": {"usd_per_hour": 1, "date": "soon"}},
            "price.date = 'soon' is not allowed; allowed: a date, YYYY-MM-DD",
        ),
        (
            {"price": {"usd_per_hour": 1, "date": "2026-02-30"}},
            "price.date = '2026-02-30' is not allowed; allowed: a date, YYYY-MM-DD",
        ),
        (
            {"price": {"usd_per_hour": 1, "euro": 1}},
            "the key price.euro is not allowed; allowed: usd_per_hour, date, source",
        ),
        ({"memory": 24}, "the key memory is not allowed; allowed: label, kind, memory_gib,"),
        (
            {"node_labels": {"kubernetes.io/arch": "a b"}},
            "node_labels.kubernetes.io/arch = 'a b' is not allowed",
        ),
        ({"instances": ["g6"]}, "instances.0 = 'g6' is not allowed; allowed: a list of machines"),
        (
            {"processor": ["cpu family"]},
            "processor.0 = 'cpu family' is not allowed; allowed: a list",
        ),
    ],
)
def test_impossible_values_are_one_sentence(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    assert f": l4: {sentence}" in _refusal(tmp_path, {"devices": {"l4": changes}})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("devices: [", "is not YAML"),
        ("- t4", "the file = ['t4'] is not allowed"),
        ("gpus: {}", "the key 'gpus' is not allowed; allowed: devices, remove"),
        ("remove: t4", "remove = 't4' is not allowed; allowed: a list of names"),
        ("remove: [v100]", "remove 'v100' is not allowed; allowed: cpu-2, "),
        ("{remove: [t4], devices: {t4: {watts: 60}}}", "t4 is both changed and removed"),
        ("devices: {l4: 3}", "l4 = 3 is not allowed; allowed: keys with values"),
        ("devices: {l4: {watts: 1, watts: 2}}", "the key watts is there twice"),
        ("devices: {l4: {watts: 1}, l4: {watts: 2}}", "the key l4 is there twice"),
        ("devices: {a40: {kind: gpu}}", "a40: the key label is missing; allowed: a text"),
        ("devices: {'L4 ': {}}", "the device name 'L4 ' is not allowed"),
        ("devices: {cpu-2: {host_memory_gib: 3}}", "the machine's only memory"),
        (f"remove: [{', '.join(NAMES)}]", "leaves no device"),
        ("devices: !!python/object/apply:os.system [true]", "is not YAML"),
    ],
)
def test_wrong_files_are_one_sentence(tmp_path: Path, content: str, said: str) -> None:
    assert said in _refusal(tmp_path, content)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read as a catalogue"):
        load_catalogue(tmp_path / "none.yaml")


def test_pick_device_of_an_own_catalogue(tmp_path: Path) -> None:
    own = load_catalogue(_file(tmp_path, {"remove": ["t4"]}))
    with pytest.raises(ConfigError, match="device = 't4' is not allowed"):
        pick_device(own, "t4")
