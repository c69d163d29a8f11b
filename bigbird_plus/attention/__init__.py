"""Attention of BigBird.

*Which* tokens read which is the matter of `pattern` and, for a call, of `plan`; *how* it is computed that of the
engines in `impl`, among which `engines` chooses.
"""

from .api import block_sparse_attention
from .engines import register_engine

__all__ = ["block_sparse_attention", "register_engine"]
