"""What Transformers' Trainer needs for our models: callbacks that act once per optimizer step."""

from .balancing import BiasBalancing, count_ahead, empty_loads, update_biases
from .checkpoint_merging import merge_checkpoints, merge_coefficients
from .consistency import TwoPasses
from .distillation import Distillation, Distills
from .faults import ReportNaN
from .learning_rates import WithSchedule, get_power_schedule, get_wsdc_schedule, power_rate
from .load_balancing import CountsAhead, LoadBalancing
from .muon import Muon, MuonForMixtures
from .parameters import GroupedAdamW, group_of_each, parameter_groups, routers_in_fp32, train_only
from .qk_clip import QKClip
from .restore import RestoreExperts, restore_experts
from .routing_metrics import RoutingMetrics, routing_metrics
from .routing_replay import RoutingReplay
from .schedules import PoolSchedule, TopKSchedule
from .slimming import neuron_sensitivity, slim_experts
from .sparse_pretraining import SparsePretraining, average_parameter_count
from .spikes import SkipsSpikes, SpikeSkipping
from .warm_up import warm_up_folder, warm_up_routers, write_routers
