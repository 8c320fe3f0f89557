"""Repairs of Transformers' own JetMoE (5.23), without which it cannot be trained as its paper says.

To go when Transformers has mended them: each line says what is wrong there.
"""

from transformers.models.jetmoe import modeling_jetmoe
from transformers.models.jetmoe.configuration_jetmoe import JetMoeConfig
from transformers.utils.output_capturing import OutputRecorder


def repair_jetmoe() -> None:
    """Teach JetMoE checkpointing, count each router once in its balance loss, and give its weight the usual name."""
    classes = modeling_jetmoe.JetMoePreTrainedModel
    # its layers are GradientCheckpointingLayers already, only the permission is missing
    classes.supports_gradient_checkpointing = True
    # the attention's router is recorded by the attention and by the gate inside it: twice
    gates = OutputRecorder(modeling_jetmoe.JetMoeTopKGating, index=4)
    classes._can_record_outputs = dict(classes._can_record_outputs or {}, router_logits=gates)
    # TRL reads and sets `router_aux_loss_coef` and asks for `num_experts`; without the first it trains without balance
    names = {"router_aux_loss_coef": "aux_loss_coef", "num_experts": "num_local_experts"}
    JetMoeConfig.attribute_map = {**JetMoeConfig.attribute_map, **names}
