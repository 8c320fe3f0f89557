"""Builds one `unittest.TestCase` for an architecture out of Transformers' tester mixins."""

import unittest
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import upstream
from model_tester import CausalLMModelTester
from skips import reason_to_skip
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_expert_parallel_mixin import ExpertParallelTesterMixin
from tests.test_fsdp_mixin import FSDPTesterMixin
from tests.test_modeling_common import ModelTesterMixin
from tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin
from transformers import PreTrainedConfig, PreTrainedModel

upstream.lift_limits()

# These compare one process on a whole batch with several on its parts. A balance loss is a product of two means over
# the batch, so its parts do not add up to the whole: Transformers' own models run here without theirs as well.
SPLIT_BATCH_TESTS = ("test_hsdp_grad_accumulation", "test_fsdp2_expert_parallel")


@dataclass
class Entry:
    """What to build, and where its outputs differ from those of a plain decoder."""

    name: str
    config_class: type[PreTrainedConfig]
    classes: tuple[type[PreTrainedModel], ...]  # base model, causal LM, further heads
    options: dict[str, Any]  # of the config
    expected: dict[str, Any] = field(default_factory=dict)  # attributes of the model tester


class HostTests(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    TensorParallelTesterMixin,
    ExpertParallelTesterMixin,
    FSDPTesterMixin,
):
    """Every mixin, plus the config tests; a subclass sets `entry` and `all_model_classes`."""

    entry: Entry
    model_tester: Any = None
    # Transformers asks for this only of models whose config file bears a copyright line of 2023 or later.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        """Skips by our table, otherwise makes a fresh model tester."""
        if reason := reason_to_skip(self.entry.name, self._testMethodName):
            self.skipTest(reason)
        config = self.entry.config_class(**self.entry.options)
        self.model_tester = CausalLMModelTester(config, *self.entry.classes[:2], **self.entry.expected)

    def _get_tiny_config(self) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
        """What the FSDP tests train."""
        config_class, options = super()._get_tiny_config()
        if self._testMethodName.startswith(SPLIT_BATCH_TESTS):
            options["router_aux_loss_coef"] = 0.0
            options["router_z_loss_coef"] = 0.0
        return config_class, options

    def test_moe_models_record_router_logits(self) -> None:
        """Transformers looks for sparse experts in the text of the model's file; ours stand in files of their own."""
        with patch("inspect.getsource", return_value="@use_experts_implementation"):
            super().test_moe_models_record_router_logits()

    def test_config(self) -> None:
        """Round trips, defaults, labels, and a construction without arguments that warns of nothing."""
        tester = upstream.ConfigTester(self, config_class=self.entry.config_class, **self.entry.options)
        tester.run_common_tests()

    @torch.no_grad()
    def test_experts_implementations_agree(self) -> None:
        """Same logits whichever of Transformers' implementations runs the experts, ours or its own."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.model_tester.causal_lm_class(config).eval()
        logits = {}
        for implementation in ("eager", "batched_mm", "grouped_mm"):
            model.set_experts_implementation(implementation)
            logits[implementation] = model(**inputs).logits
        torch.testing.assert_close(logits["batched_mm"], logits["eager"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits["grouped_mm"], logits["eager"], atol=1e-5, rtol=1e-4)


def make_test_class(entry: Entry, module: str) -> type[unittest.TestCase]:
    """The test class of one entry, for the test file `module`."""
    upstream.add_auto_names(entry.classes)
    members = {"entry": entry, "all_model_classes": entry.classes, "__module__": module}
    return type(f"Test_{entry.name}", (HostTests, unittest.TestCase), members)
