"""Critical sharpness in the recipe of NeMo AutoModel that pretrains and fine-tunes causal LMs."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sharpness.core.errors import refuse
from megatron_sharpness.pytorch.critical_sharpness import CriticalSharpness
from megatron_sharpness.sinks import ConsoleSink, JsonLinesSink

try:
    from nemo_automodel.components.loggers.metric_logger import MetricsSample
    from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction
except ImportError as error:
    raise ImportError(
        f"megatron_sharpness.trainers.nemo_automodel needs nemo-automodel ({error}); "
        'pip install ".[automodel]" in a clone of megatron_sharpness'
    ) from error


class CriticalSharpnessRecipe(TrainFinetuneRecipeForNextTokenPrediction):
    """A recipe that measures critical sharpness λ_c = 2/η_c (Def. 2.1).

    ::

        recipe: megatron_sharpness.trainers.nemo_automodel.CriticalSharpnessRecipe
        critical_sharpness:
          every: 100

    The section takes ``every`` and the other arguments of :class:`CriticalSharpness` that YAML can
    say; without it, or with ``every`` = 0, the recipe trains by the same code as the one it is
    derived from. L is ``loss`` of ``training.jsonl``. The values are among the metrics of the step
    measured, ``critical_sharpness``, …, wherever those go; the records go to
    ``critical_sharpness.jsonl`` in the ``checkpoint_dir``.

    Raises:
        InputError: the configuration cannot be measured with; the message names the section.
    """

    sharpness: CriticalSharpness | None = None

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        section = self.cfg.get("critical_sharpness", None)
        self._settings: dict[str, Any] = section.to_dict() if section is not None else {}
        self._loaded: dict[str, Any] = {}
        self._measures = bool(self._settings.setdefault("every", 0))
        if self._measures:
            _refuse_unsupported(self.cfg)

    def setup(self) -> None:
        super().setup()
        if not self._measures:
            return
        refuse(
            {
                "model.backend.cuda_graph: a replayed CUDA graph runs no hooks, which the "
                "measurement needs; leave it out, or set critical_sharpness.every to 0": (
                    self.partial_cuda_graph_manager is not None
                ),
            }
        )
        log = os.path.join(self.checkpointer.config.checkpoint_dir, "critical_sharpness.jsonl")
        # From here on the recipe saves it: what it tracks is whatever it has as an attribute.
        self.sharpness = CriticalSharpness(
            self.model_parts[0],
            self.optimizer,
            sinks=[ConsoleSink(logging.info), JsonLinesSink(log)],
            **self._settings,
        )
        self.sharpness.load_state_dict(self._loaded)

    def run_train_validation_loop(self) -> None:
        super().run_train_validation_loop()
        if self.sharpness is not None:
            self.sharpness.close()

    def _run_train_optim_step(
        self, batches: list[dict[str, Any]], max_grad_norm: float | None = None
    ) -> MetricsSample:
        sample = super()._run_train_optim_step(batches, max_grad_norm)
        if self.sharpness is None:
            return sample
        tokens = sample.metrics["num_label_tokens"]
        share = tokens / dist.get_world_size()
        record = self.sharpness.after_step(
            self.step_scheduler.step,
            lambda: (self._loss_sum(batches, tokens), share),
            loss=(sample.metrics["loss"] * share, share),
            grad_norm=sample.metrics["grad_norm"],
        )
        if record is not None:
            sample.metrics |= {
                tag.replace("-", "_"): value for tag, value in self.sharpness.scalars().items()
            }
        return sample

    def _load_checkpoint_tracked_state(self, ckpt_dir: str) -> Any:
        saved = os.path.join(ckpt_dir, "sharpness.pt")
        if self._measures and os.path.exists(saved):
            self._loaded = torch.load(saved, weights_only=True)
        return super()._load_checkpoint_tracked_state(ckpt_dir)

    def _loss_sum(self, batches: list[dict[str, Any]], tokens: int) -> Tensor:
        """This rank's part of the sum of the losses of the step, forward only."""
        losses: list[Tensor] = []  # each a sum over tokens, divided by those of all ranks
        for i, batch in enumerate(batches):
            self._forward_backward_step(
                i,
                batch,
                loss_buffer=losses,
                num_label_tokens=tokens,
                num_batches=len(batches),
                is_train=False,
            )
        # Tensor-parallel ranks have the same loss, and each of them is added.
        copies: int = dist.get_world_size() // self._get_dp_group_size(include_cp=True)
        return torch.stack(losses).sum() * (tokens / copies)


def _refuse_unsupported(cfg: Any) -> None:
    def size(name: str) -> int:
        return int(cfg.get(f"distributed.{name}", None) or 1)

    strategy = str(cfg.get("distributed.strategy", "fsdp2")).lower()
    reasons = {
        "distributed.pp_size: the passes of a pipeline schedule have not been made to replay; set "
        "it to 1": size("pp_size") > 1,
        "distributed.cp_size: measuring under context parallelism has not been tried; set it to "
        "1": size("cp_size") > 1,
        "distributed.ep_size: measuring under expert parallelism has not been tried; set it to "
        "1": size("ep_size") > 1,
        "distributed.strategy: measuring under AutoModel's Megatron-FSDP has not been tried; "
        "use fsdp2 or ddp": strategy not in ("fsdp2", "ddp"),
        "domain_mixture: its weights of the loss are applied in the recipe's training pass alone, "
        "so that another loss would be measured; leave it out": (
            cfg.get("domain_mixture", None) is not None
        ),
    }
    refuse(
        {f"{reason}, or set critical_sharpness.every to 0": on for reason, on in reasons.items()}
    )
