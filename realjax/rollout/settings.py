"""How a rollout engine works, whatever the model."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How an engine works; results do not depend on it.

    Attributes:
        slots: completions decoded at the same time.
        pages: of the pool; 0 makes it large enough for every slot's longest row.
        page_size: tokens of a page.
        steps: tokens that a launch decodes.
        chunk_tokens: tokens of a chunk of prefill, on each row shard.
        kv_dtype: of the pool; "" is the model's.
        is_refilling: whether a slot is given on before all slots are free.
        is_sharing: whether completions share the pages of what they begin with.
    """

    slots: int
    pages: int = 0
    page_size: int = 32
    steps: int = 8
    chunk_tokens: int = 512
    kv_dtype: str = ""
    is_refilling: bool = True
    is_sharing: bool = True
