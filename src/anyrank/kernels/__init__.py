"""Fast paths, each beside the naive reference that its tests compare it with."""

from .affine import Affine as Affine
from .affine import AffineFormat as AffineFormat
from .affine import fold_offsets as fold_offsets
from .affine import tile_name as tile_name
from .bits import pack as pack
from .bits import unpack as unpack
from .linear import Branch as Branch
from .linear import adapted_linear as adapted_linear
