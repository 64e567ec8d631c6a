"""What model assets need, in every form that a scheduler reads, and in all of them the same."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster_k8s.job import (
    DagsterK8sJobConfig,
    construct_dagster_k8s_job,
    get_user_defined_k8s_config,
)

from recflow.adapters.keys import (
    ADAPTED_ENCODER,
    CONFIGURATION,
    FINE_TUNED,
    ITEM_VECTORS,
    LABEL_EFFICIENCY_STUDY,
    MEASUREMENTS,
    PREDICTIONS,
    STRATEGIES_STUDY,
)
from recflow.adapters.requirements import Need, cheapest, requirements_of, run_tags
from recflow.compression.family import load_family
from recflow.core.errors import HardwareError
from recflow.definitions import defs
from recflow.defs.hardware import NEEDS, model_asset, need_metadata
from recflow.defs.models.run_config import DEFAULTS
from recflow.hardware.calibration import default_calibration
from recflow.hardware.catalogue import load_catalogue
from recflow.hardware.device import GIB, Device
from recflow.hardware.plan import Memory, TrainingPlan
from recflow.hardware.planner import plan_training
from recflow.hardware.presets import find_shape
from recflow.hardware.requirements import (
    GPU_COUNT,
    GPU_MEMORY,
    GPU_TYPE,
    HOST_MEMORY,
    KUBERNETES,
    RAY,
    run_tags_of,
)
from recflow.hardware.workload import TrainingWorkload
from recflow.modeling.config import TrainingConfig, with_values
from recflow.modeling.search_space import Choices, Range
from recflow.settings import PROJECT_ROOT

pytestmark = pytest.mark.filterwarnings("ignore:Asset job .* materializes assets with varying")

CATALOGUE = load_catalogue()
FAMILY = load_family()
GRAPH = defs.resolve_asset_graph()
MODEL_GROUPS = {"models", "search", "studies", "compression", "evaluation", "promotion"}
GPU = "nvidia.com/gpu"
TAGS = {GPU_TYPE, GPU_MEMORY, GPU_COUNT, HOST_MEMORY}
ON_PROCESSORS = [
    *(FAMILY.key(name) for name in FAMILY.variants),
    *(ITEM_VECTORS, PREDICTIONS, MEASUREMENTS),
]


def needs_of(
    base_model: str = "all-MiniLM-L6-v2",
    values: Mapping[str, Any] | None = None,
    devices: list[str] | None = None,
    **options: Any,
) -> Mapping[str, Need]:
    config = with_values(TrainingConfig(), values or {})
    chosen = [CATALOGUE[name] for name in devices or CATALOGUE]
    return requirements_of(base_model, config, FAMILY, chosen, **options)


def gpu_gib(need: Need) -> int:
    assert need.requirement is not None, need.reason
    return need.requirement.gpu_memory_gib


def host_gib(need: Need) -> int:
    assert need.requirement is not None, need.reason
    return need.requirement.host_memory_gib


def run_tags_of_models(needs: Mapping[str, Need]) -> dict[str, str]:
    """Tags of a run of the job ``full``."""
    return run_tags(needs[key] for key in (FINE_TUNED, *ON_PROCESSORS))


def op_tags_of(node: dg.AssetsDefinition) -> dict[str, Any]:
    # Dagster keeps what is no string as JSON, which is what executors read.
    tags = dict(node.op.tags)
    return {
        key: json.loads(value) if key in (KUBERNETES, RAY) else value for key, value in tags.items()
    }


def pod_of(asset: dg.AssetsDefinition) -> Any:
    job = construct_dagster_k8s_job(
        DagsterK8sJobConfig(job_image="recflow", dagster_home="/dagster"),
        ["true"],
        "recflow",
        get_user_defined_k8s_config(asset.op.tags),
    )
    return job.spec.template.spec  # pyright: ignore[reportOptionalMemberAccess]


def definitions_of(needs: Mapping[str, Need]) -> dg.Definitions:
    """Assets as the location makes them, of other needs than this deployment's."""
    made: list[dg.AssetsDefinition] = []
    for key in needs:

        @model_asset(key, group="models", kinds={"pytorch"}, code_version="1", needs=needs)
        def asset() -> None: ...

        made.append(asset)
    return dg.Definitions(assets=made)


