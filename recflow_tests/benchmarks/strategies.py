"""All fine-tuning strategies on the same clicks: ``make bench-strategies DATA=movielens``.

Materialises ``studies/strategies`` through Dagster on the snapshot that ``make demo`` made from the
same data, and prints its table. A comparison that is already stored is printed as it is.
"""

import sys

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.keys import STRATEGIES_STUDY
from recflow.adapters.strategies import strategies_table
from recflow.core.errors import RecflowError
from recflow.demo import find_deployment, materialise


def say(line: str) -> None:
    """Print at once: the run writes to the same terminal."""
    print(line, flush=True)


def main(data: str) -> None:
    """Compare and print."""
    deployment = find_deployment(data)
    day = str(deployment.settings.last_day)
    materialise(deployment, f'key:"{STRATEGIES_STUDY}"', ["--partition", day], {}, say)
    study = ArtifactStore(deployment.settings.store_dir).get(STRATEGIES_STUDY, day)
    say(f"\n{data}, snapshot {day}, {study.facts['test_impressions']:,} test impressions\n")
    say(strategies_table(study))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except RecflowError as error:
        sys.exit(f"recflow: {error}")
