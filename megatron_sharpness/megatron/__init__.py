"""Critical sharpness inside Megatron-LM.

Two ways in, one code: ``python -m megatron_sharpness.megatron pretrain_gpt.py …`` calls
:func:`install` and runs an unmodified script; the patches in ``patches/`` call :func:`hooked` at
the end of Megatron's ``arguments.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron_sharpness.arguments import add_arguments
from megatron_sharpness.core.trial import Trial

__all__ = ["hooked", "install"]

Function = Callable[..., Any]


def hooked(add_megatron_arguments: Function, validate_args: Function) -> tuple[Function, Function]:
    """Megatron's two functions of these names, with the flags and what follows from them.

    Nothing else is imported or hooked unless ``--measure-critical-sharpness-every`` is given, or
    ``--critical-sharpness-frozen``, or ``megatron-sharpness verify`` has started the run.
    """

    @functools.wraps(add_megatron_arguments)
    def add_all_arguments(parser: Any) -> Any:
        return add_arguments(add_megatron_arguments(parser))

    @functools.wraps(validate_args)
    def validate_and_attach(args: Any, *rest: Any, **kwargs: Any) -> Any:
        validated = validate_args(args, *rest, **kwargs)
        frozen = args.critical_sharpness_frozen is not None  # and must not train, measured or not
        trial = Trial.asked_for()
        asked = args.measure_critical_sharpness_every or args.measure_adam_snr
        if asked or frozen or trial is not None:
            try:
                from megatron_sharpness.megatron.hook import attach
                from megatron_sharpness.megatron.trial import attach_trial
            except ImportError as error:
                raise RuntimeError(
                    "--measure-critical-sharpness-every: this version of Megatron lacks what the "
                    f"measurement needs ({error}); use one of megatron-core 0.16 to 0.20, or leave "
                    "the flag out."
                ) from error
            if trial is None:
                attach(args)
            else:
                attach_trial(args, trial)
        return validated

    return add_all_arguments, validate_and_attach


def install() -> None:
    """Hook Megatron in this process, wherever its modules hold the two functions."""
    import sys

    from megatron.training import arguments

    originals = (arguments.add_megatron_arguments, arguments.validate_args)
    replacements = dict(zip(originals, hooked(*originals), strict=True))
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron."):
            for attribute in ("add_megatron_arguments", "validate_args"):
                held = getattr(module, attribute, None)
                if held in replacements:
                    setattr(module, attribute, replacements[held])
