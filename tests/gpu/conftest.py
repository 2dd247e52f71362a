"""The GPU's tests run the cases of the tests beside them with vLLM's FlashAttention."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
