"""Linear attention with decays and delta rules."""

from nearfar.language.cards import Mixer
from nearfar.ops.recurrence.delta import DeltaNet, GatedDeltaNet, GatedLinearAttention, KimiDeltaAttention
from nearfar.ops.recurrence.rwkv7 import RWKV7TimeMix

MIXERS = {
    "deltanet": Mixer(DeltaNet, "d² / h"),
    "gated-deltanet": Mixer(GatedDeltaNet, "h d_k d_v"),
    "gla": Mixer(GatedLinearAttention, "d² / (2 h)"),
    "kda": Mixer(KimiDeltaAttention, "h d_k²"),
    "rwkv7": Mixer(RWKV7TimeMix, "d (d / h + 1)"),
}
