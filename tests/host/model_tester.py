"""What Transformers' mixins expect of `tests/causal_lm_tester.py`, which the sdist lacks: tiny configs and inputs."""

import copy
from typing import Any

import torch
from tests.test_modeling_common import ids_tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.testing_utils import torch_device


class CausalLMModelTester:
    """Hands the mixins fresh copies of one tiny config, inputs for it, and the sizes they compare outputs with."""

    is_training = True
    batch_size = 13
    seq_length = 7
    type_sequence_label_size = 2
    num_labels = 3
    sequence_classification_class = None

    def __init__(
        self,
        config: PreTrainedConfig,
        base_model_class: type[PreTrainedModel],
        causal_lm_class: type[PreTrainedModel],
        **expected: Any,
    ) -> None:
        self.config = config
        self.base_model_class = base_model_class
        self.causal_lm_class = causal_lm_class
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads
        self.pad_token_id = config.pad_token_id
        for name, value in expected.items():
            setattr(self, name, value)

    def get_config(self) -> PreTrainedConfig:
        """A copy that the test may change."""
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        """Random tokens; row i of the mask ends after token i, so that both padded and full rows occur."""
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.config.vocab_size).to(torch_device)
        attention_mask = torch.tril(torch.ones_like(input_ids))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}
