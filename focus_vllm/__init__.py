"""Focus attention for vLLM: learned token groups make long context cheap."""

__version__ = "0.1.0"
