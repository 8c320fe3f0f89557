"""What holds for every test: one thread, no network, and no warning from Transformers goes unseen."""

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers.utils import logging as transformers_logging

torch.set_num_threads(1)
transformers_logging.disable_progress_bar()


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def no_transformers_warnings(request):
    """Transformers warns through its logger; `@pytest.mark.allow_warnings("text", ...)` names what a test expects."""
    collector, logger = _Collector(), logging.getLogger("transformers")
    transformers_logging.warning_once.cache_clear()
    logger.addHandler(collector)
    yield
    logger.removeHandler(collector)
    marker = request.node.get_closest_marker("allow_warnings")
    allowed = marker.args if marker else ()
    unexpected = [text for text in collector.messages if not any(part in text for part in allowed)]
    assert not unexpected, f"Transformers warned: {unexpected}"