def assert_all_forms_agree(definitions: dg.Definitions, needs: Mapping[str, Need]) -> None:
    """Asset tags, step tags, pod, Ray, pool and run tags say the requirement's numbers."""
    graph = definitions.resolve_asset_graph()
    for name, need in needs.items():
        key, requirement = dg.AssetKey(name.split("/")), need.requirement
        assert requirement is not None, need.reason
        expected = {
            "recflow/gpu_type": requirement.device.name if requirement.device.is_gpu else "none",
            "recflow/gpu_memory_gib": str(requirement.gpu_memory_gib),
            "recflow/gpu_count": str(requirement.gpu_count),
            "recflow/host_memory_gib": str(requirement.host_memory_gib),
        }
        node = graph.get(key)
        op_tags = op_tags_of(graph.assets_def_for_key(key))
        assert expected.items() <= node.tags.items()
        assert expected.items() <= op_tags.items()
        assert run_tags_of([requirement]) == expected
        pool = f"gpu_{requirement.device.name}" if requirement.gpu_count else "compute"
        assert node.pools == {pool}

        kubernetes, ray = op_tags[KUBERNETES], op_tags[RAY]
        resources = kubernetes["container_config"]["resources"]
        assert resources["limits"] == resources["requests"]
        assert resources["limits"]["memory"] == f"{requirement.host_memory_gib}Gi"
        assert resources["limits"]["cpu"] == str(requirement.cores) == str(ray["num_cpus"])
        assert resources["limits"].get(GPU, "0") == expected["recflow/gpu_count"]
        pod = kubernetes.get("pod_spec_config", {})
        assert pod.get("node_selector", {}) == requirement.device.node_labels
        tolerated = [toleration["key"] for toleration in pod.get("tolerations", [])]
        assert tolerated == ([GPU] if requirement.gpu_count else [])
        assert ray["num_gpus"] == requirement.gpu_count
        assert ray["memory"] == requirement.host_memory_gib * GIB
        assert len(ray.get("resources", {})) <= requirement.gpu_count
        # The pod that dagster-k8s starts for the step.
        started = pod_of(graph.assets_def_for_key(key))
        assert started.containers[0].resources.to_dict()["limits"] == resources["limits"]
        assert started.containers[0].resources.to_dict()["requests"] == resources["limits"]
        assert (started.node_selector or {}) == requirement.device.node_labels
        assert [one.key for one in started.tolerations or []] == tolerated


def test_every_form_of_a_need_agrees_for_every_model_asset() -> None:
    heavy = {
        node.key.to_user_string()
        for node in map(GRAPH.get, GRAPH.get_all_asset_keys())
        if node.is_materializable and node.group_name in MODEL_GROUPS
    }
    # The report is text and pictures; promoting copies files.
    assert heavy - set(NEEDS) == {"evaluation/report", "promotion/champion"}
    assert set(NEEDS) <= heavy
    assert_all_forms_agree(defs, NEEDS)


@pytest.mark.parametrize("base_model", ["bert-base-uncased", "Qwen3-0.6B"])
def test_they_agree_where_gpus_are_chosen_too(base_model: str) -> None:
    needs = needs_of(base_model)
    assert any(need.tags["recflow/gpu_type"] != "none" for need in needs.values())
    assert_all_forms_agree(definitions_of(needs), needs)


