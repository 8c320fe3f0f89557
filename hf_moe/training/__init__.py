"""What Transformers' Trainer needs for our models: callbacks that act once per optimizer step."""

from .balancing import BiasBalancing, CountsAhead, LoadBalancing, count_ahead, empty_loads, update_biases
from .schedules import PoolSchedule, TopKSchedule
