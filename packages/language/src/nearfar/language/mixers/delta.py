"""Recurrences with a matrix as state: linear attention with decays, delta rules, Mamba-2."""

from nearfar.language.cards import Mixer
from nearfar.ops.recurrence.delta import DeltaNet, GatedDeltaNet, GatedLinearAttention, KimiDeltaAttention
from nearfar.ops.recurrence.mamba2 import Mamba2
from nearfar.ops.recurrence.rwkv7 import RWKV7TimeMix

MIXERS = {
    "deltanet": Mixer(DeltaNet, "d² / h"),
    "gated-deltanet": Mixer(GatedDeltaNet, "h d_k d_v"),
    "gla": Mixer(GatedLinearAttention, "d² / (2 h)"),
    "kda": Mixer(KimiDeltaAttention, "h d_k²"),
    "mamba2": Mixer(Mamba2, "2 d S"),
    "rwkv7": Mixer(RWKV7TimeMix, "d (d / h + 1)"),
}
