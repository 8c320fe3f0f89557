"""What a mixture is made of and how its routers use the experts: `hf-moe inspect`."""

from .facts import Inspection, ModelFacts, model_facts
from .layer_table import LayerRow
from .report import html_report
from .routing import LayerRouting, RoutingFacts, expert_statistics
