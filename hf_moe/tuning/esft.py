"""Expert-Specialised Fine-Tuning: train the experts that a task uses most, and nothing else.

ESFT (https://arxiv.org/abs/2407.01906). Letters: L MoE layers, E experts, S selected experts of a layer.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig
from torch import nn
from tqdm import tqdm

from ..modeling import RouterCall, moe_layers, watched_routers
from .expert_subset import ExpertSubset, expert_modules
from .peft_types import add_peft_type, register
from .replacing import OneKindTuner

Scores = dict[str, torch.Tensor]  # name of the MoE layer -> (E,)


@torch.no_grad()
def score_experts(model: Any, batches: Iterable[Mapping[str, Any]], by: Literal["gate", "token"] = "token") -> Scores:
    """How much a task uses every expert (§3.2, eq. 8-9).

    Args:
        model: of a type that `moe_layers` knows; it runs in evaluation mode.
        batches: keyword arguments of the model: the task's data. The paper takes 32 sequences of 4,096 tokens.
        by: `token`: how often an expert is among the K chosen, divided by K: a layer's scores sum to 1. `gate`: its
            mean weight as the model combines experts, 0 where it is not chosen.

    Returns:
        Name of the MoE layer -> (E,) mean over all tokens but padding, in float64.

    Raises:
        ValueError: unknown `by`, no batches.
    """
    if by not in ("gate", "token"):
        raise ValueError(f"by={by!r} is unknown; choose 'gate' or 'token'.")
    sums: Scores = {}
    tokens: dict[str, int] = {}

    def add(call: RouterCall) -> None:
        mask = call.token_mask
        real = slice(None) if mask is None else mask
        indices, weights = call.indices[real], call.weights[real].double()
        values = torch.full_like(weights, 1 / indices.shape[1]) if by == "token" else weights
        scores = torch.zeros(call.layer.num_experts + call.layer.num_zero_experts, dtype=torch.float64)
        scores.index_add_(0, indices.flatten().cpu(), values.flatten().cpu())
        sums[call.layer.name] = sums.get(call.layer.name, 0) + scores[: call.layer.num_experts]
        tokens[call.layer.name] = tokens.get(call.layer.name, 0) + len(indices)

    training = model.training
    model.eval()
    try:
        with watched_routers(model, add):
            for batch in tqdm(batches, desc="Scoring experts", unit="batch", delay=5):
                inputs = {name: x.to(model.device) for name, x in batch.items() if torch.is_tensor(x)}
                model(**{name: x for name, x in inputs.items() if name != "labels"}, use_cache=False)
    finally:
        model.train(training)
    if not sums:
        raise ValueError("batches are empty: there is nothing to score the experts by.")
    return {name: scores / tokens[name] for name, scores in sums.items()}


def select_experts(scores: torch.Tensor | Sequence[float], top_p: float) -> list[int]:
    """The experts with the highest scores, until their sum reaches `top_p` (§3.2, eq. 10).

    An expert is added while the sum of those before it is below `top_p`, so there is always one. The paper takes 0.1
    for scores by gate and 0.2 by token.

    Args:
        scores: (E,) of one layer.
        top_p: threshold, above 0 and at most 1.

    Returns:
        Ids, the highest score first; equal scores by id.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1.")
    values = torch.as_tensor(scores, dtype=torch.float64)
    chosen, total = [], 0.0
    for expert in values.argsort(descending=True, stable=True).tolist():
        if total >= top_p:
            break
        chosen.append(expert)
        total += values[expert].item()
    return chosen


