"""Every mode of Megatron: tested here, tested by a run itself, or refused, and why.

``python -m tests.megatron.modes`` prints the tables of docs/megatron_modes.md, from what decides:
the layouts that :mod:`tests.megatron.test_bitwise` trains, and what ``support.py`` refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from megatron_sharpness.megatron import support
from tests.megatron.test_bitwise import COMMON, LAYOUTS

#: Configurations that are refused for more than one flag.
TOGETHER: tuple[dict[str, Any], ...] = (
    {"gtp_weight_remat_size": 2},
    {"use_megatron_fsdp": True, "num_distributed_optimizer_instances": 2},
)

GRAPHS = ("full_iteration", "local", "transformer_engine")

#: Flags of what has to pass the self-test of a run, and the arguments that Megatron makes of them.
SELF_TESTED: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    *(
        (("--fp8-format", "hybrid", "--fp8-recipe", kind), {"fp8": "hybrid", "fp8_recipe": kind})
        for kind in support.RECIPES
    ),
    *((("--cuda-graph-impl", kind), {"cuda_graph_impl": kind}) for kind in GRAPHS),
    (("--enable-cuda-graph",), {"enable_cuda_graph": True}),
    (("--external-cuda-graph",), {"external_cuda_graph": True}),
    (("--optimizer-cuda-graph",), {"optimizer_cuda_graph": True}),
)


def tables() -> str:
    return "\n\n".join([tested(), self_tested(), refused()])


def tested() -> str:
    rows = [
        (name, f"`{' '.join(flags.split())}`" if flags else "", str(processes), when(name))
        for name, (processes, flags) in LAYOUTS.items()
    ]
    return table(("tested here", "flags", "processes", "run"), rows)


def when(name: str) -> str:
    return "at every commit" if name in COMMON else "before each release"


def self_tested() -> str:
    rows = [
        (f"`{' '.join(given)}`", ", ".join(support.self_tested(SimpleNamespace(**arguments))))
        for given, arguments in SELF_TESTED
    ]
    return table(("tested in your run", "so called"), rows)


def refused() -> str:
    return table(("refused", "why"), list(dict.fromkeys(refusals())))


def refusals() -> Iterator[tuple[str, str]]:
    alone = ({name: True} for name in support.REFUSED)
    for configuration in (*alone, *TOGETHER):
        for flag, value, reason in support.refusals(SimpleNamespace(**configuration)):
            shown = flag if value is True else f"{flag} {value}"
            yield f"`{shown}`", reason


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(tables())
