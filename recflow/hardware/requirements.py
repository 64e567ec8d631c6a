"""What a model asset needs of a machine, said once and in every form that a scheduler reads.

One :class:`HardwareRequirement` gives the labels of an asset, the pod that Kubernetes starts for
it, what Ray reserves for it, the pool it waits in and the tags of runs that make it. They are plain
dictionaries in Dagster's, dagster-k8s' and dagster-ray's terms; none of the three is imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from recflow.core.errors import ConfigError, HardwareError
from recflow.hardware.device import GIB, Device
from recflow.hardware.plan import InferencePlan, TrainingPlan

GPU_TYPE: Final = "recflow/gpu_type"
GPU_MEMORY: Final = "recflow/gpu_memory_gib"
GPU_COUNT: Final = "recflow/gpu_count"
HOST_MEMORY: Final = "recflow/host_memory_gib"
NO_GPU: Final = "none"
"""GPU type of what runs on processors alone."""

KUBERNETES: Final = "dagster-k8s/config"
"""Op tag that dagster-k8s' executor and run launcher read."""

RAY: Final = "dagster-ray/config"
"""Op tag that dagster-ray's executor and run launcher read."""

POOL: Final = "compute"
"""Pool of steps that use all processors; steps on GPUs have a pool for each type of them."""

MARGIN: Final = 1.25
"""Reserved over planned memory. A limit that is too small kills the run, and a quarter is the
largest error that the planner is allowed (``make bench-planner``)."""

# A node keeps a part for itself, and a pod that asks for more than the rest never starts. GKE keeps
# 25 % of the first 4 GiB, 20 % of the next 4, 10 % of the next 8, then less: a fifth or less from
# 12 GiB on (https://cloud.google.com/kubernetes-engine/docs/concepts/plan-node-sizes).
_CORES_OF_THE_NODE: Final = 1
_SHARE_OF_PODS: Final = 0.8
_GPU_RESOURCE: Final = "nvidia.com/gpu"
# Ray gives every node the resource accelerator_type:X, found by itself for these. A sliver of it
# asks for such a node: https://docs.ray.io/en/latest/ray-core/accelerator-types.html
_RAY_TYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        **{name: name.upper() for name in ("t4", "v100", "p100", "a10g", "l4", "l40s")},
        **{name: name.upper() for name in ("a100", "h100", "h200", "b200")},
    }
)
_SLIVER: Final = 0.001


