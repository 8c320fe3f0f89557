"""Between a model and the people who read or load it: flat single files, model cards, the way to the hub."""

from .card import model_card, write_card
from .publishing import Published, publish
