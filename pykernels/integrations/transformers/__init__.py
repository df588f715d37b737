"""Hugging Face Transformers on our kernels: an attention implementation that models can name.

    import pykernels as pk
    pk.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="pykernels")

Transformers itself is imported by `register`, not before.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

__all__ = ["register"]

OLDEST = (5, 4)
NAME = "pykernels"


def register(name: str = NAME, *, backend: str | None = None) -> None:
    """Makes `attn_implementation=name` known to Transformers: an attention function and the maker of its masks.

    Served are decoders, encoders and encoder-decoders, in training and in generation: grouped key heads, sliding
    windows, soft caps, sinks, position biases (with gradient), padding on either side, packed sequences, dynamic and
    static caches. Causal, windowed, padded and packed masks are handed to the kernels as what they are; only others
    become a dense mask. Attention weights are never made, so `output_attentions=True` gives None, as with "sdpa".

    A query that may attend to no key (a padded position on the left) gives 0, where Transformers' eager implementation
    gives the mean of all values: outputs differ there and only there.

    Args:
        name: under which models find it.
        backend: which backend serves it; see `pykernels.explain`.

    Raises:
        ImportError: Transformers is missing, or older than 5.4.
    """
    _check()
    from transformers import AttentionInterface, AttentionMaskInterface

    from .attention import attention_forward
    from .masks import make_mask

    AttentionInterface.register(name, partial(attention_forward, backend=backend) if backend else attention_forward)
    AttentionMaskInterface.register(name, make_mask)


def patch_rules() -> Iterable[Any]:
    """The rules of `pykernels.patch` for Transformers' classes; ImportError where the version does not fit."""
    _check()
    from . import modules

    return modules.patch_rules()


def rule_for(kind: type) -> Any:
    """The rule of `pykernels.patch` for a class that `patch_rules` does not name, or None."""
    from . import modules

    return modules.rule_for(kind)


def _check() -> None:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "pykernels.integrations.transformers needs transformers >= 5.4: pip install transformers"
        ) from error
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
        raise ImportError(
            f"pykernels.integrations.transformers needs transformers >= 5.4, not {transformers.__version__}: "
            "pip install --upgrade transformers"
        )
