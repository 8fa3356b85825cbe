"""Frozen base weights behind one small interface: read, may it fold, fold."""

from .base import FrozenWeight as FrozenWeight
from .registry import frozen_weight as frozen_weight
