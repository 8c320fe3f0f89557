"""Trainer's checkpoints hold one tensor per expert, and Trainer cannot read them back: this mends it."""

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig

from ..modeling import DecoderConfig


class RestoreExperts(TrainerCallback):
    """Makes `resume_from_checkpoint` and `load_best_model_at_end` restore the experts of native models.

    Transformers 5.23 saves most of its MoE models with a tensor per expert and stacks them in `from_pretrained`;
    Trainer restores a checkpoint with `load_state_dict(strict=False)`, which stacks nothing: the experts keep whatever
    they hold, with a warning about missing keys. With this callback a state dict that is loaded into the model is
    converted first, by the model's own rules. Models that are saved as they are in memory are left alone; so are ours,
    which convert themselves, and adapters, which Trainer restores another way.

    Give it to the Trainer's constructor: `Trainer(..., callbacks=[RestoreExperts()])`. It stays on the model.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        restore_experts(model)


def restore_experts(model: nn.Module) -> None:
    """Let `model.load_state_dict` understand the layout that `save_pretrained` writes; what `RestoreExperts` does.

    Args:
        model: a native model, or a wrapper around one, in which case nothing is done. Twice is as good as once.
    """
    if not isinstance(model, PreTrainedModel):
        return
    if isinstance(model.config, DecoderConfig) and not model.config.published_converters():
        return
    if not any(isinstance(hook, SavedLayout) for hook in hooks_of(model)):
        model.register_load_state_dict_pre_hook(SavedLayout(model))


def hooks_of(model: nn.Module) -> list[Any]:
    """What runs before `load_state_dict` of a module."""
    return [hook.hook for hook in model._load_state_dict_pre_hooks.values()]


class SavedLayout:
    """Turns the tensors of a checkpoint, whole or shard by shard, into those that the model holds in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.waiting: dict[str, torch.Tensor] = {}
        self.expected: set[str] | None = None  # names in files that are none in memory; known at the first use

    def __call__(self, model: Any, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Before every `load_state_dict`; `state_dict` is changed in place."""
        own = model.state_dict().keys()
        if prefix or state_dict.keys() <= own:
            return
        if self.expected is None:
            saved = revert_weight_conversion(model, dict(model.state_dict()))
            self.expected = set(saved) - set(own)
        self.waiting |= {name: state_dict.pop(name) for name in self.expected & state_dict.keys()}
        if self.expected and self.waiting.keys() == self.expected:
            state_dict |= in_memory_layout(model, self.waiting)
            self.waiting = {}


def in_memory_layout(model: PreTrainedModel, saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert tensors, named as in the files of a model, to those that the model holds in memory.

    Args:
        model: whose rules apply; it is not changed.
        saved: all tensors of the layers to convert.

    Raises:
        ValueError: the rules cannot be applied to these tensors.
    """
    with init_empty_weights(include_buffers=True):
        twin: Any = type(model)(model.config)
    mapping: Any = get_model_conversion_mapping(twin)
    settings = LoadStateDictConfig(dtype=model.dtype, weight_mapping=mapping)
    info, _ = convert_and_load_state_dict_in_model(twin, dict(saved), settings)
    if wrong := [*info.mismatched_keys, *info.conversion_errors, *info.unexpected_keys]:
        raise ValueError(f"The checkpoint does not fit {type(model).__name__}: {wrong[0]}")
    return {name: tensor for name, tensor in twin.state_dict().items() if not tensor.is_meta}
