"""Two passes that should agree, for models that draw at random in training (THOR, dropout) and any trainer."""

from typing import Any

import torch

from ..modeling.divergence import divergence
from .own_loss import OwnLoss, predicted


class TwoPasses(OwnLoss):
    """THOR's training (https://arxiv.org/abs/2110.04260): `class MyTrainer(TwoPasses, SFTTrainer): ...`.

        loss = CE_1 + CE_2 + alpha (KL(p_1 || p_2) + KL(p_2 || p_1)) / 2

    Each training step runs the model twice on the same inputs, with draws of its own each time: of experts (router
    `random`), noise and dropout. Losses are summed over passes, as in the paper, so they are about twice as large; the
    divergence is the mean over the label tokens of the whole optimizer step. `ThorForCausalLM` does the same inside
    the model, under Trainer; this is for other models, and for TRL's trainers.

    Attributes:
        consistency_coef: alpha; 5 in the released script, 1 in its code's default.

    Raises:
        ValueError: a model that runs twice by itself.
    """

    consistency_coef = 5.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        network: Any = self.model
        if network.config.model_type == "thor":
            raise ValueError("ThorForCausalLM runs twice by itself: use Trainer without TwoPasses.")

    def training_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        first, second = model(**inputs), model(**inputs)
        items = inputs.get("num_items_in_batch")
        apart = divergence("symmetric_kl", first.logits, second.logits, predicted(inputs), items)
        return first.loss + second.loss + self.consistency_coef * apart, first
