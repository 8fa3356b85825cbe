"""The PEFT tuner. Importing this package makes the type ANYRANK known to PEFT.

PEFT's `register_peft_method` accepts only names of its own enum; its three tables take any string.
"""

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from .config import PEFT_TYPE as PEFT_TYPE
from .config import AnyRankConfig as AnyRankConfig
from .layer import AnyRankLinear as AnyRankLinear
from .model import AnyRankModel as AnyRankModel
from .model import adapter_layers as adapter_layers

PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = AnyRankConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = AnyRankModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = AnyRankModel.prefix  # type: ignore[index]
