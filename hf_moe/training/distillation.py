"""Distillation: a student learns a teacher's predictions and, if wanted, its hidden states, in any trainer.

    loss = lm_coef * LM + distillation_coef * KL + feature_coef * mean over pairs of layers of F(h_student, h_teacher)

LLaVA-MoD's mimic stages (https://arxiv.org/abs/2408.15881) are `lm_coef=0` (dense to dense) and `lm_coef=1` (dense to
sparse), SlimMoE's (https://arxiv.org/abs/2506.18349) the same after each pruning. Letters: B rows, T tokens, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..modeling.divergence import DIVERGENCES, divergence
from .own_loss import OwnLoss, predicted

NOT_FOR_THE_TEACHER = ("labels", "shift_labels", "num_items_in_batch", "output_router_logits")


def mse(student: torch.Tensor, teacher: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Sum over the counted tokens of the mean squared difference of hidden states (B, T, D)."""
    return (student - teacher).square().mean(-1)[counted].sum()


def cosine(student: torch.Tensor, teacher: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Sum over the counted tokens of 1 - cosine of hidden states (B, T, D)."""
    return (1 - F.cosine_similarity(student, teacher, dim=-1))[counted].sum()


def similarity(student: torch.Tensor, teacher: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Sum over the counted tokens of the mean squared difference of their cosines with the counted tokens of the row,
    in the student and in the teacher, whose widths may differ."""
    apart = [x @ x.mT for x in (F.normalize(student, dim=-1), F.normalize(teacher, dim=-1))]
    pairs = counted[:, :, None] & counted[:, None, :]
    squares = (apart[0] - apart[1]).square() * pairs
    return (squares.sum((1, 2)) / counted.sum(1).clamp(min=1)).sum()


FEATURE_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mse": mse,
    "cosine": cosine,
    "similarity": similarity,
}


@dataclass
class Distillation:
    """What a student learns from a teacher.

    Args:
        divergence: name in `DIVERGENCES`: `forward_kl` (the papers'), `reverse_kl`, `jensen_shannon`...
        temperature: divides both models' logits.
        distillation_coef: of the divergence.
        lm_coef: of the model's own loss, in which its balance terms are; `LoadBalancing` acts whatever this is.
        layers: pairs (student, teacher) of numbers of hidden states, where 0 are the embeddings and the last comes
            after the final norm; "uniform": every layer of the student with the one at the same relative depth.
        feature_loss: name in `FEATURE_LOSSES`; only `similarity` compares different widths.
        feature_coef: of the mean over these pairs.

    Raises:
        ValueError: unknown names, numbers out of range, layers without a coefficient or the other way round.
    """

    divergence: str = "forward_kl"
    temperature: float = 1.0
    distillation_coef: float = 1.0
    lm_coef: float = 1.0
    layers: list[tuple[int, int]] | str | None = None
    feature_loss: str = "mse"
    feature_coef: float = 0.0

    def __post_init__(self) -> None:
        for name, table in (("divergence", DIVERGENCES), ("feature_loss", FEATURE_LOSSES)):
            if getattr(self, name) not in table:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose from {sorted(table)}.")
        for name in ("distillation_coef", "lm_coef", "feature_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0.")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0.")
        if isinstance(self.layers, str) and self.layers != "uniform":
            raise ValueError(f"layers={self.layers!r} must be 'uniform' or pairs of (student, teacher).")
        if (self.layers is None) != (self.feature_coef == 0):
            raise ValueError(f"layers={self.layers} and feature_coef={self.feature_coef} need each other.")

    def pairs(self, student: Any, teacher: Any) -> list[tuple[int, int]]:
        """The pairs of hidden states for two models' configs.

        Raises:
            ValueError: layers that are not there, or widths that cannot be compared.
        """
        depths = (student.num_hidden_layers, teacher.num_hidden_layers)
        if self.layers == "uniform":
            chosen = [(i, round(i * depths[1] / depths[0])) for i in range(1, depths[0] + 1)]
        else:
            chosen = [(int(i), int(j)) for i, j in self.layers or []]
        if any(not (0 <= i <= depths[0] and 0 <= j <= depths[1]) for i, j in chosen):
            raise ValueError(f"layers={chosen} must be 0 to {depths[0]} of the student and 0 to {depths[1]}.")
        if chosen and self.feature_loss != "similarity" and student.hidden_size != teacher.hidden_size:
            raise ValueError(
                f"hidden_size is {student.hidden_size} in the student and {teacher.hidden_size} in the teacher: only "
                "feature_loss='similarity' compares them."
            )
        return chosen


class Distills(OwnLoss):
    """Lets a trainer's model learn from a teacher: `class MyTrainer(Distills, SFTTrainer): ...`.

    The divergence and the feature losses are means over the label tokens of the whole optimizer step, so that they do
    not depend on accumulation and processes. Only positions with a label count: with prompts masked, the response.

    Args:
        teacher: a causal language model with the student's vocabulary; it is run without gradients, in eval mode, and
            is not saved with the student.
        distillation: what to learn.

    Raises:
        ValueError: vocabularies of different sizes, layers that do not fit.
    """

    def __init__(
        self, *args: Any, teacher: Any = None, distillation: Distillation | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.distillation = distillation or Distillation()
        if teacher is None:
            raise ValueError("Distills needs a teacher: MyTrainer(model, args, teacher=teacher, ...).")
        network: Any = self.model
        student, teachers = (model.config.get_text_config() for model in (network, teacher))
        if student.vocab_size != teachers.vocab_size:
            raise ValueError(
                f"vocab_size is {student.vocab_size} in the student and {teachers.vocab_size} in the teacher: their "
                "predictions cannot be compared; use a teacher with the same tokenizer."
            )
        self.layer_pairs = self.distillation.pairs(student, teachers)
        self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True).eval()
        self.figures: dict[str, list[torch.Tensor]] = {}

    def training_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        settings, counted = self.distillation, predicted(inputs)
        items = inputs.get("num_items_in_batch", counted.sum().clamp(min=1))
        if self.layer_pairs:
            inputs = {**inputs, "output_hidden_states": True}
        outputs = model(**inputs)
        with torch.no_grad():
            taught = self.teacher(**{name: x for name, x in inputs.items() if name not in NOT_FOR_THE_TEACHER})
        apart = divergence(settings.divergence, outputs.logits, taught.logits, counted, items, settings.temperature)
        total = settings.lm_coef * outputs.loss + settings.distillation_coef * apart
        self.note("distillation_loss", apart)
        if self.layer_pairs:
            loss = FEATURE_LOSSES[settings.feature_loss]
            states = ((outputs.hidden_states[i].float(), taught.hidden_states[j].float()) for i, j in self.layer_pairs)
            features = torch.stack([loss(*pair, counted) for pair in states]).mean() / items
            self.note("feature_loss", features)
            total = total + settings.feature_coef * features
        return total, outputs

    def note(self, name: str, value: torch.Tensor) -> None:
        """Keep a micro-batch's part of a figure for the log."""
        self.figures.setdefault(name, []).append(value.detach())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.figures:
            steps = max(self.state.global_step - self._globalstep_last_logged, 1)
            logs |= {name: torch.stack(parts).sum().item() / steps for name, parts in self.figures.items()}
            self.figures = {}
        super().log(logs, *args, **kwargs)
