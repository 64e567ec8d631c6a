import json
import re
from dataclasses import replace

import pytest

from recflow.core.errors import ConfigError, HardwareError
from recflow.hardware.device import GIB, Device, Price
from recflow.hardware.plan import InferencePlan, Memory, TrainingPlan
from recflow.hardware.requirements import (
    KUBERNETES,
    RAY,
    HardwareRequirement,
    run_tags_of,
)

PRICE = Price(1.0, "2026-01-01", "somewhere")
L4 = Device(
    name="l4",
    label="NVIDIA L4",
    kind="gpu",
    memory_gib=24,
    bandwidth_gb_s=300,
    teraflops={"fp32": 30.0, "bf16": 121.0},
    watts=72,
    host_memory_gib=32,
    cores=8,
    price=PRICE,
    source="somewhere",
    node_labels={"cloud.google.com/gke-accelerator": "nvidia-l4"},
)
A100 = replace(
    L4,
    name="a100-40",
    memory_gib=40,
    host_memory_gib=85,
    cores=12,
    teraflops={"fp32": 19.5, "bf16": 312.0},
)
CPU = replace(
    L4, name="cpu-16", kind="cpu", memory_gib=64, host_memory_gib=64, cores=16, node_labels={}
)


def training(device: Device, memory: float, host: float = 4.0, devices: int = 1) -> TrainingPlan:
    own = Memory({"weights": round(memory * GIB)})
    return TrainingPlan(
        device=device,
        devices=devices,
        precision="bf16",
        memory=own,
        host_memory=Memory({"tables": round(host * GIB)}) if device.is_gpu else own,
        stages=(),
        parameters=1,
        trainable_parameters=1,
        clicks=1,
        texts_per_step=1.0,
        is_calibrated=False,
    )


def inference(device: Device, memory: float) -> InferencePlan:
    return InferencePlan(
        device=device,
        precision="fp32",
        memory=Memory({"weights": round(memory * GIB)}),
        flops_per_text=1.0,
        flops_per_recommendation=1.0,
        limit_texts_per_second=1.0,
        texts_per_second=1.0,
        recommendations_per_second=1.0,
        latency_seconds=1.0,
        is_calibrated=False,
    )


def test_a_plan_for_a_gpu_reserves_both_memories_with_a_margin() -> None:
    need = HardwareRequirement.of_plan(training(L4, memory=9.0, host=5.0))
    # 9 and 5 GiB and a quarter, in whole GiB: 11.25 and 6.25.
    assert (need.gpu_type, need.gpu_count) == ("l4", 1)
    assert (need.gpu_memory_gib, need.host_memory_gib) == (12, 7)
    assert need.cores == 7  # the node keeps one


def test_a_plan_for_processors_needs_no_gpu() -> None:
    need = HardwareRequirement.of_plan(training(CPU, memory=2.0))
    assert (need.gpu_type, need.gpu_count, need.gpu_memory_gib) == ("none", 0, 0)
    assert need.host_memory_gib == 3
    assert need.pool == "compute"


def test_several_gpus_take_the_cores_and_host_memory_of_as_many_machines() -> None:
    need = HardwareRequirement.of_plan(training(A100, memory=30.0, host=60.0, devices=4))
    assert (need.gpu_count, need.gpu_memory_gib) == (4, 38)
    assert need.host_memory_gib == 75
    assert need.cores == 4 * 11


def test_the_margin_ends_where_the_device_does() -> None:
    assert HardwareRequirement.of_plan(training(L4, memory=23.5)).gpu_memory_gib == 24
    # A node keeps a fifth of its 64 GiB at most: a pod of 64 GiB would never start.
    assert HardwareRequirement.of_plan(training(CPU, memory=48.0)).host_memory_gib == 51


def test_a_plan_that_does_not_fit_is_no_requirement() -> None:
    with pytest.raises(HardwareError, match="l4 has not the memory that is planned"):
        HardwareRequirement.of_plan(training(L4, memory=24.5))


