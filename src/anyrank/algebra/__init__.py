"""The one algebra: y = W x + s_k * R C_k P x, as pure functions of tensors."""

from .adapter import DENSE as DENSE
from .adapter import LOW_RANK as LOW_RANK
from .adapter import Geometry as Geometry
from .adapter import adapter_output as adapter_output
from .adapter import lora_factors as lora_factors
from .core import dense_core as dense_core
from .core import low_rank_core as low_rank_core
from .core import rows as rows
from .pool import pool as pool
from .pool import pool_columns as pool_columns
from .repeat import repeat as repeat
from .repeat import repeat_rows as repeat_rows
from .rotation import svd_order as svd_order
from .scale import SCALES as SCALES
from .scale import scale_at as scale_at
from .update import Update as Update
