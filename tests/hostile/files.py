"""Hostile files and folders, all by name."""

from __future__ import annotations

from tests.hostile.folders import DCP, FOLDERS, RANKS
from tests.hostile.values import LISTS, SAFETENSORS, TENSORS
from tests.hostile.zips import ZIPS

CASES = {**ZIPS, **TENSORS, **LISTS, **SAFETENSORS, **FOLDERS, **DCP, **RANKS}

assert len(CASES) == sum(map(len, (ZIPS, TENSORS, LISTS, SAFETENSORS, FOLDERS, DCP, RANKS))), "two cases of one name"
