"""Run a job on a cluster of two nodes, one of which is removed meanwhile. Its last line is JSON.

python -m tests.support.ray_loss BUNDLE LIST OUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster

from serving.errors import OptionError
from serving.inference import runtime
from serving.scoring import score
from serving.scoring.options import ScoringOptions
from serving.utils.progress import Progress
from tests.support.ray_patience import patient

# A lost node is detected after two seconds instead of fifteen.
QUICK = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}


def main() -> None:
    bundle, listed, out = map(Path, sys.argv[1:])
    head = {"num_cpus": 1, "num_gpus": 1, "include_dashboard": False, "_system_config": QUICK}

    def start() -> tuple[Any, Any]:
        cluster = Cluster(initialize_head=True, head_node_args=head)
        return cluster, cluster.add_node(num_cpus=1)

    cluster, node = patient(start)
    os.environ["RAY_ADDRESS"] = cluster.address
    logged: list[str] = []
    killed: dict[str, int] = {}
    step = Progress.step

    def counted(self: Progress, failed: bool) -> None:
        step(self, failed)
        if not killed and self.now > self._total // 4:
            alive = [one for one in actors().values() if one["State"] == "ALIVE"]
            places = [one["Address"]["NodeID"] for one in alive if "Map" in one["ActorClassName"]]
            if len(set(places)) == 2:
                killed["actors"], killed["at"] = places.count(node.node_id), self.now
                cluster.remove_node(node, allow_graceful=False)

    Progress.step = counted  # type: ignore[method-assign]
    try:
        if runtime.expected("auto") == runtime.PROVIDERS["cpu"]:  # the head's GPU does not exist
            try:
                score.score(
                    [str(listed)], bundle, out, ScoringOptions(engine="ray"), log=logged.append
                )
            except OptionError as error:
                logged.append(f"{type(error).__name__} {error}")
        options = ScoringOptions(engine="ray", device="cpu")
        score.score([str(listed)], bundle, out, options, log=logged.append)
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps({"logged": logged, **killed}))


if __name__ == "__main__":
    main()
