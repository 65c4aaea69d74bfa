"""``python -m megatron_sharpness.megatron [--backend {auto,cuda,cpu}] SCRIPT …``

Runs any unmodified Megatron training script with the measurement's flags and hook; also under
torchrun: ``torchrun … -m megatron_sharpness.megatron pretrain_gpt.py …``.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys

import torch


def main(argv: list[str]) -> None:
    """Install what is needed and run the script as ``__main__``."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_sharpness.megatron",
        description="Run a Megatron training script with --measure-critical-sharpness-every.",
    )
    parser.add_argument(
        "--backend",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="'cpu' runs Megatron without a GPU; 'auto', the default, does so where none is seen.",
    )
    parser.add_argument("script", help="the training script, e.g. pretrain_gpt.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own arguments")
    options = parser.parse_args(argv)
    if not os.path.isfile(options.script):
        parser.error(f"script {options.script}: there is no such file; give the path of a script")
    arguments = options.arguments
    if options.backend == "cpu" or (options.backend == "auto" and not torch.cuda.is_available()):
        from megatron_sharpness.megatron import cpu

        arguments = cpu.add_required_flags(arguments)
        if os.environ.get("RANK", "0") == "0":
            print(
                "megatron_sharpness: no CUDA device is used; Megatron runs on the CPU over gloo, "
                f"with {' '.join(arguments[len(options.arguments):])}",
                flush=True,
            )
        cpu.install()

    from megatron_sharpness.megatron import install

    sys.argv = [options.script, *arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(options.script))
    install()
    runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