@dataclass(frozen=True, slots=True)
class HardwareRequirement:
    """What one model asset needs.

    Attributes:
        device: Kind of device it is planned for.
        gpu_count: GPUs; 0 for a CPU device.
        gpu_memory_gib: Memory needed of each of them, in whole GiB; 0 for a CPU device.
        host_memory_gib: Memory of the machine, of all processes, in whole GiB.
        cores: Processor cores.
    """

    device: Device
    gpu_count: int
    gpu_memory_gib: int
    host_memory_gib: int
    cores: int

    def __post_init__(self) -> None:
        """Raise ConfigError where the numbers do not belong to such a device."""
        gpus = (self.gpu_count, self.gpu_memory_gib)
        if self.device.is_gpu and min(gpus) < 1:
            raise ConfigError.of(
                "gpu_count, gpu_memory_gib", gpus, f"at least 1 on {self.device.name}"
            )
        if not self.device.is_gpu and any(gpus):
            raise ConfigError.of("gpu_count, gpu_memory_gib", gpus, f"0 on {self.device.name}")
        if min(self.host_memory_gib, self.cores) < 1:
            raise ConfigError.of(
                "host_memory_gib, cores", (self.host_memory_gib, self.cores), "at least 1"
            )

    @classmethod
    def of_plan(cls, plan: TrainingPlan | InferencePlan) -> HardwareRequirement:
        """What a plan asks for: its memory and :data:`MARGIN`, in whole GiB.

        The margin ends where the device does: a plan that fits must find a machine to run on.

        Raises:
            HardwareError: The plan does not fit its device.
        """
        device = plan.device
        if not plan.fits:
            raise HardwareError(
                f"{device.name} has not the memory that is planned; `recflow plan` lists what has"
            )
        training = isinstance(plan, TrainingPlan)
        count = (plan.devices if training else 1) if device.is_gpu else 0
        # On their way to a GPU, weights pass through the memory of the machine.
        host = plan.host_memory if training else plan.memory
        machines = max(count, 1)
        return cls(
            device=device,
            gpu_count=count,
            gpu_memory_gib=_reserved(plan.memory.total, device.memory_gib) if count else 0,
            host_memory_gib=_reserved(
                host.total, device.host_memory_gib * machines * _SHARE_OF_PODS
            ),
            cores=max(1, (device.cores - _CORES_OF_THE_NODE) * machines),
        )

    @property
    def gpu_type(self) -> str:
        """Name of the GPU in the catalogue; :data:`NO_GPU` for a CPU device."""
        return self.device.name if self.device.is_gpu else NO_GPU

    @property
    def tags(self) -> dict[str, str]:
        """Labels of the asset: what it needs, as Dagster allows tags to be."""
        return {
            GPU_TYPE: self.gpu_type,
            GPU_MEMORY: str(self.gpu_memory_gib),
            GPU_COUNT: str(self.gpu_count),
            HOST_MEMORY: str(self.host_memory_gib),
        }

    @property
    def run_tags(self) -> dict[str, str]:
        """Tags of a run that makes this asset alone; limits of the run queue look at them."""
        return run_tags_of([self])

    @property
    def pool(self) -> str:
        """Pool the step waits in; limits on it hold for runs without tags too."""
        return f"gpu_{self.device.name}" if self.device.is_gpu else POOL

    @property
    def op_tags(self) -> dict[str, Any]:
        """Tags of the step: the labels, and what Kubernetes and Ray reserve for it."""
        return {**self.tags, KUBERNETES: self.kubernetes, RAY: self.ray}

    @property
    def kubernetes(self) -> dict[str, Any]:
        """Configuration of the step's pod, as dagster-k8s reads it.

        Requests equal limits: the pod is then of the class that is evicted last
        (https://kubernetes.io/docs/concepts/workloads/pods/pod-qos/).
        """
        amounts = {"cpu": str(self.cores), "memory": f"{self.host_memory_gib}Gi"}
        pod: dict[str, Any] = {}
        if self.device.node_labels:
            pod["node_selector"] = dict(self.device.node_labels)
        if self.gpu_count:
            amounts[_GPU_RESOURCE] = str(self.gpu_count)
            pod["tolerations"] = [
                {"key": _GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"}
            ]
        config: dict[str, Any] = {
            "container_config": {"resources": {"requests": dict(amounts), "limits": dict(amounts)}}
        }
        return {**config, "pod_spec_config": pod} if pod else config

    @property
    def ray(self) -> dict[str, Any]:
        """What dagster-ray reserves: cores, GPUs, bytes of memory, and a node with such a GPU."""
        config: dict[str, Any] = {
            "num_cpus": self.cores,
            "num_gpus": self.gpu_count,
            "memory": self.host_memory_gib * GIB,
        }
        # a100-40 and a100-80 are both A100 to Ray, which tells GPUs apart by model alone.
        kind = _RAY_TYPES.get(self.device.name.partition("-")[0]) if self.gpu_count else None
        return {**config, "resources": {f"accelerator_type:{kind}": _SLIVER}} if kind else config


def run_tags_of(requirements: Iterable[HardwareRequirement]) -> dict[str, str]:
    """Tags of a run that makes several assets: the largest of each dimension.

    A run has one GPU type, that of its most demanding step: most GPU memory in all, then the
    fastest device. What else the run's steps wait for, their pools say.

    Returns:
        Empty for no requirement, so that such runs are not held back by limits on these tags.
    """
    needs = list(requirements)
    if not needs:
        return {}
    most = max(needs, key=_demand)
    return {
        GPU_TYPE: most.gpu_type,
        GPU_MEMORY: str(max(need.gpu_memory_gib for need in needs)),
        GPU_COUNT: str(max(need.gpu_count for need in needs)),
        HOST_MEMORY: str(max(need.host_memory_gib for need in needs)),
    }


def _demand(need: HardwareRequirement) -> tuple[int, float, str]:
    fastest = max(need.device.teraflops.values(), default=0.0) if need.gpu_count else 0.0
    return need.gpu_count * need.gpu_memory_gib, fastest, need.gpu_type


def _reserved(size: int, most_gib: float) -> int:
    """Whole GiB for so many bytes, the margin included as far as there is memory for it."""
    wanted = math.ceil(size * MARGIN / GIB)
    return max(1, math.ceil(size / GIB), min(wanted, math.floor(most_gib)))
