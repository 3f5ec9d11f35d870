"""How keys and values are held while text is generated."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import OptionGroup, option

KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8_e4m3", "int8")


@dataclass(kw_only=True)
class KVCacheOptions(OptionGroup):
    """Key-value cache."""

    kv_cache_dtype: str = option(
        "auto",
        "number format of the keys and values; fp8_e4m3 and int8 take half the memory of 16 bits, so that more tokens fit; "
        "auto: as the model computes",
        KV_CACHE_DTYPES,
    )
