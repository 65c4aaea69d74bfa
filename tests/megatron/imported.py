"""What the process is forked from has imported; see ``forks.py``."""

from megatron_sharpness.megatron import cpu

cpu.install()

import megatron.training  # noqa: E402
import megatron.training.training  # noqa: E402, F401

import megatron_sharpness.megatron.hook  # noqa: E402, F401
