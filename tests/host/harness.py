"""Builds one `unittest.TestCase` for an architecture out of Transformers' tester mixins."""

import unittest
from dataclasses import dataclass, field
from typing import Any

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

    def test_config(self) -> None:
        """Round trips, defaults, labels, and a construction without arguments that warns of nothing."""
        tester = upstream.ConfigTester(self, config_class=self.entry.config_class, **self.entry.options)
        tester.run_common_tests()


def make_test_class(entry: Entry, module: str) -> type[unittest.TestCase]:
    """The test class of one entry, for the test file `module`."""
    upstream.add_auto_names(entry.classes)
    members = {"entry": entry, "all_model_classes": entry.classes, "__module__": module}
    return type(f"Test_{entry.name}", (HostTests, unittest.TestCase), members)
