"""What measuring critical sharpness costs.

    python -m benchmarks probe                  runs one, prints its table, writes its JSON
    python -m benchmarks all                    runs all of them
    python -m benchmarks all --tables           prints the tables of the committed JSON

Each benchmark is a module here with ``run()``, which returns ``{"settings": …, "results": …}``, and
``table(document)``, which makes a Markdown table of what its JSON holds.
"""

from __future__ import annotations

import argparse
import importlib

from benchmarks import results

NAMES = (
    "probe",
    "measurement",
    "training",
    "hessian",
    "memory",
    "growth",
    "endurance",
    "passes",
    "precision",
    "watch",
    "moments",
    "verified",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__.split("\n\nEach benchmark")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", choices=[*NAMES, "all"], metavar="NAME",
                        help=", ".join(NAMES) + ", or all")
    parser.add_argument("--tables", action="store_true", help="print the tables, run nothing")
    arguments = parser.parse_args()
    for name in NAMES if "all" in arguments.names else arguments.names:
        benchmark = importlib.import_module(f"benchmarks.{name}")
        if not arguments.tables:
            results.save(name, benchmark.run())
        print(f"\n## {name}\n\n{benchmark.table(results.load(name))}", flush=True)


if __name__ == "__main__":
    main()