def test_weights_of_a_service_pass_through_the_host() -> None:
    need = HardwareRequirement.of_plan(inference(L4, memory=6.0))
    assert (need.gpu_memory_gib, need.host_memory_gib, need.gpu_count) == (8, 8, 1)
    assert HardwareRequirement.of_plan(inference(CPU, memory=6.0)).tags == {
        "recflow/gpu_type": "none",
        "recflow/gpu_memory_gib": "0",
        "recflow/gpu_count": "0",
        "recflow/host_memory_gib": "8",
    }


@pytest.mark.parametrize(
    ("device", "values"),
    [(L4, (0, 0, 1, 1)), (L4, (1, 0, 1, 1)), (CPU, (1, 1, 1, 1)), (CPU, (0, 0, 0, 1))],
)
def test_numbers_that_do_not_belong_to_the_device_are_refused(
    device: Device, values: tuple[int, int, int, int]
) -> None:
    with pytest.raises(ConfigError, match="is not allowed; allowed: "):
        HardwareRequirement(device, *values)


def test_a_pod_reserves_what_it_may_use_on_a_node_that_has_the_gpu() -> None:
    config = HardwareRequirement(A100, 2, 38, 75, 22).op_tags[KUBERNETES]
    resources = config["container_config"]["resources"]
    assert resources["limits"] == {"cpu": "22", "memory": "75Gi", "nvidia.com/gpu": "2"}
    assert resources["requests"] == resources["limits"]
    pod = config["pod_spec_config"]
    assert pod["node_selector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    assert pod["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]


def test_a_pod_without_gpu_goes_anywhere() -> None:
    config = HardwareRequirement(CPU, 0, 0, 3, 15).op_tags[KUBERNETES]
    assert config == {
        "container_config": {
            "resources": {
                "requests": {"cpu": "15", "memory": "3Gi"},
                "limits": {"cpu": "15", "memory": "3Gi"},
            }
        }
    }


def test_ray_reserves_the_same_on_a_node_with_such_an_accelerator() -> None:
    assert HardwareRequirement(A100, 2, 38, 75, 22).op_tags[RAY] == {
        "num_cpus": 22,
        "num_gpus": 2,
        "memory": 75 * GIB,
        "resources": {"accelerator_type:A100": 0.001},
    }
    # Ray knows no such accelerator: any GPU of the cluster.
    other = HardwareRequirement(replace(L4, name="rtx-4090"), 1, 12, 7, 7)
    assert "resources" not in other.op_tags[RAY]
    assert "resources" not in HardwareRequirement(CPU, 0, 0, 3, 15).op_tags[RAY]


def test_gpus_of_a_type_share_a_pool() -> None:
    assert HardwareRequirement(L4, 1, 12, 7, 7).pool == "gpu_l4"
    assert HardwareRequirement(A100, 1, 12, 7, 7).pool == "gpu_a100-40"


@pytest.mark.parametrize("device", [L4, A100, CPU])
def test_tags_are_short_plain_and_serialisable(device: Device) -> None:
    need = HardwareRequirement.of_plan(training(device, memory=3.0))
    for tags in (need.tags, need.run_tags):
        assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,63}", value) for value in tags.values())
    assert json.loads(json.dumps(need.op_tags)) == need.op_tags
    assert need.run_tags == need.tags
    assert need.tags.items() <= need.op_tags.items()


def test_a_run_of_several_assets_needs_the_largest_of_each() -> None:
    small, large = HardwareRequirement(L4, 1, 12, 40, 7), HardwareRequirement(A100, 2, 38, 20, 22)
    scoring = HardwareRequirement(CPU, 0, 0, 50, 15)
    tags = run_tags_of([small, scoring, large])
    assert tags == {
        "recflow/gpu_type": "a100-40",
        "recflow/gpu_memory_gib": "38",
        "recflow/gpu_count": "2",
        "recflow/host_memory_gib": "50",
    }
    assert run_tags_of([large, small, scoring]) == tags


def test_of_two_gpu_types_with_as_much_memory_the_faster_one_counts() -> None:
    needs = [HardwareRequirement(L4, 1, 12, 8, 7), HardwareRequirement(A100, 1, 12, 8, 11)]
    assert run_tags_of(needs)["recflow/gpu_type"] == "a100-40"
    assert run_tags_of(needs[::-1])["recflow/gpu_type"] == "a100-40"


def test_a_run_without_model_assets_has_no_such_tags() -> None:
    assert run_tags_of([]) == {}