def test_jobs_and_the_schedule_tag_their_runs_with_what_their_steps_need(tmp_path: Path) -> None:
    repository = defs.get_repository_def()
    for job in ("ingest", "monitor", "train", "full", "retrain", "search", "compress", "studies"):
        definition = defs.resolve_job_def(job)
        made = [key.to_user_string() for key in definition.asset_layer.executable_asset_keys]
        needed = [NEEDS[key].requirement for key in made if key in NEEDS]
        expected = run_tags_of(need for need in needed if need is not None)
        tags = {key: value for key, value in definition.tags.items() if key in TAGS}
        assert tags == expected, job
        assert bool(expected) == (job not in ("ingest", "monitor"))
    schedule = repository.get_schedule_def("nightly")
    with (
        dg.DagsterInstance.local_temp(str(tmp_path)) as instance,
        # Left open, it would leave its instance to whatever loads definitions next.
        dg.build_schedule_context(
            instance=instance,
            repository_def=repository,
            scheduled_execution_time=datetime(2026, 2, 10, 3, 0, tzinfo=UTC),
        ) as context,
    ):
        (request,) = schedule.evaluate_tick(context).run_requests
    full = defs.resolve_job_def("full").tags
    assert {key: request.tags[key] for key in TAGS} == {key: full[key] for key in TAGS}


def test_another_base_model_needs_other_hardware() -> None:
    devices = ["cpu-2", "cpu-16", "l4", "h100"]
    small = needs_of("all-MiniLM-L6-v2", devices=devices)
    large = needs_of("Qwen3-8B", devices=devices)
    assert small[FINE_TUNED].tags["recflow/gpu_type"] == "none"
    assert small[FINE_TUNED].pool == "compute"
    # 8 billion weights of 4 bytes alone are 30 GiB.
    assert large[FINE_TUNED].tags["recflow/gpu_type"] != "none"
    assert int(large[FINE_TUNED].tags["recflow/gpu_memory_gib"]) > 30
    assert large[FINE_TUNED].pool == f"gpu_{large[FINE_TUNED].tags['recflow/gpu_type']}"
    limits = large[FINE_TUNED].op_tags[KUBERNETES]["container_config"]["resources"]["limits"]
    assert limits[GPU] == "1"
    # Half a billion weights more, read beside those that a module is built with: 4.5 GiB.
    middle = needs_of("Qwen3-0.6B", devices=devices)
    for key in ON_PROCESSORS:
        assert host_gib(middle[key]) > host_gib(small[key])
    assert host_gib(middle[ITEM_VECTORS]) >= host_gib(small[ITEM_VECTORS]) + 4


def test_another_strategy_needs_other_hardware() -> None:
    frozen = needs_of("Qwen3-0.6B", {"tuning.strategy": "frozen"}, devices=["cpu-2", "h100"])
    full = needs_of("Qwen3-0.6B", {"tuning.strategy": "full"}, devices=["cpu-2", "h100"])
    requirement = {
        name: needs[FINE_TUNED].requirement for name, needs in (("frozen", frozen), ("full", full))
    }
    memory = {
        name: max(need.gpu_memory_gib, need.host_memory_gib)
        for name, need in requirement.items()
        if need is not None
    }
    # All weights of 0.6 billion, their gradients and two moments in 4 bytes: 8.9 GiB at least.
    assert memory["full"] > memory["frozen"] + 6
    assert frozen[FINE_TUNED].tags != full[FINE_TUNED].tags
    assert frozen[FINE_TUNED].op_tags != full[FINE_TUNED].op_tags
    # What does not depend on the strategy does not change.
    assert frozen[PREDICTIONS] == full[PREDICTIONS]
    assert frozen[STRATEGIES_STUDY].tags == full[STRATEGIES_STUDY].tags


@pytest.mark.parametrize("base_model", ["all-MiniLM-L6-v2", "bert-base-uncased", "Qwen3-0.6B"])
def test_what_knows_no_gpu_never_asks_for_one(base_model: str) -> None:
    needs = needs_of(base_model)
    for key in ON_PROCESSORS:
        assert needs[key].tags["recflow/gpu_type"] == "none", key


def test_a_demo_on_a_laptop_needs_no_gpu() -> None:
    bundled = str(PROJECT_ROOT / "data" / "base_models" / "all-MiniLM-L6-v2")
    config = replace(DEFAULTS, seed=1)
    # What a demo allows where there is no GPU.
    processors = [device for device in CATALOGUE.values() if not device.is_gpu]
    needs = requirements_of(bundled, config, FAMILY, processors, max_hours=8.0)
    assert run_tags_of_models(needs)["recflow/gpu_type"] == "none"
    assert int(run_tags_of_models(needs)["recflow/host_memory_gib"]) <= 8


