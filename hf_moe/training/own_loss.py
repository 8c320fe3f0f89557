"""What mixins with a loss of their own share: they need logits, which TRL's trainers no longer make."""

from typing import Any

import torch
from transformers import Trainer


class OwnLoss(Trainer):
    """Base of mixins for Trainer and SFTTrainer that add to the model's loss something made of its logits.

    In training the model runs with its labels and computes its own loss, balance terms included; `training_loss` adds
    to it. TRL's options for the loss have no effect then. Evaluation is the trainer's own.
    """

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        if not model.training:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
            )
        if "labels" not in inputs:
            raise ValueError(f"{type(self).__name__} needs labels to know which predictions count: {list(inputs)}.")
        if num_items_in_batch is not None:
            inputs = {**inputs, "num_items_in_batch": num_items_in_batch}
        loss, outputs = self.training_loss(model, {**inputs, "use_cache": False})
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # as Trainer does: gradients are averaged over processes
        return (loss, outputs) if return_outputs else loss

    def training_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """The loss of a micro-batch, whose sum over the step's micro-batches is the step's, and the outputs."""
        raise NotImplementedError


def predicted(inputs: dict[str, Any]) -> torch.Tensor:
    """(B, T) True where the prediction of a position has a label."""
    shifted = inputs.get("shift_labels")
    if shifted is None:
        shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[..., 1:]
    return shifted != -100
