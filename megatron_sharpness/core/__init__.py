"""A measurement of critical sharpness, whatever the framework.

:mod:`~megatron_sharpness.core.search` finds η_c with floats alone,
:mod:`~megatron_sharpness.core.meter` makes a record of it,
:mod:`~megatron_sharpness.core.update_line` moves weights along the update,
:mod:`~megatron_sharpness.core.replay` evaluates the step's own passes once more, and
:mod:`~megatron_sharpness.core.watch` tells whether training is as it was.
"""
