"""Opens Transformers' test modules to model types from outside: everything we change in them is in this file."""

from unittest.mock import patch

import transformers
from transformers import PreTrainedModel

from tests import (
    test_expert_parallel_mixin,
    test_fsdp_mixin,
    test_modeling_common,
    test_tensor_parallel_mixin,
)

# The module imports the package around itself, an `__init__.py` that the sdist lacks, and makes no use of it.
with patch("transformers.utils.direct_transformers_import", return_value=transformers):
    from tests.test_configuration_common import ConfigTester as ConfigTester

# The mixins decide labels, and "this class computes no loss", from the class names in Transformers' Auto mappings.
AUTO_NAMES = {
    "Model": "MODEL_MAPPING_NAMES",
    "ForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "ForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "ForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}
MOST_RANKS = 8


def lift_limits() -> None:
    """Drops the lists of model types that the distributed tests are kept to, and the limit of one rank per core."""
    test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
    test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None
    test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
    test_fsdp_mixin._get_available_fsdp_workers = lambda: MOST_RANKS


def add_auto_names(classes: tuple[type[PreTrainedModel], ...]) -> None:
    """Adds the names of `classes` to the mappings that the test module sees; Transformers' own stay as they are."""
    for model_class in classes:
        suffix = next(s for s in reversed(AUTO_NAMES) if model_class.__name__.endswith(s))
        mapping = dict(getattr(test_modeling_common, AUTO_NAMES[suffix]))
        mapping.setdefault(model_class.config_class.model_type, model_class.__name__)
        setattr(test_modeling_common, AUTO_NAMES[suffix], mapping)
