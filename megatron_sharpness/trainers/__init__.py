"""The trainers above PyTorch, a module each, which is imported only when asked for:
:mod:`~megatron_sharpness.trainers.hf`, :mod:`~megatron_sharpness.trainers.lightning`,
:mod:`~megatron_sharpness.trainers.nemo_automodel`, :mod:`~megatron_sharpness.trainers.olmo_core`,
:mod:`~megatron_sharpness.trainers.torchtitan`.
"""