def test_a_search_and_a_comparison_need_what_their_largest_training_does() -> None:
    devices = ["cpu-2", "l4"]
    needs = needs_of("bert-base-uncased", devices=devices)
    full = needs_of("bert-base-uncased", {"tuning.strategy": "full"}, devices=devices)
    assert gpu_gib(needs[STRATEGIES_STUDY]) == gpu_gib(full[FINE_TUNED])
    assert gpu_gib(needs[STRATEGIES_STUDY]) > gpu_gib(needs[FINE_TUNED])
    # Two encoders in one pod: the comparing process holds libraries and tables as well.
    assert host_gib(needs[STRATEGIES_STUDY]) > host_gib(full[FINE_TUNED])

    wide = needs_of(
        "bert-base-uncased",
        devices=devices,
        space={"tuning.tuned_layers": Range(1, 12), "tuning.strategy": Choices(("lora", "full"))},
    )
    assert gpu_gib(wide[CONFIGURATION]) == gpu_gib(full[FINE_TUNED])
    assert gpu_gib(needs[CONFIGURATION]) < gpu_gib(wide[CONFIGURATION])
    assert needs[LABEL_EFFICIENCY_STUDY] == needs[FINE_TUNED]
    on_l4 = needs_of("bert-base-uncased", devices=["l4"])
    assert gpu_gib(on_l4[ADAPTED_ENCODER]) >= gpu_gib(on_l4[FINE_TUNED])


def test_a_deployment_takes_what_it_has_and_what_is_quick_enough() -> None:
    only_l4 = needs_of("bert-base-uncased", devices=["cpu-2", "l4"], max_hours=0.1)
    assert only_l4[FINE_TUNED].tags["recflow/gpu_type"] == "l4"
    only_cpu = needs_of("bert-base-uncased", devices=["cpu-2"])
    assert only_cpu[FINE_TUNED].tags["recflow/gpu_type"] == "none"
    hurried = needs_of("bert-base-uncased", devices=["cpu-2"], max_hours=0.01)
    assert hurried[FINE_TUNED].requirement is None
    assert "no device trains within 0.01 h" in str(hurried[FINE_TUNED].reason)


def test_a_device_that_cannot_multiply_bf16_is_passed_over() -> None:
    bf16 = {"speed.precision": "bf16"}
    assert "t4" in CATALOGUE
    assert needs_of(devices=["cpu-2", "t4"], values=bf16)[FINE_TUNED].requirement is not None
    alone = needs_of(devices=["t4"], values=bf16)
    assert "bf16" in str(alone[FINE_TUNED].reason)
    assert "t4" in str(alone[PREDICTIONS].reason)
    assert "a CPU machine" in str(alone[PREDICTIONS].reason)


def test_a_device_that_the_largest_fits_and_another_does_not_is_passed_over() -> None:
    def plan(device: Device, memory_gib: float) -> TrainingPlan:
        workload = TrainingWorkload.typical()
        made = plan_training(find_shape("all-MiniLM-L6-v2"), TrainingConfig(), workload, device)
        return replace(made, memory=Memory({"weights": round(memory_gib * GIB)}))

    cpu, l4, h100 = (CATALOGUE[name] for name in ("cpu-2", "l4", "h100"))
    # On the first device, a CPU, one takes the most memory; on GPUs the other one does.
    largest_on_cpu = lambda device: plan(device, 4.0 if device.is_gpu else 40.0)  # noqa: E731
    largest_on_gpu = lambda device: plan(device, 60.0 if device.is_gpu else 30.0)  # noqa: E731
    makes = [largest_on_gpu, largest_on_cpu]
    chosen = cheapest("both", makes, [cpu, l4, h100])
    assert [made.device.name for made in chosen] == ["h100", "h100"]
    with pytest.raises(HardwareError, match=r"both fits no device; l4 needs 60.0 GiB of"):
        cheapest("both", makes, [cpu, l4])


