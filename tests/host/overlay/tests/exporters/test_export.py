"""Stand-in for the export tests (torch.export, ONNX, ExecuTorch, OpenVINO), which the sdist lacks."""


class ExportTesterMixin:
    """Holds no test; `ModelTesterMixin` inherits from it."""