@dataclass
class EsftConfig(PeftConfig):
    """Trains whole experts: copies of the selected ones, which the adapter consists of.

    Args:
        experts: name of an experts module, as in `model.named_modules()`, -> the experts to train. `esft_config` fills
            it from scores.
        modules_to_save: other modules that train whole, such as shared experts: the paper's variants.
    """

    experts: dict[str, list[int]] = field(
        default_factory=dict, metadata={"help": "Experts module -> experts to train."}
    )
    target_modules: list[str] | None = field(default=None, metadata={"help": "Filled from `experts`."})
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Not used; PEFT asks for it."})
    layers_to_transform: list[int] | None = field(default=None, metadata={"help": "Not used; PEFT asks for it."})
    layers_pattern: list[str] | None = field(default=None, metadata={"help": "Not used; PEFT asks for it."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules that train whole."})
    bias: str = field(default="none", metadata={"help": "Not used; PEFT asks for it."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("esft")
        # the order of the rows in every tensor; published selections are ordered by score
        self.experts = {name: sorted(set(experts)) for name, experts in self.experts.items()}
        self.target_modules = sorted(self.experts)


def esft_config(model: Any, scores: Mapping[str, torch.Tensor], top_p: float = 0.2, **options: Any) -> EsftConfig:
    """The experts to train, from `score_experts`.

    Args:
        model: that was scored.
        scores: name of the MoE layer -> (E,).
        top_p: as in `select_experts`.
        options: of `EsftConfig`.
    """
    chosen = {name: select_experts(values, top_p) for name, values in scores.items()}
    return EsftConfig(experts=by_module(model, chosen), task_type="CAUSAL_LM", **options)


def by_module(model: Any, chosen: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Experts per MoE layer -> experts per experts module; layers that share a module unite theirs."""
    names = {module: name for name, module in expert_modules(model).items()}
    layers = {layer.name: names[layer.experts] for layer in moe_layers(model)}
    if unknown := [name for name in chosen if name not in layers]:
        raise ValueError(f"There is no MoE layer {unknown[0]!r}; the model has {sorted(layers)}.")
    united: dict[str, set[int]] = {}
    for name, experts in chosen.items():
        united.setdefault(layers[name], set()).update(experts)
    return {name: sorted(experts) for name, experts in united.items() if experts}


class EsftExperts(ExpertSubset):
    """Whole matrices `(S, ...)` of the selected experts, stored as the base's; they start as its copies."""

    adapter_layer_names = ("esft_in", "esft_out")
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self.esft_in, self.esft_out = nn.ParameterDict(), nn.ParameterDict()
        self.originals: dict[tuple[str, str], torch.Tensor] = {}

    def trained(self, stack: str) -> nn.ParameterDict:
        """Name of an adapter -> its matrices of a stack."""
        return self.esft_in if stack == self.stacks[0] else self.esft_out

    def update_layer(self, adapter: str, config: EsftConfig) -> None:
        """Add an adapter."""
        chosen = self.add_experts(adapter, config.experts[self.layer_name])
        base: Any = self.get_base_layer()
        for stack in self.stacks:
            self.trained(stack)[adapter] = nn.Parameter(getattr(base, stack).data[chosen].clone())
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def linear(self, x: torch.Tensor, stack: str, expert: int, active: Sequence[str]) -> torch.Tensor:
        owners = [adapter for adapter in active if expert in self.experts_of[adapter]]
        if len(owners) > 1:
            raise ValueError(f"Expert {expert} of {self.layer_name!r} is in the active adapters {owners}: use one.")
        weight = self.trained(stack)[owners[0]][self.experts_of[owners[0]].index(expert)]
        return self.base_linear(x.to(weight.dtype), weight, stack, expert).to(x.dtype)

    def merged_weights(self, adapter: str, stack: str) -> Iterator[tuple[int, torch.Tensor]]:
        weight = getattr(self.get_base_layer(), stack).data
        self.originals[adapter, stack] = weight[self.experts_of[adapter]].clone()
        for row, expert in enumerate(self.experts_of[adapter]):
            yield expert, self.trained(stack)[adapter][row].data.to(weight.dtype)

    def unmerged_weights(self, adapter: str, stack: str) -> Iterator[tuple[int, torch.Tensor]]:
        yield from zip(self.experts_of[adapter], self.originals.pop((adapter, stack)))


class EsftModel(OneKindTuner):
    """PEFT's tuner for `EsftConfig`."""

    prefix = "esft_"
    tuner_layer_cls = layer_class = EsftExperts


def save_selection(experts: Mapping[str, Sequence[int]], path: str | Path, **others: Any) -> None:
    """Write a selection as the ESFT repository publishes it: `{"experts": {"<layer number>": [ids]}, ...}`.

    Args:
        experts: name of a layer or experts module -> ids.
        path: of the JSON file, written beside its name and renamed.
        others: further keys; `shared_experts` and `non_expert_modules` are False unless given, as in the published.
    """
    path = Path(path)
    layers = {str(layer_number(name)): list(ids) for name, ids in experts.items()}
    content = {"experts": layers, "shared_experts": False, "non_expert_modules": False, **others}
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(path)


def load_selection(model: Any, path: str | Path) -> dict[str, list[int]]:
    """Read a published selection: name of the experts module of `model` -> ids, for `EsftConfig(experts=...)`.

    Raises:
        ValueError: the file has no `experts`, or names a layer that is no MoE layer of the model.
    """
    content = json.loads(Path(path).read_text())
    if not isinstance(content.get("experts"), dict):
        raise ValueError(f"{path}: has no object 'experts' of layer number -> expert ids.")
    modules = {layer_number(name): name for name in expert_modules(model)}
    chosen = {int(number): ids for number, ids in content["experts"].items()}
    if unknown := sorted(chosen.keys() - modules.keys()):
        raise ValueError(f"{path}: layer {unknown[0]} is no MoE layer of this model, which has {sorted(modules)}.")
    return {modules[number]: list(ids) for number, ids in chosen.items() if ids}


def layer_number(name: str) -> int:
    """The number of the layer in a module's name."""
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    if not numbers:
        raise ValueError(f"{name!r} holds no number of a layer.")
    return numbers[0]


register("esft", EsftConfig, EsftModel)