def test_measured_factors_count_for_the_device_that_they_name_alone() -> None:
    cpu = CATALOGUE["cpu-2"]
    heavy = replace(default_calibration(cpu), context_bytes=5 * GIB)
    usual = needs_of(devices=["cpu-2"])
    named = needs_of(devices=["cpu-2"], calibration=replace(heavy, device="cpu-2"))
    other = needs_of(devices=["cpu-2"], calibration=replace(heavy, device="somebody's laptop"))
    assert host_gib(named[FINE_TUNED]) >= host_gib(usual[FINE_TUNED]) + 5
    assert other[FINE_TUNED].tags == usual[FINE_TUNED].tags


@pytest.mark.parametrize(
    ("base_model", "reason"),
    [
        ("nobody/has-this-model", "nobody/has-this-model"),
        ("Qwen3-8B", "fits no device; cpu-2 comes nearest"),
    ],
)
def test_an_unknown_need_is_told_and_breaks_nothing(base_model: str, reason: str) -> None:
    needs = needs_of(base_model, devices=["cpu-2"])
    assert needs.keys() == NEEDS.keys()
    definitions = definitions_of(needs)
    graph = definitions.resolve_asset_graph()
    for name, need in needs.items():
        node = graph.get(dg.AssetKey(name.split("/")))
        assert need.requirement is None
        assert node.pools == {"compute"}
        assert not TAGS & node.tags.keys()
        assert not TAGS & graph.assets_def_for_key(node.key).op.tags.keys()
        assert reason in node.metadata["hardware_unknown"].text


def test_a_folder_that_is_fetched_later_has_the_sizes_of_the_encoder_of_its_name(
    tmp_path: Path,
) -> None:
    later = needs_of(str(tmp_path / "all-MiniLM-L6-v2"))
    assert later == needs_of("all-MiniLM-L6-v2")
    assert needs_of(str(tmp_path / "my-encoder"))[FINE_TUNED].requirement is None
    # A folder that is there and holds no model is a mistake, not a model that comes later.
    (tmp_path / "all-MiniLM-L6-v2").mkdir()
    assert needs_of(str(tmp_path / "all-MiniLM-L6-v2"))[FINE_TUNED].requirement is None


def test_the_location_loads_with_a_base_model_that_is_not_here_yet(tmp_path: Path) -> None:
    script = (
        "from recflow.definitions import defs; defs.get_repository_def(); "
        "print(defs.resolve_job_def('full').tags)"
    )
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RECFLOW_")},
        "RECFLOW_HOME": str(tmp_path),
        "RECFLOW_BASE_MODEL": "nobody/has-this-model",
        "HF_HOME": str(tmp_path / "empty"),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{}"


def test_people_see_the_device_and_its_memory_by_part() -> None:
    needs = needs_of("bert-base-uncased", devices=["cpu-2", "l4"])
    shown = need_metadata(needs[FINE_TUNED])
    plan, requirement = needs[FINE_TUNED].plan, needs[FINE_TUNED].requirement
    assert plan is not None
    assert requirement is not None
    assert shown["device"].value == CATALOGUE["l4"].label
    table = str(shown["planned_memory"].value).splitlines()
    assert table[0] == "| GiB | device | machine |"
    cells = {line.split(" | ")[0].strip("| *"): line.strip("| ").split(" | ")[1:] for line in table}
    assert set(plan.memory.parts) < set(cells)
    for part, size in plan.memory.parts.items():
        assert float(cells[part][0]) == pytest.approx(size / GIB, abs=0.005)
    assert float(cells["all"][0].strip("*")) == pytest.approx(plan.memory.total / GIB, abs=0.005)
    reserved = [requirement.gpu_memory_gib, requirement.host_memory_gib]
    assert [int(cell) for cell in cells["reserved"]] == reserved


def test_a_label_of_the_users_own_file_is_shown_as_text() -> None:
    device = replace(CATALOGUE["cpu-2"], label="my <b>box</b>")
    needs = requirements_of("all-MiniLM-L6-v2", TrainingConfig(), FAMILY, [device])
    # A text entry: the web UI renders no markup of it.
    assert need_metadata(needs[FINE_TUNED])["device"] == dg.MetadataValue.text("my <b>box</b>")
